"""GQA's scores, by the rules of its authors' program (eval.py of gqadataset.org), but for grounding.

Everything is counted over the balanced questions, and an answer is right when it is the same string.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from routingvl.metrics.coverage import difference

# The group of answers to "what do the two have in common", of which the lists of valid answers say something else.
COMMON_ANSWERS = ("color", "material", "shape")
_NO_STEPS = ("exist", "query: name", "choose name")  # operations that do not count as steps of reasoning
_CHOICES = {"validity": "valid", "plausibility": "plausible"}  # score -> its list in the file of choices


class GQAItem(NamedTuple):
    """What of a question the scores depend on.

    Attributes:
        answer: the right one.
        balanced: whether it is of the balanced set.
        structural, semantic, detailed: its types.
        words: of the question.
        steps: of reasoning; None where the file does not tell them.
        group: of questions whose answers are compared as a distribution; None for none.
        entailed: ids of the questions whose answers follow from this one's.
    """

    answer: str
    balanced: bool
    structural: str
    semantic: str
    detailed: str
    words: int
    steps: int | None
    group: str | None
    entailed: tuple[str, ...]


def gqa_item(entry: Mapping[str, Any]) -> GQAItem:
    """The item of an entry of an official question file.

    Raises KeyError or TypeError when something is missing (answer, question, types) or of another form.
    """
    kinds, group = entry["types"], (entry.get("groups") or {}).get("global") or None
    texts = (entry["answer"], entry["question"], kinds["structural"], kinds["semantic"], kinds.get("detailed") or "")
    entailed, operations, balanced = entry.get("entailed") or [], entry.get("semantic"), entry.get("isBalanced", True)
    if not isinstance(entailed, list) or not all(isinstance(text, str) for text in (*texts, *entailed, group or "")):
        raise TypeError("answer, question and types must be strings, entailed a list of question ids")
    if not isinstance(balanced, bool):
        raise TypeError(f"isBalanced must be true or false, not {balanced!r:.60}")
    answer, question, *kinds = texts
    return GQAItem(answer, balanced, *kinds, len(question.split()), _steps(operations), group, tuple(entailed))


def _steps(operations: Sequence[Mapping[str, Any]] | None) -> int | None:
    if operations is None:
        return None
    named = [f"{step['operation']}: {step['argument']}" for step in operations]
    return sum(not any(part in name for part in _NO_STEPS) for name in named)


def gqa_report(
    predictions: Mapping[str, str],
    items: Mapping[str, GQAItem],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
) -> dict[str, Any]:
    """The scores in percent, rounded to 2 decimals.

    Args:
        predictions: {question id: answer}, one for every item.
        items: {question id: what :func:`gqa_item` made of its entry}, balanced ones among them.
        choices: {question id: {"valid": answers, "plausible": answers}}, the official file of choices; None where it is
            not there.

    Returns:
        ``accuracy``, ``open`` and ``binary`` (of structural type "query", and of all others), ``per_structural_type``,
        ``per_semantic_type``, ``per_words``, ``per_steps``; ``distribution`` (no percentage, lower is better):
        chi-square of the predicted answers against the right ones; ``consistency``: accuracy over the questions that a
        rightly answered one entails; ``validity`` and ``plausibility`` by ``choices``; ``balanced``, the number of
        questions scored; and ``missing``, {score: reason} of those that cannot be had.

    Raises:
        ValueError: there is no balanced question, or predictions and items are of different questions.
    """
    if odd := difference(predictions, items, "without a prediction", "without a question"):
        raise ValueError(f"predictions and questions differ: {odd}")
    scored = {i: item for i, item in items.items() if item.balanced}
    if not scored:
        raise ValueError("no question to score: none is balanced")
    right = {i: predictions[i] == item.answer for i, item in items.items()}

    def accuracies(key: Any) -> dict[str, float]:
        groups: dict[Any, list[bool]] = defaultdict(list)
        for i, item in scored.items():
            if (name := key(item)) is not None:
                groups[name].append(right[i])
        return {str(name): _percent(groups[name]) for name in sorted(groups)}

    report: dict[str, Any] = {"accuracy": _percent([right[i] for i in scored])}
    report |= accuracies(lambda item: "open" if item.structural == "query" else "binary")
    report["per_structural_type"] = accuracies(lambda item: item.structural)
    report["per_semantic_type"] = accuracies(lambda item: item.semantic)
    report["per_words"] = accuracies(lambda item: item.words)
    report["per_steps"] = accuracies(lambda item: item.steps)
    missing: dict[str, str] = {}
    if (value := _distribution(scored, predictions)) is None:
        missing["distribution"] = "no question is in a group"
    else:
        report["distribution"] = value
    if (value := _consistency(scored, right)) is None:
        missing["consistency"] = (
            "it takes predictions for all entailed questions: those of the split with all questions"
        )
    else:
        report["consistency"] = value
    for name, kind in _CHOICES.items():
        if choices is None or not choices.keys() >= scored.keys():
            missing[name] = "there is no file of choices" if choices is None else "the file of choices lacks questions"
        else:
            report[name] = _percent([_belongs(predictions[i], choices[i][kind], scored[i]) for i in scored])
    return report | {"balanced": len(scored), "missing": missing}


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2) if scores else 0.0


def _belongs(answer: str, allowed: Sequence[str], item: GQAItem) -> bool:
    return answer in (COMMON_ANSWERS if "Common" in item.detailed else allowed)


def _consistency(scored: Mapping[str, GQAItem], right: Mapping[str, bool]) -> float | None:
    """The mean, over rightly answered questions that entail others, of the share of these that is right."""
    followers = {i: [other for other in item.entailed if other != i] for i, item in scored.items()}
    if not all(other in right for others in followers.values() for other in others):
        return None
    shares = [
        sum(right[other] for other in others) / len(others) for i, others in followers.items() if others and right[i]
    ]
    return _percent(shares)


def _distribution(scored: Mapping[str, GQAItem], predictions: Mapping[str, str]) -> float | None:
    """Chi-square of predicted against right answers in each group, weighted by its size, and divided by 100."""
    groups: dict[str, list[str]] = defaultdict(list)
    for i, item in scored.items():
        if item.group is not None:
            groups[item.group].append(i)
    if not groups:
        return None
    total = 0.0
    for ids in groups.values():
        wanted, found = Counter(scored[i].answer for i in ids), Counter(predictions[i] for i in ids)
        total += len(ids) * sum((found[answer] - count) ** 2 / count for answer, count in wanted.items())
    return round(total / sum(map(len, groups.values())) / 100, 4)
