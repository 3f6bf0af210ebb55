"""VQA: choose an answer to a question about an image, or write it; the official accuracy (arXiv 2403.09377, VQAv2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from routingvl.data.files import DataError
from routingvl.data.text_to_text import TextExample
from routingvl.data.vocabulary import AnswerVocabulary, soft_scores
from routingvl.data.vqa import Question, VQASplit, load_vqa
from routingvl.data.vqa_dataset import VQADataset
from routingvl.metrics import soft_score_report, vqa_report, vqa_results_name, write_vqa_results
from routingvl.tasks.base import Task, register
from routingvl.tasks.choice import AnswerTask, first_examples
from routingvl.tasks.writing import GenerateTask, first_target


class VQAFiles(Task):
    """Questions of VQAv2's forms, with their scores and result file, however an answer is found."""

    def load_split(self, split: str, limit: int | None = None, training: bool = False) -> VQASplit:
        """Read questions and answers; ``limit`` counts questions."""
        loaded = load_vqa(self.config.data.annotations, split, **self.file_arguments)
        return first_examples(loaded, "questions", limit)

    def soft_labels(self, question: Question) -> dict[str, float]:
        """Soft scores of annotators' answers, where the file gives none."""
        return soft_scores(question.answers or (), question.answers or ())

    def selection_metric(self, split: VQASplit) -> str:
        """The official accuracy where annotators' answers are known; DataError when the split has no answers."""
        if not split.questions[0].has_answers:
            raise DataError(f"split {split.name!r} has no answers to validate with; set data.val_split (null for none)")
        return "accuracy" if split.annotations() else "soft_score"

    def scores(self, split: VQASplit, predictions: Mapping[int, str]) -> dict[str, Any]:
        """Percent: official accuracy, by type too, where annotators' answers are known; soft score where labels are."""
        annotations = [
            entry | {key: entry[key] or "unknown" for key in ("answer_type", "question_type")}
            for entry in split.annotations()
            if entry["question_id"] in predictions
        ]
        labels = {
            question.question_id: question.label or self.soft_labels(question)
            for question in split.questions
            if question.question_id in predictions and (question.label is not None or question.answers is not None)
        }
        scores: dict[str, Any] = {"n": len(predictions)}
        if annotations:
            known = {entry["question_id"]: predictions[entry["question_id"]] for entry in annotations}
            report = vqa_report(known, annotations, rule=self.config.eval.vqa_rule)
            scores |= {"accuracy": report.pop("overall")} | report
        if labels:
            scores |= {"soft_score": soft_score_report({i: predictions[i] for i in labels}, labels)["soft_score"]}
        unknown = [name for name, known in (("accuracy", annotations), ("soft_score", labels)) if not known]
        return scores | {"missing": dict.fromkeys(unknown, f"split {split.name!r} has no answers")}

    def write_predictions(self, folder: Path, split: str, method: str, predictions: Mapping[int, str]) -> Path:
        """Answers in EvalAI's form, under its name."""
        return write_vqa_results(folder / vqa_results_name(split, method), predictions)


@register
class VQATask(VQAFiles, AnswerTask):
    """Choose one of the answers of a vocabulary, each learned as a decision of its own from soft scores."""

    name = "vqa"
    usual_choices = 3129  # of the published vocabulary

    def read_training_splits(self) -> tuple[VQASplit, VQASplit | None]:
        """Also read the answers, from ``data.answers`` or the annotations folder."""
        self.choices = AnswerVocabulary.load(self.config.data.answers or self.config.data.annotations).answers
        return super().read_training_splits()

    def soft_labels(self, question: Question) -> dict[str, float]:
        """Of the answers of the vocabulary."""
        return soft_scores(question.answers or (), self.vocabulary)

    def dataset(self, split: VQASplit, training: bool) -> VQADataset:
        """One item per question; DataError when there is nothing to learn."""
        if training and not split.questions[0].has_answers:
            raise DataError(f"split {split.name!r} has no answers to learn; set data.train_split")
        return super().dataset(split, training)


@register
class VQAGenerateTask(VQAFiles, GenerateTask):
    """Write an answer to a question with an encoder-decoder; no answer is out of its reach.

    What is learned is the answer of the highest soft score; where there are no scores, the official one, else the one
    that most annotators gave.
    """

    name = "vqa-generate"

    def examples(self, split: VQASplit) -> list[TextExample]:
        """The questions, with one answer each."""
        images = {image.file_name: image for image in split.images}
        return [TextExample(q.question_id, q.text, _best_answer(q), (images[q.file_name],)) for q in split.questions]


def _best_answer(question: Question) -> str | None:
    if question.label:
        return max(question.label, key=question.label.get)
    return question.top_answer or first_target(question.answers or ())
