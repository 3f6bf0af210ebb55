"""NLVR2's two scores, by the rules of its authors' program (lil-lab/nlvr, nlvr2/eval/metrics.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from routingvl.metrics.coverage import difference


def nlvr2_report(predictions: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, Any]:
    """Accuracy and consistency in percent, rounded to 2 decimals.

    A sentence was written about several pairs of images; consistency is the share of sentences that are judged rightly
    on every pair of theirs among ``labels``. Letter case does not count.

    Args:
        predictions: {identifier: "True" or "False"}, one for every label.
        labels: {identifier: "True" or "False"}; an identifier is SPLIT-SET-PAIR-SENTENCE.

    Returns:
        ``accuracy``, ``consistency``, ``n`` (examples) and ``sentences``.

    Raises:
        ValueError: there is nothing to score, or predictions and labels are of different examples.
    """
    if not labels:
        raise ValueError("no example to score: labels is empty")
    if odd := difference(predictions, labels, "without a prediction", "without a label"):
        raise ValueError(f"predictions and labels cover different examples: {odd}")
    consistent: dict[tuple[str, ...], bool] = {}
    count = 0
    for identifier, label in labels.items():
        right = predictions[identifier].lower() == label.lower()
        count += right
        split, image_set, _, *sentence = identifier.split("-")
        key = (split, image_set, *sentence)
        consistent[key] = consistent.get(key, True) and right
    return {
        "accuracy": round(100 * count / len(labels), 2),
        "consistency": round(100 * sum(consistent.values()) / len(consistent), 2),
        "n": len(labels),
        "sentences": len(consistent),
    }
