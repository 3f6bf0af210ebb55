"""GQA: questions about an image with one right answer, in the official files.

    {"07333408": {"imageId": "2375429", "question": "What is on the white wall?", "answer": "pipe", "types": {...}}}

docs/data.md says which files and keys are read.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routingvl.data.files import DataError, ImageFolders, collection_paused, one_line, read_json, required_keys
from routingvl.data.images import ImageRecord
from routingvl.data.vocabulary import AnswerVocabulary
from routingvl.data.vqa import Question
from routingvl.metrics.gqa import GQAItem, gqa_item

BALANCED = "_balanced"


@dataclass(frozen=True, slots=True)
class GQAQuestion(Question):
    """One question; ``item`` is what its scores depend on, None in a test set."""

    item: GQAItem | None = None


@dataclass(frozen=True)
class GQASplit:
    """The questions of one split, in file order, and the images they ask about, each once.

    Attributes:
        name: as asked for.
        images: in the order in which the questions first name them.
        questions: every question; all have an answer, or none has.
        answers: every answer of the file, by falling count, then by the alphabet; empty where none is known.
        choices: where the official file of valid and plausible answers would be.
    """

    name: str
    images: list[ImageRecord]
    questions: list[GQAQuestion]
    answers: tuple[str, ...]
    choices: Path

    def example_keys(self) -> Iterator[tuple[Any, ...]]:
        """What makes an example: an image and a question about it."""
        return ((question.image_id, question.text) for question in self.questions)


@collection_paused()
def load_gqa(
    folder: str | Path, split: str, image_root: str | Path | None = None, *, allow_symlinks: bool = False
) -> GQASplit:
    """Read one split.

    Args:
        folder: holds ``{split}_questions.json``, the folder ``{split}_questions`` of parts (train_all), or
            ``{split}_balanced_questions.json``, looked for in this order: "train" is train_balanced_questions.json.
        split: train, val, testdev, test, challenge, or with _all or _balanced at its end.
        image_root: folder of the images, ``{imageId}.jpg``; None when they are not needed.
        allow_symlinks: let symbolic links lead out of ``image_root``.

    Raises:
        DataError: a file is missing, empty or of another form, some questions have an answer and others not, or an id
            comes twice. The message names file and question.
    """
    files = question_files(Path(folder), split)
    folders, images = ImageFolders(image_root, files[0], allow_symlinks), {}
    questions: dict[str, GQAQuestion] = {}
    unanswered: dict[str, Path] = {}
    counts: Counter[str] = Counter()
    for path in files:
        for question in load_gqa_file(path):
            if question.question_id in questions:
                raise DataError(f"{path}: question {question.question_id} is listed twice, in another part too")
            questions[question.question_id] = question
            if question.file_name not in images:
                place = folders.path(question.file_name)
                images[question.file_name] = ImageRecord(question.image_id, question.file_name, place)
            if question.item is not None:
                counts[question.item.answer] += 1
            elif not unanswered:
                unanswered[question.question_id] = path
    if not questions:
        raise DataError(f"{files[0]} has no questions")
    if 0 < counts.total() < len(questions):
        without, path = next(iter(unanswered.items()))
        raise DataError(f"{path}: question {without} has no answer while others have; add it, or remove the question")
    answers = AnswerVocabulary.of_counts(counts).answers if counts else ()
    choices = Path(folder) / f"{split.partition('_')[0]}_choices.json"
    return GQASplit(split, list(images.values()), list(questions.values()), answers, choices)


def load_gqa_file(path: Path) -> list[GQAQuestion]:
    """The questions of one official file; DataError, which names file and question, for one of another form."""
    questions, labels = [], {}
    for identity, fields in read_json(path, kind=dict).items():
        with required_keys(path, "question", identity):
            questions.append(_question(identity, fields, path, labels))
    return questions


def question_files(folder: Path, split: str) -> list[Path]:
    """The files of a split, its parts in the order of their numbers; DataError when there are none or a part lacks."""
    whole, parts = folder / f"{split}_questions.json", folder / f"{split}_questions"
    balanced = folder / f"{split}{BALANCED}_questions.json"
    if whole.is_file():
        return [whole]
    if parts.is_dir():
        found = list(parts.glob(f"{parts.name}_*.json"))
        files = [parts / f"{parts.name}_{number}.json" for number in range(len(found))]
        if not found or set(files) != set(found):
            raise DataError(
                f"{parts} must hold the parts {parts.name}_0.json, {parts.name}_1.json ... without a gap; "
                f"it has {', '.join(sorted(file.name for file in found)) or 'none'}"
            )
        return files
    if balanced.is_file():
        return [balanced]
    raise DataError(
        f"no questions of split {split!r}; looked for {whole}, {parts}/ and {balanced}: data.annotations must be the "
        "folder with GQA's question files"
    )


def _question(
    identity: str, fields: Mapping[str, Any], path: Path, labels: dict[str, Mapping[str, float]]
) -> GQAQuestion:
    image, raw = fields["imageId"], fields["question"]
    if not isinstance(image, str) or not image or "/" in image:
        raise DataError(
            f"{path}: imageId {image!r:.60} of question {identity} must be the name of an image without .jpg"
        )
    if not isinstance(raw, str) or not (text := one_line(raw)):
        raise DataError(f"{path}: question {identity} must be a text that is not empty, not {raw!r:.60}")
    image = sys.intern(image)
    place = {"image_id": image, "text": text, "file_name": sys.intern(f"{image}.jpg")}
    if "answer" not in fields:
        return GQAQuestion(identity, **place)
    item = gqa_item(fields)
    if not item.answer.strip():
        raise DataError(f"{path}: the answer of question {identity} is empty; remove the question")
    # A few thousand strings make up millions of answers and types.
    few = {name: sys.intern(getattr(item, name)) for name in ("answer", "structural", "semantic", "detailed")}
    label = labels.setdefault(item.answer, {few["answer"]: 1.0})
    kinds = {"question_type": few["structural"], "answer_type": few["semantic"]}
    return GQAQuestion(identity, **place, label=label, **kinds, item=item._replace(**few))


def read_choices(path: Path) -> dict[str, dict[str, list[str]]] | None:
    """The official file of valid and plausible answers, {question id: {"valid": ..., "plausible": ...}}; None for none.

    Raises :class:`DataError` when it is of another form.
    """
    if not path.is_file():
        return None
    content = read_json(path, kind=dict)
    for identity, lists in content.items():
        with required_keys(path, "question", identity):
            if not all(isinstance(lists[kind], list) for kind in ("valid", "plausible")):
                raise DataError(f"{path}: valid and plausible of question {identity} must be lists of answers")
    return content
