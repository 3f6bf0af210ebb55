"""VQAv2 questions and answers: official files with the Karpathy split, or one JSON list per split."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from routingvl.data.coco import DATASET_FILE, SPLITS, image_splits
from routingvl.data.files import (
    DataError,
    ImageFolders,
    check_id,
    check_ids,
    collection_paused,
    one_line,
    read_json,
    required_keys,
    required_list,
)
from routingvl.data.images import ImageRecord

logger = logging.getLogger(__name__)

TRAINVAL = ("train2014", "val2014")
OFFICIAL_SPLITS = (*TRAINVAL, "test2015", "test-dev2015")
LXMERT_SPLITS = ("nominival", "minival")
_TRAILING_NUMBER = re.compile(r"\d{1,18}$", re.ASCII)
_SUBSET = re.compile(r"[a-z]+\d{4}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Question:
    """One question; what its file does not tell is None.

    Attributes:
        question_id: an integer, as COCO's, or a string, as GQA's.
        image_id: COCO's number of the image, or GQA's name; the file name, not this, tells images apart.
        text: the question, on one line.
        answers: the annotators' answers (ten, as a rule), raw.
        label: answer -> soft score, when the file gives it; otherwise it follows from ``answers``.
        top_answer: the official ``multiple_choice_answer``.
        question_type, answer_type: classes of the official report.
        file_name: of its image.
    """

    question_id: int | str
    image_id: int | str
    text: str
    answers: tuple[str, ...] | None = None
    label: Mapping[str, float] | None = None
    top_answer: str | None = None
    question_type: str | None = None
    answer_type: str | None = None
    file_name: str | None = None

    @property
    def has_answers(self) -> bool:
        """Whether it can be learned or scored."""
        return self.label is not None or self.answers is not None


class _Entry(NamedTuple):
    """One entry of an official file, with the image subset (val2014, say) and the path of that file."""

    fields: Mapping[str, Any]
    subset: str
    path: Path


@dataclass(frozen=True)
class VQASplit:
    """The questions of one split, in file order, and the images they ask about, each once.

    Attributes:
        name: as asked for.
        images: in the order in which the questions first name them.
        questions: every question; all have labels or answers, or none has.
        split_in_file: whether the file's name tells which split it is; otherwise it serves any split alike.
    """

    name: str
    images: list[ImageRecord]
    questions: list[Question]
    split_in_file: bool = True

    def example_keys(self) -> Iterator[tuple[Any, ...]]:
        """What makes an example: an image and a question about it."""
        places = {image.file_name: image.path or image.file_name for image in self.images}
        return ((places[question.file_name], question.text) for question in self.questions)

    def annotations(self) -> list[dict[str, Any]]:
        """Entries in the form of the official annotation file, for questions whose annotators' answers are known."""
        return [
            {
                "question_id": question.question_id,
                "image_id": question.image_id,
                "question_type": question.question_type,
                "answer_type": question.answer_type,
                "answers": answer_entries(question.answers),
            }
            for question in self.questions
            if question.answers is not None
        ]


def answer_entries(answers: Iterable[str]) -> list[dict[str, Any]]:
    """Raw answers as the official files list them, ``answer_id`` counting from 1."""
    return [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, start=1)]


def questions_file(subset: str) -> str:
    """Official name of a question file; ``subset`` such as train2014."""
    return f"v2_OpenEnded_mscoco_{subset}_questions.json"


def annotations_file(subset: str) -> str:
    """Official name of an annotation file; ``subset`` such as train2014."""
    return f"v2_mscoco_{subset}_annotations.json"


@collection_paused()
def load_vqa(
    source: str | Path, split: str, image_root: str | Path | None = None, *, allow_symlinks: bool = False
) -> VQASplit:
    """Read one split of VQAv2 from whatever form ``source`` holds it in.

    In a folder, ``train``, ``val`` and ``test`` (or ``karpathy_train`` ...) are the first of these that is there:
    ``karpathy_{split}.json``; the official train2014 and val2014 files, re-split by ``dataset_coco.json``; LXMERT's
    ``{split}.json`` (a log line says so, because its train and test are other sets). ``nominival`` and ``minival`` are
    LXMERT's lists; ``train2014``, ``val2014``, ``test2015``, ``test-dev2015`` are the official files as they are.

    Args:
        source: folder, or one per-split JSON list (``split`` then only names it).
        split: see above.
        image_root: folder with ``Images/val2014/...`` or ``val2014/...``; None when images are not needed.
        allow_symlinks: let symbolic links lead out of ``image_root``.

    Raises:
        DataError: a file, image folder or key is missing or of another form, questions and annotations do not match, an
            id comes twice, or some questions have answers and others none; the message names the file and the question.
    """
    source, images = Path(source), {"image_root": image_root, "allow_symlinks": allow_symlinks}
    if source.is_file():
        return replace(_load_list(source, split, **images), split_in_file=False)
    name, known = split.removeprefix("karpathy_"), (*SPLITS, *LXMERT_SPLITS, *OFFICIAL_SPLITS)
    if name not in known:
        raise DataError(
            f"unknown VQA split {split!r} (data.train_split, data.val_split, --split); known are {', '.join(known)}"
        )
    looked_for: list[Path] = []

    def found(*files: str) -> list[Path]:
        """The paths of these files, if all are there."""
        paths = [source / file for file in files]
        looked_for.extend(paths)
        return paths if all(path.is_file() for path in paths) else []

    if name in OFFICIAL_SPLITS and (questions := found(questions_file(name))):
        annotations = [path for path in (source / annotations_file(name),) if path.is_file()]
        return load_official_vqa(questions, annotations, split=name, **images)
    if name in SPLITS:
        if listed := found(f"karpathy_{name}.json"):
            return _load_list(*listed, split, **images)
        if official := found(*map(questions_file, TRAINVAL), *map(annotations_file, TRAINVAL), DATASET_FILE):
            return load_official_vqa(official[:2], official[2:4], dataset_coco=official[4], split=name, **images)
    if split in (*SPLITS, *LXMERT_SPLITS) and (listed := found(f"{split}.json")):
        if split in SPLITS:
            logger.warning("%s: using LXMERT's list %s, which is not the Karpathy split", split, *listed)
        return _load_list(*listed, split, **images)
    raise DataError(
        f"no questions of split {split!r}; looked for {', '.join(map(str, looked_for))}. `routingvl prepare-data` "
        f"makes karpathy_{{train,val,test}}.json from the official VQAv2 files and {DATASET_FILE}"
    )


@collection_paused()
def load_official_vqa(
    questions: Sequence[str | Path],
    annotations: Sequence[str | Path],
    *,
    dataset_coco: str | Path | None = None,
    split: str | None = None,
    image_root: str | Path | None = None,
    allow_symlinks: bool = False,
) -> VQASplit:
    """Join official question and annotation files, and keep the questions on images of one Karpathy split.

    Args:
        questions: ``v2_OpenEnded_mscoco_*_questions.json`` files, whose questions are joined.
        annotations: ``v2_mscoco_*_annotations.json`` files; none for a test set without answers.
        dataset_coco: Karpathy's file; None keeps every question.
        split: train, val or test with ``dataset_coco``; otherwise only a name.
        image_root, allow_symlinks: as in :func:`load_vqa`.

    Raises:
        DataError: as in :func:`load_vqa`; in particular for a question without annotation (or the other way round) and
            for an image that dataset_coco.json does not know.
    """
    if dataset_coco is not None and split not in SPLITS:
        raise DataError(f"unknown Karpathy split {split!r}; the splits are {', '.join(SPLITS)}")
    joined = join_official(questions, annotations)
    if dataset_coco is not None:
        joined = by_karpathy_split(joined, dataset_coco)[split]
    return _build_split(split or "all", joined, image_root, ", ".join(map(str, questions)), allow_symlinks)


def join_official(questions: Sequence[str | Path], annotations: Sequence[str | Path]) -> list[Question]:
    """Every question of the official files, with its annotation.

    Raises :class:`DataError` as :func:`load_official_vqa` does.
    """
    question_entries = _read_entries(questions, "questions")
    annotation_entries = _read_entries(annotations, "annotations")
    if annotations:
        _check_same_questions(question_entries, annotation_entries, annotations)
    return [_join(identity, entry, annotation_entries.get(identity)) for identity, entry in question_entries.items()]


def by_karpathy_split(joined: Iterable[Question], dataset_coco: str | Path) -> dict[str, list[Question]]:
    """Group questions into train, val and test, by the split of each image."""
    splits = image_splits(dataset_coco)
    grouped: dict[str, list[Question]] = {name: [] for name in SPLITS}
    for question in joined:
        if question.image_id not in splits:
            raise DataError(f"{dataset_coco} has no image {question.image_id} of question {question.question_id}")
        split, file_name = splits[question.image_id]
        if file_name not in (None, question.file_name):
            raise DataError(
                f"{dataset_coco}: image {question.image_id} is {file_name}, but question {question.question_id} asks "
                f"about {question.file_name}; are the files of the same data set?"
            )
        grouped[split].append(question)
    return grouped


def _read_entries(paths: Sequence[str | Path], key: str) -> dict[int | str, _Entry]:
    """Entries of official files by question id; ``key`` names the list of entries in the file."""
    entries: dict[int | str, _Entry] = {}
    for path in map(Path, paths):
        content = read_json(path, kind=dict)
        listed = required_list(content, key, path, f"an official VQAv2 file of {key}")
        with required_keys(path, "file", path.name):
            subset = content["data_subtype"].replace("test-dev", "test")  # test-dev2015 asks about images of test2015
        if not _SUBSET.fullmatch(subset):
            raise DataError(f"{path}: data_subtype {subset!r:.60} is not the name of an image set, such as val2014")
        for position, fields in enumerate(listed):
            with required_keys(path, f"{key} entry number", position):
                identity = check_id(fields["question_id"], path, f"{key} entry number #: question_id", position)
            if identity in entries:
                raise DataError(f"{path}: question {identity} is listed twice")
            entries[identity] = _Entry(fields, subset, path)
    return entries


def _check_same_questions(
    questions: Mapping[int, _Entry], annotations: Mapping[int, _Entry], annotation_files: Sequence[str | Path]
) -> None:
    if missing := questions.keys() - annotations.keys():
        identity = min(missing)
        raise DataError(
            f"{questions[identity].path}: question {identity} (and {len(missing) - 1} more) has no annotation in "
            f"{', '.join(map(str, annotation_files))}; are question and annotation files of the same set?"
        )
    if extra := annotations.keys() - questions.keys():
        identity = min(extra)
        raise DataError(f"{annotations[identity].path}: annotation of question {identity}, which no question file has")


def _join(identity: int | str, entry: _Entry, annotation: _Entry | None) -> Question:
    with required_keys(entry.path, "question", identity):
        image_id = entry.fields["image_id"]
        if isinstance(image_id, bool) or not isinstance(image_id, int) or not 0 <= image_id < 10**18:
            raise DataError(f"{entry.path}: image_id {image_id!r:.60} of question {identity} is not COCO's number")
        file_name = sys.intern(f"COCO_{entry.subset}_{image_id:012d}.jpg")
        text = _question_text(entry.fields["question"], entry.path, identity)
        question = Question(identity, image_id, text, file_name=file_name)
    if annotation is None:
        return question
    if annotation.subset != entry.subset:
        raise DataError(
            f"{annotation.path}: data_subtype {annotation.subset!r} is not that of {entry.path}, {entry.subset!r}"
        )
    with required_keys(annotation.path, "annotation of question", identity):
        if annotation.fields["image_id"] != image_id:
            raise DataError(
                f"{annotation.path}: the annotation of question {identity} is of image "
                f"{annotation.fields['image_id']!r:.60}, but the question asks about image {image_id}"
            )
        return replace(
            question,
            answers=_raw_answers(annotation.fields["answers"], annotation.path, identity),
            top_answer=_text_or_none(annotation.fields, "multiple_choice_answer", annotation.path, identity),
            question_type=_text_or_none(annotation.fields, "question_type", annotation.path, identity),
            answer_type=_text_or_none(annotation.fields, "answer_type", annotation.path, identity),
        )


def _load_list(path: Path, split: str, image_root: str | Path | None, allow_symlinks: bool) -> VQASplit:
    """Read one per-split JSON list in the form of LXMERT, VL-T5 and the published code."""
    questions = []
    for position, fields in enumerate(read_json(path, kind=list)):
        with required_keys(path, "entry number", position):
            identity = check_id(fields["question_id"], path, "entry number #: question_id", position)
            image = fields["img_id"]
            if not isinstance(image, str) or (digits := _TRAILING_NUMBER.search(image)) is None:
                raise DataError(
                    f"{path}: img_id {image!r:.80} of question {identity} must be a name that ends in a number"
                )
            text = _question_text(fields["sent"] if "sent" in fields else fields["question"], path, identity)
            question = Question(
                identity,
                int(digits.group()),
                text,
                answers=_raw_answers(fields["answers"], path, identity) if "answers" in fields else None,
                label=_label(fields["label"], path, identity) if "label" in fields else None,
                question_type=_text_or_none(fields, "question_type", path, identity),
                answer_type=_text_or_none(fields, "answer_type", path, identity),
                file_name=sys.intern(f"{image}.jpg"),
            )
        questions.append(question)
    check_ids((question.question_id for question in questions), path, "question")
    return _build_split(split, questions, image_root, str(path), allow_symlinks)


def _question_text(raw: str, path: Path, question_id: int | str) -> str:
    if not (text := one_line(raw)):
        raise DataError(f"{path}: question {question_id} is empty; remove it from the file")
    return text


def _text_or_none(fields: Mapping[str, Any], key: str, path: Path, question_id: int | str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{path}: {key} of question {question_id} must be a string, not {value!r:.60}")
    return value


def _raw_answers(entries: Any, path: Path, question_id: int | str) -> tuple[str, ...]:
    answers = [entry["answer"] if isinstance(entry, dict) else entry for entry in entries]
    if not isinstance(entries, list) or set(map(type, answers)) != {str}:
        raise DataError(
            f"{path}: answers of question {question_id} must be a list of strings, or of objects with an answer, one "
            f"for each annotator, not {entries!r:.60}"
        )
    # Interned, because a few thousand strings make up millions of answers.
    return tuple(map(sys.intern, answers))


def _label(scores: Mapping[str, Any], path: Path, question_id: int | str) -> dict[str, float]:
    for answer, score in scores.items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise DataError(
                f"{path}: the score of answer {answer!r:.60} to question {question_id} is {score!r:.60}; it must be a "
                "number from 0 to 1"
            )
    return {answer: float(score) for answer, score in scores.items()}


def _build_split(
    name: str, questions: list[Question], image_root: str | Path | None, source: str, allow_symlinks: bool
) -> VQASplit:
    if not questions:
        raise DataError(f"{source}: no questions of split {name!r}")
    folders = ImageFolders(image_root, source, allow_symlinks)
    images: dict[str, ImageRecord] = {}
    first, other = questions[0], None
    for question in questions:
        if question.file_name not in images:
            path = folders.path(question.file_name)
            images[question.file_name] = ImageRecord(question.image_id, question.file_name, path)
        if question.has_answers is not first.has_answers:
            other = other or question
    if other is not None:
        without = other if first.has_answers else first
        raise DataError(
            f"{source}: question {without.question_id} has neither label nor answers while others have; add them, or "
            "remove it"
        )
    return VQASplit(name, list(images.values()), questions)
