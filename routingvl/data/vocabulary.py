"""The answers that the VQA classifier chooses from, and the soft scores that it learns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from routingvl.data.files import DataError, read_json, write_json_files
from routingvl.data.vqa import Question
from routingvl.metrics.answers import normalize_answer

LABEL2ANS_FILE = "trainval_label2ans.json"
ANS2LABEL_FILE = "trainval_ans2label.json"
MIN_QUESTIONS, MIN_GQA_QUESTIONS = 9, 1
# Score of an answer that 0, 1, 2, 3 annotators gave; 1 from four on. The official accuracy with ten annotators.
_SCORES = (0.0, 0.3, 0.6, 0.9)


@dataclass(frozen=True)
class AnswerVocabulary:
    """Label -> answer, in label order.

    Attributes:
        answers: the answer of each label.

    Raises:
        DataError: there is no answer, or one occurs twice.
    """

    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "answers", tuple(self.answers))
        if not self.answers:
            raise DataError("an answer vocabulary needs at least one answer")
        if len(self.index) != len(self.answers):
            twice = next(answer for label, answer in enumerate(self.answers) if self.index[answer] != label)
            raise DataError(f"answer {twice!r} has more than one label")

    @cached_property
    def index(self) -> dict[str, int]:
        """Answer -> label."""
        return {answer: label for label, answer in enumerate(self.answers)}

    @cached_property
    def sha256(self) -> str:
        """Identity of the labels and their order: SHA-256 of the answers as compact JSON."""
        return hashlib.sha256(json.dumps(self.answers, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.answers)

    def __contains__(self, answer: object) -> bool:
        return answer in self.index

    @classmethod
    def load(cls, path: str | Path) -> AnswerVocabulary:
        """Read trainval_label2ans.json (a list) or trainval_ans2label.json (answer -> label).

        For a folder both names are tried in this order. Raises :class:`DataError` when a file is missing, of another
        form, or has gaps in its labels.
        """
        path = Path(path)
        if path.is_dir():
            present = [path / name for name in (LABEL2ANS_FILE, ANS2LABEL_FILE) if (path / name).is_file()]
            path = present[0] if present else path / LABEL2ANS_FILE
        content = read_json(path, fix="take the published file, or make one with `routingvl prepare-data`")
        if isinstance(content, Mapping):
            numbers = list(content.values())
            if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
                raise DataError(f"{path}: labels are not 0 to {len(content) - 1}, each once")
            content = sorted(content, key=content.__getitem__)
        if not isinstance(content, list) or not all(isinstance(answer, str) for answer in content):
            raise DataError(f"{path} is neither a list of answers nor a mapping of answers to labels")
        try:
            return cls(tuple(content))
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def find(cls, path: str | Path | None, folder: str | Path) -> AnswerVocabulary | None:
        """That of the file ``path`` or, without one, of a file in ``folder``; None when there is none."""
        present = any((Path(folder) / name).is_file() for name in (LABEL2ANS_FILE, ANS2LABEL_FILE))
        return cls.load(path or folder) if path or present else None

    @classmethod
    def derive(cls, questions: Iterable[Question], min_questions: int = MIN_QUESTIONS) -> AnswerVocabulary:
        """Take the answers that are the official answer of at least ``min_questions`` distinct questions.

        Answers are normalised as in the official evaluation and lose their commas. Labels go by falling count, then
        by the alphabet, so that they do not depend on the order of the questions; LXMERT's published file has another
        (arbitrary) order, so use that file with a head trained on it.

        Raises :class:`DataError` when no answer is frequent enough, or ``min_questions`` is below 1.
        """
        asked: dict[str, set[int | str]] = {}
        for question in questions:
            if question.top_answer is not None:
                answer = normalize_answer(question.top_answer).replace(",", "")
                asked.setdefault(answer, set()).add(question.question_id)
        return cls.of_counts({answer: len(ids) for answer, ids in asked.items()}, min_questions)

    @classmethod
    def of_counts(cls, counts: Mapping[str, int], min_questions: int = 1) -> AnswerVocabulary:
        """The answers with that many questions, by falling number of theirs, then by the alphabet.

        Raises :class:`DataError` as :meth:`derive` does.
        """
        if min_questions < 1:
            raise DataError(f"min_questions={min_questions} must be at least 1")
        kept = [answer for answer, count in counts.items() if count >= min_questions]
        if not kept:
            raise DataError(
                f"no answer belongs to at least {min_questions} questions; lower min_questions or give a vocabulary"
            )
        return cls(tuple(sorted(kept, key=lambda answer: (-counts[answer], answer))))

    def to_files(self) -> dict[str, Any]:
        """Contents of the two public files, by name."""
        return {LABEL2ANS_FILE: list(self.answers), ANS2LABEL_FILE: self.index}

    def save(self, folder: str | Path) -> None:
        """Write both public files into ``folder``."""
        write_json_files(folder, self.to_files())


def soft_scores(answers: Iterable[str], vocabulary: Container[str]) -> dict[str, float]:
    """Score of each annotators' answer in ``vocabulary``: 0.3, 0.6, 0.9 for one, two, three annotators, then 1.

    Raw strings are counted, without normalisation, as LXMERT, VL-T5 and the published code do; a score can therefore
    be below the official accuracy of the same answer. The order is that of first mention.
    """
    counts: dict[str, int] = {}
    for answer in answers:
        if answer in vocabulary:
            counts[answer] = counts.get(answer, 0) + 1
    return {answer: _SCORES[count] if count < len(_SCORES) else 1.0 for answer, count in counts.items()}
