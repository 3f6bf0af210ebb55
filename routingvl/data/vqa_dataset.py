"""Questions with their images, and the answers of a vocabulary as soft targets."""

from __future__ import annotations

from typing import Any

from routingvl.data.examples import ExampleDataset
from routingvl.data.files import DataError
from routingvl.data.images import ImageRecord
from routingvl.data.vocabulary import AnswerVocabulary, soft_scores
from routingvl.data.vqa import Question, VQASplit


class VQADataset(ExampleDataset):
    """Questions with their images and soft targets.

    Items are dicts with ``question_id``, ``image_id``, ``question``, ``target`` ({label: score}, perhaps empty; None
    when the split has no answers), ``question_type``, ``answer_type``, ``answers`` (raw strings, or None) and
    ``pixel_values`` float32 [3, H, W] or ``vision_features`` [L, d]. Answers outside the vocabulary are no targets. See
    :class:`~routingvl.data.examples.ExampleDataset` for the arguments not named here.

    Args:
        split: from :func:`load_vqa`.
        vocabulary: the classifier's answers.

    Raises:
        DataError: the split has answers, but the vocabulary holds none of them.
    """

    def __init__(self, split: VQASplit, vocabulary: AnswerVocabulary, *args: Any, **kwargs: Any):
        super().__init__(split, *args, **kwargs)
        self.vocabulary = vocabulary
        self._images = {image.file_name: image for image in split.images}
        labelled = (question for question in split.questions if question.has_answers)
        if (first := next(labelled, None)) and not (self.target(first) or any(map(self.target, labelled))):
            raise DataError(
                f"no answer of split {split.name!r} is in the vocabulary of {len(vocabulary)} answers; "
                "is it of another data set?"
            )

    def target(self, question: Question) -> dict[int, float] | None:
        """Soft scores by label; None when neither the question's label nor its answers are known."""
        if question.label is not None:
            scores = {answer: score for answer, score in question.label.items() if answer in self.vocabulary}
        elif question.answers is not None:
            scores = soft_scores(question.answers, self.vocabulary)
        else:
            return None
        return {self.vocabulary.index[answer]: score for answer, score in scores.items()}

    @property
    def texts(self) -> list[str]:
        """The questions of all items."""
        return [question.text for question in self.split.questions]

    def __len__(self) -> int:
        return len(self.split.questions)

    def image(self, index: int, example: dict[str, Any]) -> ImageRecord:
        """By its file name: two images may end in one number."""
        return self._images[self.split.questions[index].file_name]

    def example(self, index: int) -> dict[str, Any]:
        """An item without its image."""
        question = self.split.questions[index]
        return {
            "question_id": question.question_id,
            "image_id": question.image_id,
            "question": question.text,
            "target": self.target(question),
            "question_type": question.question_type,
            "answer_type": question.answer_type,
            "answers": question.answers,
        }
