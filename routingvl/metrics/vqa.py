"""Official VQA accuracy (GT-Vision-Lab/VQA, commit a013f00 of 2021, and the rule it replaced) and the soft score.

A prediction is compared with every human answer. Leaving answer i out, it earns min(1, matches among the others / 3);
the question's score is the mean over i. For n matches among N answers this is
``(n min(1, (n - 1) / 3) + (N - n) min(1, n / 3)) / N``: for N = 10 it is 0, 0.3, 0.6, 0.9 for n = 0, 1, 2, 3, then 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from routingvl.metrics.answers import normalize_answer, process_punctuation
from routingvl.metrics.coverage import difference

RULES = ("2021", "2016")


def _flatten(text: str) -> str:
    """One line without surrounding blanks, the first step of both rules."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _comparable(prediction: str, answers: Sequence[str], rule: str) -> tuple[str, list[str]]:
    """Prediction and human answers in the form in which ``rule`` compares them, by plain equality.

    2021: both are normalised, unless all human answers are the same string; then neither is ("Yes." is not "yes").
    2016: the prediction is always normalised; of the answers only the punctuation, and only when they differ, so an
    article or a number word in them can never be matched.
    """
    if rule == "2021":
        prediction, answers = _flatten(prediction), [_flatten(answer) for answer in answers]
        if len(set(answers)) == 1:
            return prediction, answers
        return normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    if rule == "2016":
        prediction = normalize_answer(_flatten(prediction))
        if len(set(answers)) == 1:
            return prediction, list(answers)
        return prediction, [process_punctuation(answer) for answer in answers]
    raise ValueError(f"rule={rule!r} is not a VQA accuracy rule; choose one of {', '.join(map(repr, RULES))}")


def vqa_accuracy(prediction: str, answers: Sequence[str], rule: str = "2021") -> float:
    """Accuracy of one predicted answer.

    Args:
        prediction: the model's answer.
        answers: the human answers to the question, 10 in VQAv2, any number from 1 here.
        rule: "2021", the one in force, or "2016", which older papers report.

    Returns:
        The score in [0, 1].

    Raises:
        ValueError: ``answers`` is empty or ``rule`` is unknown.
        TypeError: ``answers`` is one string instead of a list of strings.
    """
    if isinstance(answers, str):
        raise TypeError(f"answers={answers!r} must be a list of strings, one per person asked")
    if not answers:
        raise ValueError("answers is empty: accuracy compares a prediction with at least one human answer")
    prediction, answers = _comparable(prediction, answers, rule)
    total, matches = len(answers), answers.count(prediction)
    return (matches * min(1.0, (matches - 1) / 3) + (total - matches) * min(1.0, matches / 3)) / total


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), 2)


def _check_questions(predictions: Mapping[int, Any], known: Mapping[int, Any]) -> None:
    """Raise ValueError unless exactly the questions of the annotations have a prediction."""
    if not known:
        raise ValueError("no question to score: the list of annotations is empty")
    if odd := difference(predictions, known, "without a prediction", "without an annotation"):
        raise ValueError(f"predictions and annotations cover different questions: {odd}")


def vqa_report(
    predictions: Mapping[int, str], annotations: Sequence[Mapping[str, Any]], rule: str = "2021"
) -> dict[str, Any]:
    """Accuracy over a set of questions, in percent rounded to 2 decimals as the official code prints it.

    Args:
        predictions: {question_id: answer}, one for every annotated question.
        annotations: the entries of an official annotation file: ``question_id``, ``answers`` (dicts with ``answer``),
            ``answer_type`` and ``question_type``.
        rule: see :func:`vqa_accuracy`.

    Returns:
        ``overall``, ``per_answer_type`` and ``per_question_type`` (sorted by name), ``rule``, and ``n``, the number of
        questions.

    Raises:
        ValueError: a question has no prediction, a prediction no question, or a question id comes twice.
    """
    by_id = {entry["question_id"]: entry for entry in annotations}
    if len(by_id) != len(annotations):
        raise ValueError(f"{len(annotations) - len(by_id)} question ids come more than once in the annotations")
    _check_questions(predictions, by_id)
    scores = {
        question_id: vqa_accuracy(predictions[question_id], [answer["answer"] for answer in entry["answers"]], rule)
        for question_id, entry in by_id.items()
    }
    by_type: dict[str, dict[str, float]] = {}
    for kind in ("answer_type", "question_type"):
        groups = defaultdict(list)
        for question_id, entry in by_id.items():
            groups[entry[kind]].append(scores[question_id])
        by_type[f"per_{kind}"] = {name: _percent(groups[name]) for name in sorted(groups)}
    return {"overall": _percent(list(scores.values())), **by_type, "rule": rule, "n": len(scores)}


def soft_score(prediction: str, labels: Mapping[str, float]) -> float:
    """Score in [0, 1] of one prediction against soft labels {answer: score}; 0 for an answer that has none.

    This is what training sees. Labels count raw, not normalised answers: the mean can lie below the official accuracy.
    """
    return float(labels.get(prediction, 0.0))


def soft_score_report(predictions: Mapping[int, str], labels: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """Mean soft score in percent, rounded to 2 decimals, and ``n``.

    Args:
        predictions: {question_id: answer}.
        labels: {question_id: {answer: score}}; an empty inner dict (no answer in the vocabulary) scores 0.

    Raises:
        ValueError: predictions and labels cover different questions.
    """
    _check_questions(predictions, labels)
    scores = [soft_score(predictions[question_id], labels[question_id]) for question_id in labels]
    return {"soft_score": _percent(scores), "n": len(scores)}
