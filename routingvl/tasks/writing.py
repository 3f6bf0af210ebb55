"""What tasks share whose model writes: captions, and answers generated word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from routingvl.config import ConfigError
from routingvl.data.collate import IGNORED
from routingvl.data.files import DataError, one_line
from routingvl.data.text_to_text import TextExample, TextToTextCollator, TextToTextDataset
from routingvl.models import VisionTextForGeneration
from routingvl.models.writing import WritingVLModel
from routingvl.tasks.base import Batch, Predictions, Split, Task


class WritingTask(Task):
    """Write a text by beam search."""

    model: WritingVLModel

    def read_training_splits(self) -> tuple[Split, Split | None]:
        """Also refuse a list of answers, of which this task chooses none."""
        if self.config.data.answers is not None:
            raise ConfigError(f"data.answers: task {self.name!r} writes its answers and chooses none; leave it null")
        return super().read_training_splits()

    def use_model(self, model: WritingVLModel) -> None:
        """Take ``model``; ConfigError unless it ends texts with the token that the tokenizer gives."""
        super().use_model(model)
        if (longest := self.config.eval.max_new_tokens) > model.max_positions:
            known = model.max_positions
            raise ConfigError(f"eval.max_new_tokens={longest} is more than the language model's {known} positions")
        self.check_token("end", "eos_token_id", self.tokenizer.eos_token_id, model.end_tokens)

    @staticmethod
    def check_token(verb: str, key: str, taught: int | None, known: list[int]) -> None:
        """Raise ConfigError when the tokenizer's token is not among those that the language model knows."""
        if taught not in known:
            written = " or ".join(map(str, known))
            raise ConfigError(
                f"captions {verb} with token {taught} of the tokenizer, but with {key} {written} of the language "
                "model's config: set model.tokenizer to the one that belongs to it, or correct that config"
            )

    def training_inputs(self, batch: Batch, device: torch.device) -> dict[str, Any]:
        """No logits, and the labels stay on the host, where choosing the positions that count waits for nothing."""
        rest = {key: value for key, value in batch.items() if key != "labels"}
        return self.model_inputs(rest, device) | {"labels": batch["labels"], "return_logits": False}

    def write(self, batch: Batch, num_beams: int) -> list[str]:
        """What is written for each example of a batch, from its tensors but the labels."""
        settings = self.config.eval
        inputs = self.model_inputs({key: value for key, value in batch.items() if key != "labels"}, self.model.device)
        beams = {"length_penalty": settings.length_penalty} if num_beams > 1 else {}
        tokens = self.model.generate(**inputs, num_beams=num_beams, max_new_tokens=settings.max_new_tokens, **beams)
        return [one_line(text) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class GenerateTask(WritingTask):
    """Write a text about an image, or several, and a text that is read: answers to questions.

    A subclass says what the examples of a split are, by :meth:`examples`; and which files it reads, the scores and the
    result file, as every task. Predictions have the ids of the examples.
    """

    model_class = VisionTextForGeneration
    text_model = "facebook/bart-base"
    max_text_length = 20

    def examples(self, split: Split) -> list[TextExample]:
        """The examples of what :meth:`load_split` read."""
        raise NotImplementedError

    def dataset(self, split: Split, training: bool) -> TextToTextDataset:
        """The examples; for training those with a target, and DataError when none has one."""
        examples = self.examples(split)
        if training:
            examples = [example for example in examples if example.target is not None]
        if not examples:
            raise DataError(f"split {split.name!r} has no answers to learn; set data.train_split")
        return TextToTextDataset(split, examples, **self.picture_arguments)

    def collator(self) -> TextToTextCollator:
        """Texts to read, and those to be written as labels."""
        return TextToTextCollator(self.tokenizer, self.text_length, self.config.data.padding)

    def check_length(self, longest: int) -> None:
        """As for every task; ``longest`` is of texts to read and to be written together, each of which is cut."""
        super().check_length(min(longest, self.text_length))

    def supervised_items(self, batch: Batch) -> int:
        """The tokens that count."""
        return int((batch["labels"] != IGNORED).sum())

    def made_up_labels(self, ids: torch.Tensor, model: VisionTextForGeneration) -> torch.Tensor:
        """As long as what is generated may become."""
        return ids[:, : self.config.eval.max_new_tokens]

    def predict(self, batch: Batch, num_beams: int) -> Predictions:
        """What is written by the ids of the examples."""
        return dict(zip(batch["ids"], self.write(batch, num_beams), strict=True))

    def single_item(self, *sentences: str) -> dict[str, Any]:
        """An item with the text, or with two one behind the other."""
        return super().single_item() | {"id": 0, "prompt": " ".join(sentences), "target": None}

    def predict_single(self, batch: Batch, num_beams: int, top: int) -> list[dict[str, Any]]:
        """The ``answer`` to each image."""
        return [{"answer": text} for text in self.write(batch, num_beams)]


def first_target(answers: Sequence[str]) -> str | None:
    """The answer given most often, of several the first; None where there is none."""
    return max(answers, key=answers.count) if answers else None
