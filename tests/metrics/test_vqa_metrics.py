"""Official VQA accuracy: worked examples that agree with the official code, and the rule as a loop."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routingvl.metrics import soft_score, soft_score_report, vqa_accuracy, vqa_report
from routingvl.metrics.answers import normalize_answer

FIXTURES = Path(__file__).parents[1] / "fixtures"

# prediction, {human answer: how often}, score of 2021, score of 2016, soft score (all in percent)
EXAMPLES = [
    ("yes", {"yes": 10}, 100, 100, 100),
    ("Yes.", {"yes": 10}, 0, 100, 0),
    ("Yes.", {"yes": 9, "no": 1}, 100, 100, 0),
    ("no", {"yes": 9, "no": 1}, 30, 30, 30),
    ("red", {"red": 2, "dark red": 8}, 60, 60, 60),
    ("red", {"red": 3, "maroon": 7}, 90, 90, 90),
    ("red", {"red": 4, "maroon": 6}, 100, 100, 100),
    ("two", {"2": 6, "3": 4}, 100, 100, 0),
    ("a dog", {"dog": 2, "a dog": 2, "the dog": 1, "puppy": 5}, 100, 60, 60),
    ("1,000", {"1000": 5, "1,000": 3, "many": 2}, 100, 100, 90),
    ("red/white", {"red and white": 5, "red white": 2, "red, white": 3}, 100, 100, 0),
    ("dont know", {"don't know": 4, "unknown": 6}, 100, 100, 0),
    ("2.5 ft.", {"2.5 ft": 3, "3 ft": 7}, 90, 90, 0),
    ("U.S.A.", {"usa": 3, "america": 7}, 90, 90, 0),
    ("t-shirt", {"t shirt": 5, "shirt": 5}, 100, 100, 0),
    ("12:30", {"12:30": 5, "1230": 5}, 100, 100, 100),
    ("none", {"0": 6, "none": 4}, 100, 100, 100),
    ("a cat", {"a cat": 10}, 100, 0, 100),
    ("the", {"a": 1, "cat": 9}, 30, 0, 0),
]
SOFT = {1: 0.3, 2: 0.6, 3: 0.9}


def spread(counts: dict[str, int]) -> list[str]:
    return [answer for answer, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(("prediction", "counts", "new", "old", "soft"), EXAMPLES)
def test_worked_examples(prediction, counts, new, old, soft):
    answers = spread(counts)
    assert len(answers) == 10
    assert vqa_accuracy(prediction, answers) == pytest.approx(new / 100, abs=1e-12)
    assert vqa_accuracy(prediction, answers, rule="2016") == pytest.approx(old / 100, abs=1e-12)
    labels = {answer: SOFT.get(count, 1.0) for answer, count in counts.items()}
    assert soft_score(prediction, labels) == pytest.approx(soft / 100)


@given(
    st.lists(st.sampled_from(["cat", "a cat", "Cat.", "2", "two", "dont", "don't", ""]), min_size=1, max_size=13),
    st.sampled_from(["cat", "two", "the", "don't", "dog"]),
)
def test_any_number_of_answers_is_leave_one_out(answers, prediction):
    """The rule as the official code states it, loop by loop, against the closed form."""
    if len(set(answers)) > 1:
        normal = [normalize_answer(answer) for answer in answers]
        target = normalize_answer(prediction)
    else:
        normal, target = answers, prediction
    scores = []
    for i in range(len(normal)):
        others = normal[:i] + normal[i + 1 :]
        scores.append(min(1.0, sum(answer == target for answer in others) / 3))
    assert vqa_accuracy(prediction, answers) == pytest.approx(sum(scores) / len(scores), abs=1e-12)


def test_line_breaks_and_blanks_do_not_count():
    assert vqa_accuracy(" red\n", ["red\t"] * 10) == 1
    assert vqa_accuracy("dark\nred", ["dark red"] * 5 + ["red"] * 5) == 1


def entry(question_id, answers, answer_type="other", question_type="what is"):
    answers = [{"answer": answer, "answer_id": i + 1} for i, answer in enumerate(answers)]
    return dict(question_id=question_id, answers=answers, answer_type=answer_type, question_type=question_type)


def test_report_of_several_types():
    annotations = [
        entry(1, ["yes"] * 10, "yes/no", "is the"),
        entry(2, ["yes"] * 9 + ["no"], "yes/no", "is the"),
        entry(3, ["red"] * 2 + ["dark red"] * 8, "other", "what color"),
    ]
    report = vqa_report({1: "yes", 2: "no", 3: "red"}, annotations)
    assert report == {
        "overall": 63.33,
        "per_answer_type": {"other": 60.0, "yes/no": 65.0},
        "per_question_type": {"is the": 65.0, "what color": 60.0},
        "rule": "2021",
        "n": 3,
    }


def test_report_of_the_fixture():
    annotations = json.loads((FIXTURES / "v2_mscoco_train2014_annotations.json").read_text())["annotations"]
    results = json.loads((FIXTURES / "v2_OpenEnded_mscoco_train2014_toy_results.json").read_text())
    predictions = {row["question_id"]: row["answer"] for row in results}
    report = vqa_report(predictions, annotations)
    assert report["n"] == len(annotations) == 2
    assert report["per_answer_type"] == {"other": 100.0, "number": 100.0}
    assert vqa_report({9000: "dark red", 9001: "1"}, annotations)["per_answer_type"]["other"] == 60.0


def test_report_names_what_is_missing_and_what_is_extra():
    annotations = [entry(1, ["yes"] * 10), entry(2, ["no"] * 10)]
    with pytest.raises(ValueError, match=r"1 without a prediction \[2\]"):
        vqa_report({1: "yes"}, annotations)
    with pytest.raises(ValueError, match=r"1 without an annotation \[7\]"):
        vqa_report({1: "yes", 2: "no", 7: "no"}, annotations)
    with pytest.raises(ValueError, match="more than once"):
        vqa_report({1: "yes"}, [annotations[0], annotations[0]])
    with pytest.raises(ValueError, match="empty"):
        vqa_report({}, [])


def test_bad_input():
    with pytest.raises(ValueError, match="'2021', '2016'"):
        vqa_accuracy("yes", ["yes"], rule="2020")
    with pytest.raises(ValueError, match="empty"):
        vqa_accuracy("yes", [])
    with pytest.raises(TypeError, match="list of strings"):
        vqa_accuracy("yes", "yes")


def test_soft_score_report():
    labels = {1: {"red": 1.0}, 2: {"1": 1.0, "2": 0.3}, 3: {}}
    assert soft_score_report({1: "red", 2: "2", 3: "x"}, labels) == {"soft_score": 43.33, "n": 3}
    with pytest.raises(ValueError, match="without a prediction"):
        soft_score_report({1: "red"}, labels)
