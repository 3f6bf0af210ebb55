"""Tokenizer, model, settings and the files of a run have to belong together: what does not is refused by name."""

import json
import shutil

import pytest
from tiny import tiny_config
from transformers import AutoTokenizer

from routingvl.backbones.loading import BackboneError
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.config import ConfigError
from routingvl.evaluate import evaluate
from routingvl.metrics import read_coco_results, read_vqa_results
from routingvl.tasks.base import load_tokenizer
from routingvl.train import train


@pytest.fixture
def home(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "home")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(home, task, message, **settings):
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(home, home / "run", task, **settings), log="quiet")
    assert not (home / "run").exists()


@pytest.mark.parametrize(("task", "folder"), [("caption", "gpt2"), ("vqa", "roberta")])
def test_a_token_that_the_model_does_not_know(home, task, folder):
    tokenizer = AutoTokenizer.from_pretrained(home / folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(home / folder)
    refused(
        home, task, rf"token '\[PAD\]' of the tokenizer has the id {len(tokenizer) - 1}, .* knows {len(tokenizer) - 1}"
    )


def test_captions_end_with_one_token(home):
    edit(home / "gpt2" / "config.json", eos_token_id=5)
    refused(
        home, "caption", r"captions end with token \d+ of the tokenizer, but with eos_token_id 5 of the language model"
    )
    edit(
        home / "gpt2" / "config.json",
        eos_token_id=json.loads((home / "gpt2" / "config.json").read_text())["bos_token_id"],
    )
    edit(home / "gpt2" / "config.json", bos_token_id=7)
    refused(home, "caption", "captions begin with token .* but with bos_token_id 7", visual_prefix=False)
    # with the image in front nothing else begins a caption
    assert train(tiny_config(home, home / "run", "caption", max_steps=1), log="quiet").steps == 1


def test_texts_and_captions_have_to_fit_the_positions(home):
    refused(home, "caption", "eval.max_new_tokens=41 is more than the language model's 40 positions", max_new_tokens=41)
    # 40 positions, of which RoBERTa leaves two unused and the image takes one
    refused(home, "vqa", r"texts have up to 38 tokens, .* positions for 37", padding="max_length", max_text_length=38)
    tokens = {"vision_features": "tokens", "routing.routing": "vllora"}  # five of each image
    refused(
        home, "vqa", r"positions for 33: set data\.max_text_length", padding="max_length", max_text_length=34, **tokens
    )
    rows = [json.loads(line) for line in (home / "data" / "train.jsonl").read_text().splitlines()]
    rows[3]["text"] = "what color is it? " * 20
    (home / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused(home, "classify", "set data.max_text_length to 37 or less", max_text_length=50)


def test_a_tokenizer_with_code_of_its_own_is_refused_and_nobody_is_asked(home, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("stdin was read"))
    folder = home / "roberta"
    (folder / "mine.py").write_text("raise SystemExit('code ran')")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    edit(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", "mine.Mine"]}, tokenizer_class="Mine"
    )
    with pytest.raises(BackboneError, match=f"the tokenizer of {folder} cannot be loaded"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["roberta", "gpt2"])
def test_a_tokenizer_without_words_is_refused(tiny, tmp_path, name):
    folder = shutil.copytree(tiny / name, tmp_path / name)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"].update(vocab={}, merges=[])
    path.write_text(json.dumps(content))
    with pytest.raises(BackboneError, match=f"the tokenizer of {folder} knows no token beside its special ones"):
        load_tokenizer(str(folder))


DAMAGE = {
    "tokenizer/tokenizer.json": ("{", BackboneError, "the tokenizer of .*tokenizer cannot be loaded"),
    "tokenizer/tokenizer_config.json": ("[" * 100_000, BackboneError, "the tokenizer of .*tokenizer cannot be loaded"),
    "preprocessor_config.json": ("{", CheckpointError, r"preprocessor_config\.json is not valid JSON"),
    "label2ans.json": ('["red", "green", "blue"]', ConfigError, "the model has 4 answers, the data 3"),
}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "run"
    train(tiny_config(tiny, folder, "vqa", max_steps=1), log="quiet")
    return folder


@pytest.mark.parametrize(("name", "damage"), DAMAGE.items())
def test_damaged_files_of_a_run_are_named(run, tmp_path, name, damage):
    text, error, message = damage
    broken = shutil.copytree(run, tmp_path / "run")
    (broken / name).write_text(text)
    (broken / "run.json").unlink()  # whose digests would tell before
    with pytest.raises(error, match=message):
        evaluate(broken, "val", log="quiet")
    assert not (broken / "eval-val").exists()


def test_string_ids_come_through(home):
    for split in ("train", "val", "test"):
        path = home / "data" / f"karpathy_{split}.json"
        rows = [row | {"question_id": f"0{row['question_id']}"} for row in json.loads(path.read_text())]
        path.write_text(json.dumps(rows))
    train(tiny_config(home, home / "run", "vqa", max_steps=1), log="quiet")
    metrics = evaluate(home / "run", "test", log="quiet")
    assert metrics["n"] == 5
    assert set(read_vqa_results(metrics["predictions"])) == {row["question_id"] for row in rows}


def test_places_that_take_no_results_are_tried_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr("routingvl.evaluate.load_run", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file is a file; choose another folder for the results"):
            evaluate(run, "val", output=place, log="quiet")
    for part in (run, run / "best", run / "state"):
        with pytest.raises(ConfigError, match="is a part of the run"):
            evaluate(run, "val", output=part, log="quiet")
    with pytest.raises(OSError, match="/proc/results"):
        evaluate(run, "val", output="/proc/results", log="quiet")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="link is a link to nothing"):
        evaluate(run, "val", output=tmp_path / "link", log="quiet")
    (tmp_path / "link").unlink()
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_scoring_that_fails_costs_no_predictions(run, tmp_path, monkeypatch):
    monkeypatch.setattr("routingvl.tasks.vqa.vqa_report", lambda *_, **__: 1 / 0)
    metrics = evaluate(run, "val", output=tmp_path / "out", log="quiet")
    assert (
        "scoring failed (ZeroDivisionError: division by zero); the predictions are in" in metrics["missing"]["scores"]
    )
    assert len(read_vqa_results(metrics["predictions"])) == metrics["n"] == 4
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["missing"] == metrics["missing"]


def test_captions_without_words(home):
    train(tiny_config(home, home / "run", "caption", max_steps=1, val_split=None), log="quiet")
    path = home / "data" / "dataset_coco.json"
    content = json.loads(path.read_text())
    images = [image for image in content["images"] if image["split"] == "val"]

    def scored(text, count):
        for image in images[:count]:
            image["sentences"] = [{"raw": text, "sentid": image["cocoid"]}]
        path.write_text(json.dumps(content))
        settings = {"metrics": ["CIDEr", "BLEU-4"], "caption_tokenizer": "python"}
        return evaluate(home / "run", "val", log="quiet", **settings)

    metrics = scored("...", 1)
    assert metrics["missing"] == {}
    assert metrics["n"] == len(read_coco_results(metrics["predictions"])) == 4
    assert metrics["CIDEr"] >= 0
    metrics = scored(" . ", 4)
    assert metrics["CIDEr"] is metrics["BLEU-4"] is None
    assert metrics["missing"] == dict.fromkeys(["BLEU-4", "CIDEr"], "no reference caption has a word")
    assert len(read_coco_results(metrics["predictions"])) == 4
