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
from routingvl.metrics.ptb import tokenize_captions

PYTHON_METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE_L", "CIDEr")
JAVA_METRICS = ("METEOR", "SPICE")
METRICS = (*PYTHON_METRICS, *JAVA_METRICS)


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
    for image_id, group in grouped.items():
        for i, text in enumerate(group):
            if not text:
                raise ValueError(f"image {image_id}: reference {i} has no word: {references[image_id][i]!r}")
    return captions, grouped, name


def _python_scores(
    wanted: Iterable[str], captions: Mapping[int, str], references: Mapping[int, list[str]]
) -> tuple[dict[str, float], dict[int, float]]:
    """The scores among ``wanted`` that need no Java, and CIDEr of each image (empty unless CIDEr is wanted)."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    hypotheses = {image_id: [text] for image_id, text in captions.items()}
    scores: dict[str, float] = {}
    per_image: dict[int, float] = {}
    wanted = set(wanted)
    if any(name.startswith("BLEU") for name in wanted):
        values, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
        scores.update({f"BLEU-{n}": float(value) for n, value in enumerate(values, start=1)})
    if "ROUGE_L" in wanted:
        scores["ROUGE_L"] = float(Rouge().compute_score(references, hypotheses)[0])
    if "CIDEr" in wanted:
        value, values = Cider().compute_score(references, hypotheses)
        scores["CIDEr"] = float(value)
        per_image = {image_id: float(score) for image_id, score in zip(captions, values, strict=True)}
    return {name: score for name, score in scores.items() if name in wanted}, per_image


def caption_scores(
    predictions: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    metrics: Iterable[str] | None = None,
    tokenizer: str = "auto",
) -> dict[str, Any]:
    """Score one caption per image against its references.

    Args:
        predictions: {image_id: caption}; an empty caption is scored (as 0 or nearly 0), not refused.
        references: {image_id: captions by people}, at least one each, for exactly the images of ``predictions``.
        metrics: names out of :data:`METRICS`; None for all. :data:`PYTHON_METRICS` leaves out the slow Java programs.
        tokenizer: "auto", "ptb" or "python", see :func:`routingvl.metrics.ptb.tokenize_captions`.

    Returns:
        One entry a metric, a float (CIDEr in [0, 10], all others in [0, 1]) or None where it cannot run, and

        - ``missing``: {metric: reason} for those that cannot run,
        - ``tokenizer``: what made the tokens,
        - ``per_image``: {"CIDEr": {image_id: score}} when CIDEr was asked for,
        - ``n``: the number of images.

    Raises:
        ValueError: images differ between the two sides, an image has no reference or one without words, or a metric or
            tokenizer is unknown.
        MetricUnavailable: tokenizer "ptb" cannot run.
    """
    wanted = METRICS if metrics is None else tuple(metrics)
    unknown = [name for name in wanted if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown caption metric {unknown[0]!r}; choose from {', '.join(METRICS)}")
    _check(predictions, references)
    captions, grouped, name = _tokenize(predictions, references, tokenizer)
    scores, per_image = _python_scores(wanted, captions, grouped)
    programs: dict[str, Callable] = {"METEOR": java_metrics.meteor, "SPICE": java_metrics.spice}
    missing: dict[str, str] = {}
    for metric in [metric for metric in wanted if metric in programs]:
        try:
            scores[metric], _ = programs[metric](captions, grouped)
        except java_metrics.MetricUnavailable as error:
            scores[metric], missing[metric] = None, str(error)
    return {
        **{metric: scores[metric] for metric in METRICS if metric in wanted},
        "missing": missing,
        "tokenizer": name,
        "per_image": {"CIDEr": per_image} if "CIDEr" in wanted else {},
        "n": len(captions),
    }
