"""NLVR2: whether a sentence is true of two photographs; accuracy and consistency (arXiv 1811.00491)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from routingvl.config import ConfigError
from routingvl.data.collate import LabelCollator
from routingvl.data.files import DataError
from routingvl.data.nlvr2 import LABELS, NLVR2Dataset, NLVR2Split, load_nlvr2
from routingvl.data.text_to_text import TextExample
from routingvl.metrics import nlvr2_report, nlvr2_results_name, write_nlvr2_results
from routingvl.tasks.base import Predictions, Task, register
from routingvl.tasks.choice import ChoiceTask, first_examples
from routingvl.tasks.writing import GenerateTask


class NLVR2Files(Task):
    """Statements of NLVR2's files, with their scores and result file, however they are judged."""

    images = 2

    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> NLVR2Split:
        """Read the examples; ``limit`` counts them. DataError when they are to train and have no labels."""
        loaded = load_nlvr2(self.config.data.annotations, split, **self.file_arguments)
        if training and not loaded.has_labels:
            raise DataError(f"split {split!r} has no labels to learn: give each line one, or set data.train_split")
        return first_examples(loaded, "examples", limit)

    def selection_metric(self, split: NLVR2Split) -> str:
        """Accuracy; DataError when the split has no labels."""
        if not split.has_labels:
            raise DataError(f"split {split.name!r} has no labels to validate with; set data.val_split (null for none)")
        return "accuracy"

    def scores(self, split: NLVR2Split, predictions: Predictions) -> dict[str, Any]:
        """Percent: accuracy, and consistency over the sentences."""
        labels = {e.identifier: e.label for e in split.examples if e.identifier in predictions}
        if not split.has_labels or not labels:
            reason = f"split {split.name!r} has no labels"
            return {"n": len(predictions), "missing": dict.fromkeys(("accuracy", "consistency"), reason)}
        return nlvr2_report(predictions, labels) | {"missing": {}}

    def write_predictions(self, folder: Path, split: str, method: str, predictions: Predictions) -> Path:
        """Lines ``identifier,True`` or ``identifier,False``, as the authors' program reads them."""
        return write_nlvr2_results(folder / nlvr2_results_name(split, method), predictions)


@register
class NLVR2Task(NLVR2Files, ChoiceTask):
    """Choose between "False" and "True", by softmax, for two images and a sentence.

    The tokens of both images stand in front of the text, the left one's first, and vllora reads them all; routing
    functions of one visual token read their mean.
    """

    name = "nlvr2"
    max_text_length = 64
    choices_file = "labels.json"
    kind = "label"
    choices = LABELS

    def read_training_splits(self) -> tuple[NLVR2Split, NLVR2Split | None]:
        """Also refuse a list of answers, which this task does not have."""
        if self.config.data.answers is not None:
            raise ConfigError(f"data.answers: task {self.name!r} has the labels {' and '.join(LABELS)}; leave it null")
        return super().read_training_splits()

    def dataset(self, split: NLVR2Split, training: bool) -> NLVR2Dataset:
        """One item per example."""
        return NLVR2Dataset(split, **self.picture_arguments)

    def collator(self) -> LabelCollator:
        """Sentences, with the numbers of their labels."""
        return LabelCollator(
            self.tokenizer, self.text_length, self.config.data.padding, token_types=self.model.token_types
        )


@register
class NLVR2GenerateTask(NLVR2Files, GenerateTask):
    """Write "true" or "false" with an encoder-decoder; whatever else it writes is taken for "false"."""

    name = "nlvr2-generate"
    max_text_length = 64

    def examples(self, split: NLVR2Split) -> list[TextExample]:
        """The sentences, each with both images."""
        images = {image.image_id: image for image in split.images}
        return [
            TextExample(e.identifier, e.text, e.label and e.label.lower(), tuple(images[name] for name in e.image_ids))
            for e in split.examples
        ]

    def scores(self, split: NLVR2Split, predictions: Predictions) -> dict[str, Any]:
        """As for labels that are chosen."""
        return super().scores(split, _labels(predictions))

    def write_predictions(self, folder: Path, split: str, method: str, predictions: Predictions) -> Path:
        """As for labels that are chosen."""
        return super().write_predictions(folder, split, method, _labels(predictions))


def _labels(predictions: Predictions) -> dict[str, str]:
    return {i: LABELS[text.strip().lower() == "true"] for i, text in predictions.items()}
