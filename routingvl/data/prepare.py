"""Derive the files that training reads from the official ones (``routingvl prepare-data``).

The same input gives the same bytes. All files of one call are written, or none.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from routingvl.data.coco import DATASET_FILE, SPLITS, CaptionSplit, caption_file, load_captions
from routingvl.data.files import DataError, collection_paused, write_json_files
from routingvl.data.gqa import load_gqa_file
from routingvl.data.vocabulary import MIN_GQA_QUESTIONS, MIN_QUESTIONS, AnswerVocabulary, soft_scores
from routingvl.data.vqa import Question, answer_entries, by_karpathy_split, join_official

CAPTIONS_MANIFEST = "captions_manifest.json"
VQA_MANIFEST = "vqa_manifest.json"
GQA_MANIFEST = "gqa_manifest.json"


@collection_paused()
def prepare_coco(dataset_coco_json: str | Path, output_dir: str | Path) -> dict[str, Any]:
    """Write one caption file a split from Karpathy's dataset_coco.json (restval goes to train, space is stripped).

    Args:
        dataset_coco_json: the file, from caption_datasets.zip.
        output_dir: folder for the results; made if needed.

    Returns:
        The manifest, also written: inputs with their SHA-256, and the numbers of images and captions of each file.

    Raises:
        DataError: the input is missing, broken or lacks a split; nothing is written then.
    """
    if not Path(dataset_coco_json).is_file():
        raise DataError(f"{dataset_coco_json} is not a file; give {DATASET_FILE} of caption_datasets.zip")
    files: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for name in SPLITS:
        split = load_captions(dataset_coco_json, name)
        if not split.split_in_file:
            raise DataError(f"{dataset_coco_json} names no splits; give {DATASET_FILE} of caption_datasets.zip")
        files[caption_file(name)] = _coco_form(split)
        counts[caption_file(name)] = {"images": len(split.images), "captions": len(split.captions)}
    return _write(output_dir, files, CAPTIONS_MANIFEST, [dataset_coco_json], {"files": counts})


@collection_paused()
def prepare_vqa(
    questions: Sequence[str | Path],
    annotations: Sequence[str | Path],
    dataset_coco_json: str | Path,
    output_dir: str | Path,
    vocabulary: str | Path | None = None,
    min_questions: int = MIN_QUESTIONS,
) -> dict[str, Any]:
    """Write one question list per Karpathy split, and the answer vocabulary, from the official VQAv2 files.

    Entries have the form of LXMERT and VL-T5, with soft scores (``label``) and the annotators' raw ``answers``, from
    which the official accuracy is computed.

    Args:
        questions: the official question files of train2014 and val2014.
        annotations: the annotation files of the same sets.
        dataset_coco_json: Karpathy's file, which assigns images to splits.
        output_dir: folder for the results; made if needed.
        vocabulary: a published trainval_label2ans.json (or ans2label) to use; None derives one from all annotations.
        min_questions: answers of fewer questions are left out of a derived vocabulary.

    Returns:
        The manifest, also written: inputs with their SHA-256; the vocabulary's size, origin and SHA-256; the numbers of
        images, questions and questions without an answer in the vocabulary of each file.

    Raises:
        DataError: an input is missing, broken or does not match another; nothing is written then.
    """
    if not annotations:
        raise DataError("no annotation files were given: the lists need the annotators' answers")
    joined = join_official(questions, annotations)
    if vocabulary is None:
        answers = AnswerVocabulary.derive(joined, min_questions)
        origin = f"derived: answers of at least {min_questions} questions"
    else:
        answers = AnswerVocabulary.load(vocabulary)
        origin = Path(vocabulary).name
    files: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for name, asked in by_karpathy_split(joined, dataset_coco_json).items():
        rows = [_list_entry(question, answers) for question in asked]
        files[f"karpathy_{name}.json"] = rows
        counts[f"karpathy_{name}.json"] = {
            "images": len({row["img_id"] for row in rows}),
            "questions": len(rows),
            "without_known_answer": sum(not row["label"] for row in rows),
        }
    facts = {"files": counts, "vocabulary": {"answers": len(answers), "sha256": answers.sha256, "origin": origin}}
    inputs = [*questions, *annotations, dataset_coco_json]
    return _write(output_dir, files | answers.to_files(), VQA_MANIFEST, inputs, facts)


@collection_paused()
def prepare_gqa(
    questions: Sequence[str | Path], output_dir: str | Path, min_questions: int = MIN_GQA_QUESTIONS
) -> dict[str, Any]:
    """Write the vocabulary of all answers of official GQA question files; the files themselves are read as they are.

    Args:
        questions: question files, such as train_balanced_questions.json and val_balanced_questions.json.
        output_dir: folder for the results; made if needed.
        min_questions: answers of fewer questions are left out.

    Returns:
        The manifest, also written: inputs with their SHA-256, the numbers of questions of each, and the vocabulary's
        size, origin and SHA-256.

    Raises:
        DataError: an input is missing, broken or has no answers, or no answer is frequent enough; nothing is written
            then.
    """
    counts: Counter[str] = Counter()
    sizes: dict[str, Any] = {}
    for path in map(Path, questions):
        found = [question.item.answer for question in load_gqa_file(path) if question.item is not None]
        if not found:
            raise DataError(f"{path} has no answers; give question files of train or val")
        counts.update(found)
        sizes[path.name] = {"questions": len(found)}
    answers = AnswerVocabulary.of_counts(counts, min_questions)
    origin = f"derived: answers of at least {min_questions} questions"
    facts = {"files": sizes, "vocabulary": {"answers": len(answers), "sha256": answers.sha256, "origin": origin}}
    return _write(output_dir, answers.to_files(), GQA_MANIFEST, questions, facts)


def _coco_form(split: CaptionSplit) -> dict[str, Any]:
    return {
        "images": [{"id": image.image_id, "file_name": image.file_name} for image in split.images],
        "annotations": [
            {"id": caption.caption_id, "image_id": caption.image_id, "caption": caption.text}
            for caption in split.captions
        ],
    }


def _list_entry(question: Question, vocabulary: AnswerVocabulary) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "img_id": Path(question.file_name).stem,
        "sent": question.text,
        "question_type": question.question_type,
        "answer_type": question.answer_type,
        "label": soft_scores(question.answers, vocabulary),
        "answers": answer_entries(question.answers),
    }


def _write(
    output_dir: str | Path, files: Mapping[str, Any], manifest_name: str, inputs: Sequence[str | Path], facts: Any
) -> dict[str, Any]:
    """Write ``files`` and, last, a manifest of ``inputs`` (name and SHA-256) and ``facts``; returns the manifest."""
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in inputs]
    listed = [{"file": Path(path).name, "sha256": digest} for path, digest in zip(inputs, digests, strict=True)]
    manifest = {"inputs": listed, **facts}
    write_json_files(output_dir, {**files, manifest_name: manifest})
    return manifest
