"""The scores of GQA and NLVR2 on cases small enough to count by hand."""

import json

import pytest
from pair_and_gqa_data import FIXTURES

from routingvl.metrics import gqa_report, nlvr2_report
from routingvl.metrics.gqa import GQAItem, gqa_item

VERIFY = GQAItem("yes", True, "verify", "rel", "relVerify", 4, 2, None, ())
# Two questions of one group, which entail others, a common-property question, and an unbalanced one.
ITEMS = {
    "a": GQAItem("red", True, "query", "attr", "colorQuery", 5, 2, "color", ("a", "c", "u")),
    "b": GQAItem("red", True, "query", "attr", "colorQuery", 5, 3, "color", ("b",)),
    "c": VERIFY,
    "d": GQAItem("color", True, "compare", "attr", "twoCommon", 8, 3, None, ()),
    "u": VERIFY._replace(balanced=False),
}
ANSWERS = {"a": "red", "b": "blue", "c": "yes", "d": "shape", "u": "no"}
CHOICES = {
    "a": {"valid": ["red", "blue"], "plausible": ["blue"]},
    "b": {"valid": ["red", "blue"], "plausible": ["blue"]},
    "c": {"valid": ["yes", "no"], "plausible": ["yes"]},
    "d": {"valid": ["nothing"], "plausible": ["nothing"]},
}


def test_gqa():
    report = gqa_report(ANSWERS, ITEMS, CHOICES)
    assert (report["accuracy"], report["open"], report["binary"]) == (50.0, 50.0, 50.0)
    assert report["per_structural_type"] == {"compare": 0.0, "query": 50.0, "verify": 100.0}
    assert report["per_semantic_type"] == {"attr": 33.33, "rel": 100.0}
    assert report["per_words"] == {"4": 100.0, "5": 50.0, "8": 0.0}
    assert report["per_steps"] == {"2": 100.0, "3": 0.0}
    assert report["consistency"] == 50.0  # of a's followers c is right and u is not; b is wrong, and entails itself
    assert report["validity"] == 100.0  # "shape" is one of three valid answers to d, whatever its list says
    assert report["plausibility"] == 75.0
    assert report["distribution"] == 0.005  # (1 - 2)^2 / 2 of "red", over 100; "blue" is no right answer
    assert (report["balanced"], report["missing"]) == (4, {})


def test_gqa_without_what_some_scores_need():
    few = {i: ITEMS[i] for i in "acd"}
    report = gqa_report({i: ANSWERS[i] for i in few}, few)
    assert report["missing"].keys() == {"consistency", "validity", "plausibility"}
    assert "all questions" in report["missing"]["consistency"]
    partial = gqa_report(ANSWERS, ITEMS, {i: CHOICES[i] for i in "abc"})
    assert partial["missing"].keys() == {"validity", "plausibility"}
    assert gqa_report({"c": "no"}, {"c": VERIFY})["missing"]["distribution"] == "no question is in a group"
    with pytest.raises(ValueError, match=r"1 without a prediction \['u'\]"):
        gqa_report({i: ANSWERS[i] for i in "abcd"}, ITEMS)
    with pytest.raises(ValueError, match="none is balanced"):
        gqa_report({"u": "yes"}, {"u": ITEMS["u"]})


def test_gqa_entries():
    entries = json.loads((FIXTURES / "gqa" / "val_balanced_questions.json").read_text())
    entry = next(iter(entries.values()))
    assert gqa_item(entry).steps == 2  # select, query: color
    operations = [("select", "man"), ("exist", "?"), ("query", "name"), ("choose name", "a|b"), ("relate", "on")]
    steps = [{"operation": operation, "argument": argument} for operation, argument in operations]
    assert gqa_item({**entry, "semantic": steps}).steps == 2  # exist, query: name and choose name are none
    bare = {key: entry[key] for key in ("answer", "question", "types")}
    assert gqa_item(bare)[1:] == (True, "query", "attr", "colorQuery", 5, None, None, ())
    for nothing in (None, "", [], {}):
        assert gqa_item({**bare, "groups": {"global": nothing}}).group is None


def test_nlvr2():
    labels = {"dev-1-0-0": "True", "dev-1-1-0": "False", "dev-1-0-1": "True", "dev-2-0-0": "False"}
    found = {"dev-1-0-0": "True", "dev-1-1-0": "True", "dev-1-0-1": "true", "dev-2-0-0": "False"}
    # Sentences are dev-1-?-0 (wrong on one pair), dev-1-?-1 and dev-2-?-0.
    assert nlvr2_report(found, labels) == {"accuracy": 75.0, "consistency": 66.67, "n": 4, "sentences": 3}
    with pytest.raises(ValueError, match=r"1 without a prediction \['dev-2-0-0'\]"):
        nlvr2_report({i: found[i] for i in list(found)[:3]}, labels)
    with pytest.raises(ValueError, match="labels is empty"):
        nlvr2_report({}, {})
