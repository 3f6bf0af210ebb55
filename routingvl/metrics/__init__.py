"""Scores of the published tasks and the files that results are handed in with.

``vqa`` is the official VQA accuracy, ``captions`` BLEU, ROUGE-L, CIDEr, METEOR and SPICE, ``gqa`` and ``nlvr2`` the
scores of their authors' programs, ``results`` the files of all. Nothing here needs torch; the caption scorers load on
first use.
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "vqa_accuracy": "vqa",
    "vqa_report": "vqa",
    "soft_score": "vqa",
    "soft_score_report": "vqa",
    "caption_scores": "captions",
    "tokenize_captions": "ptb",
    "write_coco_results": "results",
    "read_coco_results": "results",
    "write_vqa_results": "results",
    "read_vqa_results": "results",
    "coco_results_name": "results",
    "vqa_results_name": "results",
    "gqa_report": "gqa",
    "write_gqa_results": "results",
    "read_gqa_results": "results",
    "gqa_results_name": "results",
    "nlvr2_report": "nlvr2",
    "write_nlvr2_results": "results",
    "read_nlvr2_results": "results",
    "nlvr2_results_name": "results",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
