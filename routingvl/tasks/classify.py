"""Classification: choose one of n labels for an image and a text (SNLI-VE, statements that are true or not)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from routingvl.atomic_files import write_text
from routingvl.config.schema import RunConfig
from routingvl.data.collate import LabelCollator
from routingvl.data.files import DataError
from routingvl.data.labelled import LABELS_FILE, LabelledDataset, LabelledSplit, load_labelled, read_labels
from routingvl.metrics.results import in_order
from routingvl.tasks.base import Predictions, register
from routingvl.tasks.choice import ChoiceTask, first_examples


@register
class ClassifyTask(ChoiceTask):
    """Choose one of n labels, by softmax; data in the form of :mod:`routingvl.data.labelled`.

    The labels are those of ``data.answers`` or of labels.json in the annotations folder, a JSON list; without such a
    file they are those of the training split, in alphabetical order.
    """

    name = "classify"
    max_text_length = 64
    choices_file = LABELS_FILE
    kind = "label"

    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> LabelledSplit:
        """Read the examples; ``limit`` counts them. DataError for a label that the model cannot choose."""
        loaded = load_labelled(self.config.data.annotations, split, **self.file_arguments)
        if self.choices:
            loaded.check_labels(self.choices, self.labels_from)
        return first_examples(loaded, "examples", limit)

    def read_training_splits(self) -> tuple[LabelledSplit, LabelledSplit | None]:
        """Also find the labels; DataError when the training split has none, or another split others."""
        train, val = super().read_training_splits()
        if not train.labels:
            raise DataError(f"split {train.name!r} has no labels to learn: give each line one, or set data.train_split")
        data = self.config.data
        listed = Path(data.answers) if data.answers else Path(data.annotations) / LABELS_FILE
        from_file = data.answers is not None or listed.is_file()
        self.choices = read_labels(listed) if from_file else train.labels
        self.labels_from = str(listed) if from_file else f"split {train.name!r}"
        for split in (train, val):
            if split is not None:
                split.check_labels(self.choices, self.labels_from)
        return train, val

    @classmethod
    def from_folder(cls, folder: Path, config: RunConfig) -> ClassifyTask:
        """With the labels of the run."""
        task = super().from_folder(folder, config)
        task.labels_from = str(folder / cls.choices_file)
        return task

    def dataset(self, split: LabelledSplit, training: bool) -> LabelledDataset:
        """One item per example."""
        return LabelledDataset(split, self.choices, **self.picture_arguments)

    def collator(self) -> LabelCollator:
        """Texts, with the numbers of their labels."""
        return LabelCollator(
            self.tokenizer, self.text_length, self.config.data.padding, token_types=self.model.token_types
        )

    def selection_metric(self, split: LabelledSplit) -> str:
        """Accuracy; DataError when the split has no labels."""
        if not split.labels:
            raise DataError(f"split {split.name!r} has no labels to validate with; set data.val_split (null for none)")
        return "accuracy"

    def scores(self, split: LabelledSplit, predictions: Predictions) -> dict[str, Any]:
        """Percent: accuracy, over all and per true label; and how often each true label got which prediction."""
        if not split.labels:
            return {"n": len(predictions), "missing": {"accuracy": f"split {split.name!r} has no labels"}}
        counts = Counter((e.label, predictions[e.id]) for e in split.examples if e.id in predictions)
        confusion = {true: {found: counts[true, found] for found in self.choices} for true in self.choices}
        totals = {true: sum(row.values()) for true, row in confusion.items()}
        right = sum(confusion[label][label] for label in self.choices)
        return {
            "n": len(predictions),
            "accuracy": round(100 * right / max(1, sum(totals.values())), 2),
            "per_label": {true: round(100 * confusion[true][true] / n, 2) for true, n in totals.items() if n},
            "confusion": confusion,
            "missing": {},
        }

    def write_predictions(self, folder: Path, split: str, method: str, predictions: Predictions) -> Path:
        """JSON Lines with ``id`` and ``label``, ordered as the ids."""
        path = folder / f"{split}_{method}_results.jsonl"
        rows = ({"id": i, "label": predictions[i]} for i in in_order(predictions))
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path
