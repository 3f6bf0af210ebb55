"""Caption scores as COCO's evaluation computes them: BLEU-1 to 4, ROUGE-L, CIDEr, METEOR, SPICE.

The first six are pure Python (the scorers of pycocoevalcap on tokenised text) and always there. METEOR and SPICE are
Java programs; one that cannot run is reported as missing, with the reason.

CIDEr weighs words by how many of the images *evaluated* mention them, so its value belongs to the set of images: it is
0 for a set of one image, and values of different subsets do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from routingvl.metrics import java_metrics
from routingvl.metrics.coverage import difference
from routingvl.metrics.ptb import MetricUnavailable, tokenize_captions


def _check(predictions: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> None:
    if not references:
        raise ValueError("no image to score: references is empty")
    if odd := difference(predictions, references, "without a caption", "without references"):
        raise ValueError(f"predictions and references cover different images: {odd}")
    for image_id, texts in references.items():
        if isinstance(texts, str):
            raise TypeError(f"image {image_id}: references must be a list of strings, not the string {texts!r}")
        if not texts:
            raise ValueError(f"image {image_id} has no reference caption; leave it out of the evaluation")


def _tokenize(
    predictions: Mapping[int, str], references: Mapping[int, Sequence[str]], tokenizer: str
) -> tuple[dict[int, str], dict[int, list[str]], str]:
    """Both sides tokenised in one go (Java takes half a second to start), keyed alike, and the tokenizer's name."""
    texts = [text for image_id, group in references.items() for text in (predictions[image_id], *group)]
    tokens, name = tokenize_captions(texts, tokenizer)
    rest = iter(tokens)
    both = {image_id: (next(rest), [next(rest) for _ in group]) for image_id, group in references.items()}
    captions, grouped = ({image_id: pair[side] for image_id, pair in both.items()} for side in (0, 1))
    return captions, grouped, name


Captions = Mapping[int, str]
References = Mapping[int, list[str]]


def _bleu(captions: Captions, references: References) -> tuple[Sequence[float], list[float]]:
    from pycocoevalcap.bleu.bleu import Bleu

    return Bleu(4).compute_score(references, _lists(captions), verbose=0)[0], []


def _rouge(captions: Captions, references: References) -> tuple[Sequence[float], list[float]]:
    from pycocoevalcap.rouge.rouge import Rouge

    return [Rouge().compute_score(references, _lists(captions))[0]], []


def _cider(captions: Captions, references: References) -> tuple[Sequence[float], list[float]]:
    from pycocoevalcap.cider.cider import Cider

    score, per_image = Cider().compute_score(references, _lists(captions))
    return [score], list(map(float, per_image))


def _lists(captions: Captions) -> dict[int, list[str]]:
    return {image_id: [text] for image_id, text in captions.items()}


def _java(program: Callable[..., tuple[float, list[float]]]) -> Callable:
    return lambda captions, references: ([program(captions, references)[0]], [])


# (captions, references), both tokenised and keyed alike -> (scores in the order of the names, scores per image or [])
_SCORERS: dict[tuple[str, ...], Callable] = {
    ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"): _bleu,
    ("ROUGE_L",): _rouge,
    ("CIDEr",): _cider,
    ("METEOR",): _java(java_metrics.meteor),
    ("SPICE",): _java(java_metrics.spice),
}
PYTHON_METRICS = tuple(name for names in list(_SCORERS)[:3] for name in names)
METRICS = tuple(name for names in _SCORERS for name in names)


def caption_scores(
    predictions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    metrics: Iterable[str] | None = None,
    tokenizer: str = "auto",
) -> dict[str, Any]:
    """Score one caption per image against its references.

    Args:
        predictions: {image_id: caption}; one without a word is scored (as 0 or nearly 0), not refused.
        references: {image_id: captions by people}, at least one each, for exactly the images of ``predictions``; one
            without a word counts, as in the official code.
        metrics: names out of :data:`METRICS`; None for all. :data:`PYTHON_METRICS` leaves out the slow Java programs.
        tokenizer: "auto", "ptb" or "python", see :func:`routingvl.metrics.ptb.tokenize_captions`.

    Returns:
        One entry a metric, a float (CIDEr in [0, 10], all others in [0, 1]) or None where it cannot run, and

        - ``missing``: {metric: reason} for those that cannot run or that failed,
        - ``tokenizer``: what made the tokens,
        - ``per_image``: {"CIDEr": {image_id: score}} when CIDEr was asked for,
        - ``n``: the number of images.

    Raises:
        ValueError: images differ between the two sides, an image has no reference, or a metric or tokenizer is unknown.
        MetricUnavailable: tokenizer "ptb" cannot run.
    """
    wanted = METRICS if metrics is None else tuple(metrics)
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown caption metric {unknown[0]!r}; choose from {', '.join(METRICS)}")
    _check(predictions, references)
    captions, grouped, made_by = _tokenize(predictions, references, tokenizer)
    scores: dict[str, float | None] = dict.fromkeys(metric for metric in METRICS if metric in wanted)
    missing: dict[str, str] = {}
    per_image: dict[str, dict[int, float]] = {}
    for names, scorer in _SCORERS.items():
        if not (asked := [name for name in names if name in scores]):
            continue
        try:
            if not any(text for group in grouped.values() for text in group):
                raise MetricUnavailable("no reference caption has a word")
            values, each = scorer(captions, grouped)
        except Exception as error:  # of any scorer, so that it costs no other metric
            reason = str(error) if isinstance(error, MetricUnavailable) else f"{type(error).__name__}: {error}"
            missing |= dict.fromkeys(asked, reason)
            continue
        scores |= {name: float(value) for name, value in zip(names, values, strict=True) if name in asked}
        if each:
            per_image[names[0]] = dict(zip(captions, each, strict=True))
    return {**scores, "missing": missing, "tokenizer": made_by, "per_image": per_image, "n": len(captions)}
