"""What tasks share whose model chooses one of several names: the answers of VQA, the labels of classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from routingvl.atomic_files import write_json
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig
from routingvl.data.collate import VQACollator
from routingvl.data.files import DataError
from routingvl.data.labelled import read_labels
from routingvl.data.vocabulary import AnswerVocabulary
from routingvl.data.vqa_dataset import VQADataset
from routingvl.models import VisionTextForClassification, VisionTextForVQA
from routingvl.tasks.base import Batch, Predictions, Split, Task


class ChoiceTask(Task):
    """Choose one of :attr:`choices` by a language model with a head.

    Attributes of the class:
        choices_file: file of the run folder that lists the choices, in the order of the head's outputs.
        kind: what the choices are called, in the singular.
        usual_choices: how many an estimate takes where there are no data.

    Attributes:
        choices: the names to choose from, in order; empty until training data or the run folder's files are read.
    """

    model_class = VisionTextForClassification
    model_settings = ("classifier_layers", "text_embedding")
    text_model = "roberta-base"
    choices_file: ClassVar[str]
    kind: ClassVar[str]
    usual_choices: ClassVar[int] = 2

    choices: Sequence[str] = ()

    def model_options(self) -> dict[str, Any]:
        """The size of the head."""
        return {"num_labels": len(self.choices)}

    def made_up_labels(self, ids: torch.Tensor, model: VisionTextForClassification) -> torch.Tensor:
        """The first choice for all."""
        return torch.zeros(len(ids), dtype=torch.long)

    def decided_by(self) -> dict[str, Any]:
        """Also the choices, in their order."""
        return super().decided_by() | {f"the {self.kind}s to choose from (data.answers)": list(self.choices)}

    def use_model(self, model: VisionTextForClassification) -> None:
        """Take ``model``; ConfigError unless its head has one output per choice."""
        super().use_model(model)
        if model.num_labels != len(self.choices):
            raise ConfigError(f"the model has {model.num_labels} {self.kind}s, the data {len(self.choices)}")

    def supervised_items(self, batch: Batch) -> int:
        """How many entries the labels of ``batch`` have; DataError when it has none."""
        if "labels" not in batch:
            split = self.config.data.train_split
            raise DataError(f"split {split!r} has no {self.kind}s to learn; set data.train_split")
        return batch["labels"].numel()

    def probabilities(self, batch: Batch) -> torch.Tensor:
        """Probability of each choice: float32 [B, choices]."""
        inputs = self.model_inputs(batch, self.model.device)
        inputs.pop("labels", None)
        return self.model.probabilities(self.model(**inputs).logits)

    def predict(self, batch: Batch, num_beams: int) -> Predictions:
        """The likeliest choice of each example."""
        names = (self.choices[number] for number in self.probabilities(batch).argmax(dim=-1).tolist())
        return dict(zip(batch[f"{self.collator().id_key}s"], names, strict=True))

    def single_item(self, *sentences: str) -> dict[str, Any]:
        """An item with one sentence or a pair."""
        collator, text = self.collator(), sentences[0] if len(sentences) == 1 else sentences
        return super().single_item() | {collator.id_key: 0, collator.text_key: text, "target": None}

    def predict_single(self, batch: Batch, num_beams: int, top: int) -> list[dict[str, Any]]:
        """The likeliest choice under the name of :attr:`kind`, and ``probabilities`` of the ``top`` likeliest."""
        best = self.probabilities(batch).topk(min(top, len(self.choices)))
        rows = [
            {self.choices[number]: probability for number, probability in zip(numbers, values, strict=True)}
            for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return [{self.kind: next(iter(row)), "probabilities": row} for row in rows]

    def save_files(self, folder: Path) -> None:
        """Also write the list of choices."""
        super().save_files(folder)
        write_json(folder / self.choices_file, list(self.choices))

    @classmethod
    def from_folder(cls, folder: Path, config: RunConfig) -> ChoiceTask:
        """With the choices of the run."""
        task = super().from_folder(folder, config)
        task.choices = read_labels(folder / cls.choices_file)
        return task


class AnswerTask(ChoiceTask):
    """Choose an answer to a question about an image, each learned as a decision of its own from soft scores."""

    model_class = VisionTextForVQA
    max_text_length = 20
    command = "answer"
    choices_file = "label2ans.json"
    kind = "answer"

    def made_up_labels(self, ids: torch.Tensor, model: VisionTextForVQA) -> torch.Tensor:
        """No answer is right."""
        return torch.zeros(len(ids), model.num_labels)

    @cached_property
    def vocabulary(self) -> AnswerVocabulary:
        """The answers, with their numbers."""
        return AnswerVocabulary(self.choices)

    def dataset(self, split: Split, training: bool) -> VQADataset:
        """One item per question."""
        return VQADataset(split, self.vocabulary, **self.picture_arguments)

    def collator(self) -> VQACollator:
        """Questions, with soft scores as labels."""
        return VQACollator(
            self.tokenizer,
            self.text_length,
            len(self.vocabulary),
            self.config.data.padding,
            token_types=self.model.token_types,
        )


def first_examples(split: Split, part: str, limit: int | None) -> Split:
    """``split`` with the first ``limit`` examples of its attribute ``part``, and their images; None for all."""
    if limit is None:
        return split
    kept = getattr(split, part)[:limit]
    wanted = {image_id for example in kept for image_id in getattr(example, "image_ids", None) or (example.image_id,)}
    return replace(split, **{part: kept}, images=[image for image in split.images if image.image_id in wanted])
