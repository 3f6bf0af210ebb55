"""The task classify end to end: labels, training, evaluation, single images, and what is wrong with its files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import COLOURS, QUESTION, SPLITS, STATEMENT, answerer, tiny_config, write_tiny
from training_runs import losses

from routingvl.cli import main
from routingvl.config import ConfigError
from routingvl.config.schema import override
from routingvl.data.files import DataError
from routingvl.evaluate import evaluate
from routingvl.models import ViTRobertaForClassification, load_pretrained
from routingvl.predict import Predictor
from routingvl.train import train

LABELS = sorted([*COLOURS, "true"])
LEARNED = {"max_steps": 60, "train.batch_size": 24}  # what it takes to know four plain colours and one statement


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    config = tiny_config(tiny, tmp_path_factory.mktemp("runs") / "classify", "classify", **LEARNED)
    return train(config, log="quiet").run_dir


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def data(tiny, tmp_path):
    """A folder of annotations to spoil, and a function that changes the rows of one split of it."""
    folder = tmp_path / "data"
    shutil.copytree(tiny / "data", folder, ignore=shutil.ignore_patterns("val2014"))

    def change(split, edit):
        rows = read(folder / f"{split}.jsonl")
        edit(rows)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    change.folder = folder
    return change


def train_on(tiny, tmp_path, folder, **settings):
    settings = {"max_steps": 1, "annotations": str(folder)} | settings
    return train(tiny_config(tiny, tmp_path / "run", "classify", **settings), log="quiet")


def test_evaluation(run):
    metrics = evaluate(run, log="quiet")
    assert metrics["accuracy"] == 100.0
    assert (metrics["n"], metrics["missing"], metrics["skipped"]) == (2 * SPLITS["test"], {}, 0)
    assert metrics["per_label"] == dict.fromkeys(LABELS, 100.0)
    assert metrics["confusion"]["true"] == dict.fromkeys(LABELS, 0) | {"true": SPLITS["test"]}
    assert json.loads((run / "labels.json").read_text()) == LABELS
    rows = read(metrics["predictions"])
    assert [row["label"] for row in rows if row["id"].endswith("#true")] == ["true"] * SPLITS["test"]


def test_scores_count_what_is_wrong(tiny, data, run, tmp_path):
    def mislabel(rows):
        rows[0]["label"], rows[1]["label"] = "white", "white"  # of red: one of three whites is found

    data("test", mislabel)
    metrics = evaluate(run, annotations=str(data.folder), output=tmp_path / "out", log="quiet")
    assert metrics["accuracy"] == 80.0  # of 10 examples
    assert metrics["per_label"] == {"blue": 100.0, "green": 100.0, "red": 100.0, "true": 100.0, "white": 33.33}
    assert metrics["confusion"]["white"] == {"blue": 0, "green": 0, "red": 1, "true": 1, "white": 1}


def test_split_without_labels(data, run, tmp_path):
    data("test", lambda rows: [row.pop("label") for row in rows])
    metrics = evaluate(run, annotations=str(data.folder), output=tmp_path / "out", log="quiet")
    assert "accuracy" not in metrics
    assert "has no labels" in metrics["missing"]["accuracy"]
    assert len(read(metrics["predictions"])) == 2 * SPLITS["test"]


def test_limits_and_skipped_images(tiny, data, run, tmp_path):
    metrics = evaluate(run, limit=3, output=tmp_path / "out", log="quiet")
    assert metrics["n"] == 3
    data("test", lambda rows: rows[0].update(image="gone.jpg"))
    settings = {"annotations": str(data.folder), "output": tmp_path / "out", "log": "quiet"}
    assert evaluate(run, on_bad_image="skip", **settings)["skipped"] == 1
    with pytest.raises(ValueError, match=r"gone\.jpg"):
        evaluate(run, **settings)
    # The labels are those of the whole split, however little of it is trained on.
    result = train_on(tiny, tmp_path, tiny / "data", train_limit=1)
    assert json.loads((result.run_dir / "labels.json").read_text()) == LABELS


def test_pairs_of_sentences(tiny, data, tmp_path):
    for split in SPLITS:
        data(split, lambda rows: [row.update(text=[row["text"], "look closely"]) for row in rows[::2]])
    result = train_on(tiny, tmp_path, data.folder)
    assert evaluate(result.run_dir, log="quiet")["n"] == 2 * SPLITS["test"]
    image = next((tiny / "data" / "val2014").iterdir())
    one, two = (Predictor(result.run_dir).predict([image], text)[0] for text in (QUESTION, (QUESTION, "look closely")))
    assert one["probabilities"].keys() == two["probabilities"].keys()
    assert one != two


def test_features_from_the_cache(tiny, run, tmp_path):
    settings = {"max_steps": 3, "feature_cache": str(tmp_path / "features")}
    read = train_on(tiny, tmp_path / "read", tiny / "data", max_steps=3)
    cached = train_on(tiny, tmp_path / "cached", tiny / "data", **settings)
    assert losses(cached) == pytest.approx(losses(read), rel=1e-5)
    metrics = evaluate(run, feature_cache=settings["feature_cache"], output=tmp_path / "out", log="quiet")
    assert metrics["accuracy"] == 100.0


def test_labels_from_a_file(tiny, data, tmp_path):
    (data.folder / "labels.json").write_text(json.dumps(["true", *COLOURS, "perhaps"]))
    result = train_on(tiny, tmp_path, data.folder)
    assert json.loads((result.run_dir / "labels.json").read_text()) == ["true", *COLOURS, "perhaps"]
    assert load_pretrained(result.run_dir / "last").num_labels == 6
    given = tmp_path / "mine.json"
    given.write_text(json.dumps(list(COLOURS)))
    with pytest.raises(DataError, match=r"label 'true' .* in split 'train' is none of the 4 labels of .*mine\.json"):
        train_on(tiny, tmp_path / "other", data.folder, answers=str(given))
    for content in ('{"true": 0}', "[]", "[1]"):
        given.write_text(content)
        with pytest.raises(DataError, match="is not a list of labels"):
            train_on(tiny, tmp_path / "other", data.folder, answers=str(given))
    given.write_text('["a", "a"]')
    with pytest.raises(DataError, match="label a is listed twice"):
        train_on(tiny, tmp_path / "other", data.folder, answers=str(given))


def test_labels_that_do_not_fit(tiny, data, run, tmp_path):
    data("val", lambda rows: rows[2].update(label="purple"))
    with pytest.raises(DataError, match=r"label 'purple' .* in split 'val' is none of the 5 labels of split"):
        train_on(tiny, tmp_path, data.folder)
    with pytest.raises(DataError, match=r"label 'purple' .* is none of the 5 labels of .*labels\.json \('blue'"):
        evaluate(run, "val", annotations=str(data.folder), output=tmp_path / "out", log="quiet")
    data("val", lambda rows: [row.pop("label") for row in rows])
    with pytest.raises(DataError, match=r"split 'val' has no labels to validate with; set data\.val_split"):
        train_on(tiny, tmp_path, data.folder)
    train_on(tiny, tmp_path, data.folder, val_split=None)
    data("train", lambda rows: [row.pop("label") for row in rows])
    with pytest.raises(DataError, match="split 'train' has no labels to learn"):
        train_on(tiny, tmp_path / "other", data.folder)


def test_given_models(tiny, run, tmp_path):
    config = tiny_config(tiny, tmp_path / "run", "classify", max_steps=1, lr=1e-9)
    with pytest.raises(ConfigError, match="'classify' trains a VisionTextForClassification, not a VisionTextForVQA"):
        train(tiny_config(tiny, tmp_path / "run", "classify"), model=answerer(num_labels=5), log="quiet")
    backbones = str(tiny / "vit"), str(tiny / "roberta")
    model = ViTRobertaForClassification.from_backbones(*backbones, config.routing, num_labels=3)
    with pytest.raises(ConfigError, match="the model has 3 labels, the data 5"):
        train(config, model=model, log="quiet")
    config = override(config, output_dir=str(tmp_path / "again"))
    model = load_pretrained(run / "last")
    model.__class__ = type("Own", (ViTRobertaForClassification,), {})  # a user's subclass is one of the task's too
    again = train(config, model=model, log="quiet")
    assert again.best_metric == 100.0


def test_command_line(tiny, run, tmp_path, capsys):
    images = [str(path) for path in sorted((tiny / "data" / "val2014").iterdir())[:2]]
    assert main(["predict", str(run), *images, "--text", QUESTION, "--top", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["image"], row["label"]) for row in rows] == list(zip(images, COLOURS, strict=False))
    for row in rows:
        assert next(iter(row["probabilities"])) == row["label"]
        assert 0.5 < sum(row["probabilities"].values()) <= 1 + 1e-6
        assert len(row["probabilities"]) == 2
    probabilities = Predictor(run).predict(images, STATEMENT, top=9)[1]["probabilities"]
    assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
    for args, message in (
        ((), "needs a text"),
        (("--text", " "), "none of them empty"),
        (("--text", "a", "b", "c"), "a sentence or two"),
        (("--text", "a", "--top", "0"), "top=0"),
    ):
        assert main(["predict", str(run), images[0], *args]) == 2
        assert message in capsys.readouterr().err
    assert main(["answer", str(run), images[0], QUESTION]) == 2
    assert "use routingvl predict" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "adapter")]) == 0
    assert load_pretrained(tmp_path / "adapter").num_labels == 5


def test_other_tasks_predict_too(tiny, tmp_path):
    image = sorted((tiny / "data" / "val2014").iterdir())[0]
    for task in ("vqa", "caption"):
        train(tiny_config(tiny, tmp_path / task, task, max_steps=2), log="quiet")
    answers = Predictor(tmp_path / "vqa")
    row = answers.predict([image], QUESTION, top=3)[0]
    assert list(row["probabilities"].items()) == answers.answer(image, QUESTION, top=3)
    assert row["answer"] == next(iter(row["probabilities"]))
    captions = Predictor(tmp_path / "caption")
    assert captions.predict([image, image])[1] == {"caption": captions.caption([image])[0]}
    with pytest.raises(ConfigError, match="needs no text"):
        captions.predict([image], QUESTION)
