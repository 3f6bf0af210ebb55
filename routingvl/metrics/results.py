"""Result files that evaluation servers and programs take.

COCO captions, EvalAI's VQA and GQA have a JSON list with one entry per item:
``[{"image_id": 74, "caption": "a dog on a rug"}]``, ``[{"question_id": 458752000, "answer": "net"}]`` and
``[{"questionId": "07333408", "prediction": "pipe"}]``. NLVR2 has lines ``dev-850-0-0,True``. Writers check
completeness when told what is expected, since servers refuse files that lack an item; readers refuse duplicates. Ids
are integers in COCO and VQA; other data sets have strings, which are written and read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from routingvl.atomic_files import write_text
from routingvl.json_files import read_json, read_text
from routingvl.metrics.coverage import difference

Id = int | str


class ResultFileError(ValueError):
    """A result file, or what should become one, is not in the form that servers take."""


def coco_results_name(split: str, algorithm: str) -> str:
    """File name of COCO caption results, such as ``captions_val2014_routed_results.json``."""
    return f"captions_{split}_{algorithm}_results.json"


def vqa_results_name(subtype: str, method: str) -> str:
    """File name of VQA results, such as ``v2_OpenEnded_mscoco_test2015_routed_results.json``."""
    return f"v2_OpenEnded_mscoco_{subtype}_{method}_results.json"


def gqa_results_name(split: str, method: str) -> str:
    """File name of GQA predictions, such as ``gqa_testdev_routed_results.json``; their program takes any name."""
    return f"gqa_{split}_{method}_results.json"


def nlvr2_results_name(split: str, method: str) -> str:
    """File name of NLVR2 predictions, such as ``nlvr2_test1_routed_results.csv``; their program takes any name."""
    return f"nlvr2_{split}_{method}_results.csv"


def _is_id(item: object) -> bool:
    return isinstance(item, int | str) and not isinstance(item, bool) and item != ""


def in_order(ids: Iterable[Id]) -> list[Id]:
    """Integers by size, then strings."""
    return sorted(ids, key=lambda item: (isinstance(item, str), item))


def _check_complete(ids: Iterable[Id], expected: Iterable[Id] | None, kind: str) -> None:
    ids = set(ids)
    if wrong := [item for item in ids if not _is_id(item)]:
        raise ResultFileError(f"{kind} must be an integer or a string, not {wrong[0]!r}")
    if expected is None:
        return
    if odd := difference(ids, expected, f"{kind}s have no result", "do not belong to it"):
        raise ResultFileError(f"the results do not cover the split: {odd}")


def _read_results(path: str | Path, id_key: str, text_key: str) -> dict[Id, str]:
    data = read_json(path, ResultFileError)
    if isinstance(data, dict) and isinstance(data.get("pred_sent"), list):
        data = data["pred_sent"]  # the form that the published code writes
    if not isinstance(data, list):
        raise ResultFileError(f"{path} must hold a JSON list with one object per item")
    results: dict[Id, str] = {}
    for i, row in enumerate(data):
        if not isinstance(row, dict) or id_key not in row or not isinstance(row.get(text_key), str):
            raise ResultFileError(f"{path}, entry {i}: needs {id_key!r} and a string {text_key!r}, got {row!r}")
        if not _is_id(item := row[id_key]):
            raise ResultFileError(f"{path}, entry {i}: {id_key} {item!r} is neither an integer nor a string")
        if item in results:
            raise ResultFileError(f"{path}, entry {i}: {id_key} {item} comes twice; keep one result an item")
        results[item] = row[text_key]
    return results


def _write_results(
    path: str | Path, results: Mapping[Id, str], expected: Iterable[Id] | None, id_key: str, text_key: str
) -> Path:
    _check_complete(results, expected, id_key)
    path = Path(path)
    write_text(path, json.dumps([{id_key: i, text_key: results[i]} for i in in_order(results)], ensure_ascii=False))
    return path


def write_coco_results(path: str | Path, captions: Mapping[Id, str], expected: Iterable[Id] | None = None) -> Path:
    """Write captions in COCO's form, ordered by image id; a reader finds the old file or the whole new one.

    Args:
        path: where to; :func:`coco_results_name` gives the name that servers expect.
        captions: {image_id: caption}.
        expected: ids of all images of the split, to check that none is missing and none foreign.

    Raises:
        ResultFileError: an id is neither an integer nor a string, or the ids are not the expected ones; nothing is
            written.
    """
    return _write_results(path, captions, expected, "image_id", "caption")


def write_vqa_results(path: str | Path, answers: Mapping[Id, str], expected: Iterable[Id] | None = None) -> Path:
    """As :func:`write_coco_results`, answers {question_id: answer} in EvalAI's form.

    EvalAI wants an answer to every question of test2015, for its test-dev phase too.
    """
    return _write_results(path, answers, expected, "question_id", "answer")


def write_gqa_results(path: str | Path, answers: Mapping[str, str], expected: Iterable[Id] | None = None) -> Path:
    """As :func:`write_coco_results`, answers {question id: answer} in the form of GQA's server and program."""
    return _write_results(path, answers, expected, "questionId", "prediction")


def write_nlvr2_results(path: str | Path, labels: Mapping[str, str], expected: Iterable[Id] | None = None) -> Path:
    """As :func:`write_coco_results`, labels {identifier: "True" or "False"}, a line ``identifier,label`` for each."""
    _check_complete(labels, expected, "identifier")
    path = Path(path)
    write_text(path, "".join(f"{identifier},{labels[identifier]}\n" for identifier in in_order(labels)))
    return path


def read_coco_results(path: str | Path) -> dict[Id, str]:
    """Captions {image_id: caption} of a COCO result file, or of the published code's ``{"pred_sent": [...]}``.

    Raises:
        ResultFileError: there is no such file, it is of another form, or an image comes twice; the message names the
            file and the entry.
    """
    return _read_results(path, "image_id", "caption")


def read_vqa_results(path: str | Path) -> dict[Id, str]:
    """Answers {question_id: answer} of an EvalAI result file; raises as :func:`read_coco_results` does."""
    return _read_results(path, "question_id", "answer")


def read_gqa_results(path: str | Path) -> dict[Id, str]:
    """Answers {question id: answer} of a file of GQA predictions; raises as :func:`read_coco_results` does."""
    return _read_results(path, "questionId", "prediction")


def read_nlvr2_results(path: str | Path) -> dict[str, str]:
    """Labels {identifier: label} of a file of NLVR2 predictions.

    Raises:
        ResultFileError: there is no such file, a line has another form, or an identifier comes twice.
    """
    results: dict[str, str] = {}
    for number, line in enumerate(read_text(path, ResultFileError).split("\n"), start=1):
        if not line.strip():
            continue
        identifier, comma, label = map(str.strip, line.partition(","))
        if not identifier or not comma or label.lower() not in ("true", "false"):
            raise ResultFileError(f"{path}, line {number}: needs identifier,True or identifier,False, got {line!r:.80}")
        if identifier in results:
            raise ResultFileError(f"{path}, line {number}: {identifier} comes twice; keep one result an item")
        results[identifier] = label
    return results
