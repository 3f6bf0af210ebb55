"""Caption scores: golden values, both tokenizers, and every way in which a Java program can be missing or fail."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from routingvl.metrics import caption_scores, captions, java_metrics, ptb

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "caption_metrics.json").read_text())
REFERENCES = {int(key): value for key, value in FIXTURE["references"].items()}
PREDICTIONS = {int(key): value for key, value in FIXTURE["predictions"].items()}
needs_java = pytest.mark.skipif(ptb.find_java() is None, reason="no Java")
posix = pytest.mark.skipif(os.name != "posix", reason="stands a shell script in for java")

# What CoreNLP 3.4.1 makes of them (checked against the jar below, where there is Java).
TOKENS = {
    'A man (with a hat) said "hello" to a dog.': "a man -lrb- with a hat -rrb- said hello to a dog",
    "it's a dog's life; the dogs' bowl isn't full!!": "it 's a dog 's life the dogs bowl is n't full !!",
    "You can't, cannot, gonna, don't; they'll": "you ca n't can not gon na do n't they 'll",
    "A black-and-white, 3-year-old cat -- on a T-shirt...": "a black-and-white 3-year-old cat on a t-shirt",
    "1,000 people at 12:30 p.m. with $5.00 and 50% off & more #1": (
        "1,000 people at 12:30 p.m. with $ 5.00 and 50 % off & more # 1"
    ),
    "Mr. Smith of Main St. in the U.S. has no. 5": "mr. smith of main st. in the u.s. has no. 5",
    "R&B or b&w, and/or a w/ b": "r&b or b & w and/or a w / b",
    "rock 'n' roll o'clock ma'am '80s": "rock 'n' roll o'clock ma'am '80s",
    "café “smart” quotes it’s – en … dots": "café smart quotes it 's en dots",
    "a man reads C++, C# and F# (not J#) for g++ 11": "a man reads c++ c# and f# -lrb- not j # -rrb- for g + + 11",
    "C++'s 1+1 is +2.5 and 6+": "c++ 's 1 +1 is +2.5 and 6 +",
    "2 1/2 pizzas": "2\xa01/2 pizzas",
    "two\nlines\tand   blanks\u2028here": "two lines and blanks here",
    "...": "",
    "": "",
}


def make_captions(count: int) -> list[str]:
    """Captions in the manner of COCO's, full of what tokenizers stumble over."""
    rng = random.Random(0)
    subjects = (
        "man|dog's bowl|kids' bike|T-shirt|stop sign|3-year-old child|U.S. flag|t.v.|1/2 sandwich|Dr. Seuss book"
        "|$5.00 coin|50's car|No. 7 jersey|#24 player|hot-dog|clock at 12:30|B&W photo|AT&T logo"
        "|“no parking” sign|'Stop' sign|(red) ball"
    ).split("|")
    relations = (
        "is on|isn't near|can't reach|doesn't like|'s riding|who's eating|, while holding,|and/or|w/|w/o|-- near --"
        "|; behind|... and|they're throwing|cannot see|gonna eat|at 3 p.m. on"
    ).split("|")
    ends = [".", "", "!", "...", ". ", "?", " .", "!!", ", etc.", " at 5 a.m.", " on Main St.", " in the U.S."]
    result = []
    for _ in range(count):
        words = ["A", rng.choice(subjects)]
        for _ in range(rng.randint(1, 3)):
            words += [rng.choice(relations), rng.choice(["a", "the", "two", "2", "one's"]), rng.choice(subjects)]
        result.append(" ".join(words) + rng.choice(ends))
    return result


def fake_java(folder: Path, script: str) -> Path:
    """A ``java`` in ``folder`` that is the shell script given."""
    folder.mkdir(exist_ok=True)
    program = folder / "java"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return folder


@pytest.mark.parametrize("tokenizer", ["python", pytest.param("ptb", marks=needs_java)])
def test_golden_scores(tokenizer):
    result = caption_scores(PREDICTIONS, REFERENCES, captions.PYTHON_METRICS, tokenizer)
    for name in captions.PYTHON_METRICS:
        assert result[name] == pytest.approx(FIXTURE["scores"][name], abs=1e-5), name
    per_image = list(result["per_image"]["CIDEr"].values())
    assert per_image == pytest.approx(FIXTURE["CIDEr per image"], abs=1e-4)
    assert result["tokenizer"] == tokenizer
    assert result["missing"] == {}
    assert result["n"] == 3
    assert "METEOR" not in result


@needs_java
@pytest.mark.slow
def test_golden_meteor():
    result = caption_scores(PREDICTIONS, REFERENCES, ["METEOR"])
    assert result["METEOR"] == pytest.approx(FIXTURE["scores"]["METEOR"], abs=1e-5)


@pytest.mark.parametrize(("caption", "tokens"), TOKENS.items())
def test_python_tokenizer(caption, tokens):
    assert ptb.tokenize_python([caption]) == [tokens]


@needs_java
def test_python_tokenizer_agrees_with_stanfords():
    texts = [*TOKENS, *(text for group in REFERENCES.values() for text in group), *make_captions(1000)]
    for text, expected, tokens in zip(texts, ptb.tokenize_java(texts), ptb.tokenize_python(texts), strict=True):
        assert tokens == expected, text


def test_scores_do_not_depend_on_order_or_kind_of_id():
    names = {1: "b", 2: "c", 3: "a"}
    straight = caption_scores(PREDICTIONS, REFERENCES, captions.PYTHON_METRICS, "python")
    shuffled = caption_scores(
        {names[i]: PREDICTIONS[i] for i in (2, 3, 1)},
        {names[i]: REFERENCES[i] for i in (3, 1, 2)},
        captions.PYTHON_METRICS,
        "python",
    )
    for name in captions.PYTHON_METRICS:
        assert shuffled[name] == pytest.approx(straight[name], abs=1e-12)
    assert shuffled["per_image"]["CIDEr"]["a"] == pytest.approx(straight["per_image"]["CIDEr"][3])


def test_subset_of_metrics_and_silence(capsys):
    result = caption_scores(PREDICTIONS, REFERENCES, ["BLEU-4"], "python")
    assert set(result) == {"BLEU-4", "missing", "tokenizer", "per_image", "n"}
    assert capsys.readouterr().out == ""


def test_one_image_has_no_cider():
    result = caption_scores({1: PREDICTIONS[1]}, {1: REFERENCES[1]}, captions.PYTHON_METRICS, "python")
    assert result["CIDEr"] == 0
    assert result["ROUGE_L"] > 0.5


def test_empty_caption_scores_zero():
    result = caption_scores({**PREDICTIONS, 1: ""}, REFERENCES, captions.PYTHON_METRICS, "python")
    assert result["per_image"]["CIDEr"][1] == 0
    assert 0 < result["BLEU-1"] < 1


WORDLESS = {1: ["a cat on a mat", "..."], 2: ["a dog runs"], 3: [" . "], 4: ["two birds"]}


@pytest.mark.parametrize("tokenizer", ["python", pytest.param("ptb", marks=needs_java)])
def test_texts_without_a_word_are_scored_as_the_official_code_does(tokenizer):
    scorers = pytest.importorskip("pycocoevalcap.bleu.bleu"), pytest.importorskip("pycocoevalcap.cider.cider")
    tokens = {1: ["a cat on a mat", ""], 2: ["a dog runs"], 3: [""], 4: ["two birds"]}
    found = {1: ["a cat"], 2: ["a dog runs"], 3: ["a tree"], 4: [""]}
    bleu = scorers[0].Bleu(4).compute_score(tokens, found, verbose=0)[0]
    cider, per_image = scorers[1].Cider().compute_score(tokens, found)
    result = caption_scores(
        {1: "a cat", 2: "a dog runs", 3: "a tree", 4: "?"}, WORDLESS, captions.PYTHON_METRICS, tokenizer
    )
    assert [result[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(bleu)
    assert result["CIDEr"] == pytest.approx(cider)
    assert list(result["per_image"]["CIDEr"].values()) == pytest.approx(list(per_image))
    everything = caption_scores({1: "..."}, {1: ["!", "."]}, captions.PYTHON_METRICS, tokenizer)
    assert everything["CIDEr"] is everything["BLEU-4"] is None
    assert everything["missing"] == dict.fromkeys(captions.PYTHON_METRICS, "no reference caption has a word")


def test_a_scorer_that_fails_costs_no_other_metric(monkeypatch):
    from pycocoevalcap.rouge.rouge import Rouge

    monkeypatch.setattr(Rouge, "compute_score", lambda *args: 1 / 0)
    result = caption_scores(PREDICTIONS, REFERENCES, captions.PYTHON_METRICS, "python")
    assert result["ROUGE_L"] is None
    assert result["missing"] == {"ROUGE_L": "ZeroDivisionError: division by zero"}
    assert result["CIDEr"] == pytest.approx(FIXTURE["scores"]["CIDEr"], abs=1e-5)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({1: "a"}, {1: ["a"], 2: ["b"]}, r"1 without a caption \[2\]"),
        ({1: "a", 7: "b"}, {1: ["a"]}, r"1 without references \[7\]"),
        ({1: "a"}, {1: []}, "image 1 has no reference caption"),
        ({}, {}, "no image to score"),
    ],
)
def test_bad_input(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        caption_scores(predictions, references, ["CIDEr"], "python")


def test_bad_names():
    with pytest.raises(ValueError, match="unknown caption metric 'BLEU'"):
        caption_scores(PREDICTIONS, REFERENCES, ["BLEU"])
    with pytest.raises(ValueError, match="'auto', 'ptb', 'python'"):
        caption_scores(PREDICTIONS, REFERENCES, ["CIDEr"], tokenizer="java")
    with pytest.raises(TypeError, match="list of strings"):
        caption_scores({1: "a"}, {1: "a cat"}, ["CIDEr"], "python")


def test_without_java_everything_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = caption_scores(PREDICTIONS, REFERENCES)
    assert result["CIDEr"] == pytest.approx(FIXTURE["scores"]["CIDEr"], abs=1e-5)
    assert result["METEOR"] is None
    assert result["SPICE"] is None
    assert set(result["missing"]) == {"METEOR", "SPICE"}
    assert all("needs Java" in reason for reason in result["missing"].values())
    assert result["tokenizer"].startswith("python (")
    assert "needs Java" in result["tokenizer"]
    with pytest.raises(RuntimeError, match="needs Java"):
        caption_scores(PREDICTIONS, REFERENCES, ["CIDEr"], tokenizer="ptb")


@posix
@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no memory >&2; exit 3", "METEOR stopped with exit code 3: no memory"),
        ("read line; echo 1.0; exit 1", "METEOR stopped with exit code 1"),
        ("while read line; do echo nonsense; done", "METEOR answered 'nonsense' in place of a score"),
    ],
)
def test_broken_meteor_is_reported(monkeypatch, tmp_path, script, reason):
    monkeypatch.setenv("PATH", str(fake_java(tmp_path, script)))
    result = caption_scores(PREDICTIONS, REFERENCES, ["METEOR"], tokenizer="python")
    assert result["METEOR"] is None
    assert reason in result["missing"]["METEOR"]


@posix
def test_hanging_programs_are_ended(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{fake_java(tmp_path, 'exec sleep 60')}{os.pathsep}{os.environ['PATH']}")
    tokens = dict.fromkeys(REFERENCES, "a")
    with pytest.raises(java_metrics.MetricUnavailable, match=r"did not finish in 0\.2 s"):
        java_metrics.meteor(tokens, REFERENCES, timeout=0.2)
    monkeypatch.setattr(ptb, "JAVA_TIMEOUT", 0.2)
    result = caption_scores(PREDICTIONS, REFERENCES, ["CIDEr"])
    assert "did not run" in result["tokenizer"]


@posix
def test_tokenizer_that_loses_lines_is_not_trusted(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{fake_java(tmp_path, 'cat >/dev/null; echo a')}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match="1 lines for 2 captions"):
        ptb.tokenize_java(["a", "b"])


@posix
def test_spice_runs_once_its_download_is_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(fake_java(tmp_path / "bin", "")))
    monkeypatch.setattr(java_metrics, "cocoevalcap_folder", lambda: tmp_path)
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    with pytest.raises(java_metrics.MetricUnavailable, match=r"stanford-corenlp-3\.6\.0-models\.jar"):
        java_metrics.spice({1: "a cat"}, {1: ["a cat"]})
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "spice" / "lib" / name).touch()
    with pytest.raises(java_metrics.MetricUnavailable, match="exit code 0: no message"):
        java_metrics.spice({1: "a cat"}, {1: ["a cat"]})
    answer = [{"image_id": 2, "scores": {"All": {"f": 0.5}}}, {"image_id": 1, "scores": {"All": {"f": 0.25}}}]
    # the arguments are -jar -Xmx8G spice-1.0.jar REQUEST -out ANSWER ...
    fake_java(tmp_path / "bin", f"echo '{json.dumps(answer)}' > \"$6\"")
    assert java_metrics.spice({1: "a cat", 2: "b"}, {1: ["a cat"], 2: ["b"]}) == (0.375, [0.25, 0.5])
    for wrong in ("[{", "[]", '{"scores": 1}', '[{"image_id": 1, "scores": null}]'):
        fake_java(tmp_path / "bin", f"echo '{wrong}' > \"$6\"")
        with pytest.raises(ptb.MetricUnavailable, match="SPICE wrote no scores of these images"):
            java_metrics.spice({1: "a cat"}, {1: ["a cat"]})


def test_nothing_is_written_beside_pycocoevalcap():
    folder = ptb.cocoevalcap_folder()
    before = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    caption_scores(PREDICTIONS, REFERENCES, ["CIDEr", "SPICE"])
    assert {path for path in folder.rglob("*") if "__pycache__" not in path.parts} == before


def test_import_is_light():
    code = "import sys, routingvl.metrics as m; m.vqa_accuracy, m.caption_scores; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pycocoevalcap"} & set(result.stdout.split())
