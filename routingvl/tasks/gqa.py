"""GQA: choose or write an answer to a question about an image; its authors' scores (arXiv 1902.09506)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routingvl.data.files import DataError
from routingvl.data.gqa import GQASplit, load_gqa, read_choices
from routingvl.data.text_to_text import TextExample
from routingvl.data.vocabulary import AnswerVocabulary
from routingvl.metrics import gqa_report, gqa_results_name, write_gqa_results
from routingvl.tasks.base import Predictions, Task, register
from routingvl.tasks.choice import AnswerTask, first_examples
from routingvl.tasks.writing import GenerateTask


class GQAFiles(Task):
    """Questions of GQA's files, with their scores and result file, however an answer is found."""

    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> GQASplit:
        """Read questions and answers; ``limit`` counts questions."""
        return first_examples(load_gqa(self.config.data.annotations, split, **self.file_arguments), "questions", limit)

    def selection_metric(self, split: GQASplit) -> str:
        """Accuracy; DataError when the split has no answers, or no balanced question."""
        if not any(question.item is not None and question.item.balanced for question in split.questions):
            raise DataError(
                f"split {split.name!r} has no balanced questions with answers to validate with; set data.val_split "
                "(null for none)"
            )
        return "accuracy"

    def validation_scores(self, predictions: Predictions) -> dict[str, float]:
        """Without those that need the file of choices."""
        scores = self.report(self.val_set.split, predictions)
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    def scores(self, split: GQASplit, predictions: Predictions) -> dict[str, Any]:
        """Percent: accuracy and its parts, distribution, and consistency, validity, plausibility where they can be."""
        try:
            return self.report(split, predictions, read_choices(split.choices))
        except DataError as error:
            report = self.report(split, predictions)
            return report | {"missing": report["missing"] | dict.fromkeys(("validity", "plausibility"), str(error))}

    def report(
        self, split: GQASplit, predictions: Predictions, choices: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """See :func:`routingvl.metrics.gqa.gqa_report`."""
        items = {q.question_id: q.item for q in split.questions if q.item is not None and q.question_id in predictions}
        if not any(item.balanced for item in items.values()):
            reason = f"split {split.name!r} has no balanced questions with answers"
            return {"n": len(predictions), "missing": {"accuracy": reason}}
        return {"n": len(predictions)} | gqa_report({i: predictions[i] for i in items}, items, choices)

    def write_predictions(self, folder: Path, split: str, method: str, predictions: Predictions) -> Path:
        """Answers in the form of GQA's server."""
        return write_gqa_results(folder / gqa_results_name(split, method), predictions)


@register
class GQATask(GQAFiles, AnswerTask):
    """Choose one of the answers of a vocabulary, each learned as a decision of its own; one of them is right.

    The answers are those of ``data.answers`` or of trainval_label2ans.json in the annotations folder; without such a
    file they are all answers of the training split.
    """

    name = "gqa"
    usual_choices = 1842  # answers of train and val, as LXMERT lists them

    def read_training_splits(self) -> tuple[GQASplit, GQASplit | None]:
        """Also find the answers."""
        data = self.config.data
        listed = AnswerVocabulary.find(data.answers, data.annotations)
        train, val = super().read_training_splits()
        if not train.answers:
            raise DataError(f"split {train.name!r} has no answers to learn; set data.train_split")
        self.choices = train.answers if listed is None else listed.answers
        return train, val


@register
class GQAGenerateTask(GQAFiles, GenerateTask):
    """Write the answer to a question with an encoder-decoder; it is right when it is the same text."""

    name = "gqa-generate"

    def examples(self, split: GQASplit) -> list[TextExample]:
        """The questions, with their answers."""
        images = {image.file_name: image for image in split.images}
        answers = {q.question_id: q.item.answer for q in split.questions if q.item is not None}
        return [
            TextExample(q.question_id, q.text, answers.get(q.question_id), (images[q.file_name],))
            for q in split.questions
        ]
