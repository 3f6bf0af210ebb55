"""Evaluation of run folders: result files, metrics, overrides, and its agreement with training."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tiny import SPLITS, tiny_config

from routingvl.config import ConfigError
from routingvl.data.images import ImageRecord
from routingvl.evaluate import evaluate, evaluation_config, load_run
from routingvl.metrics import read_coco_results, read_vqa_results, vqa_report
from routingvl.predict import Predictor
from routingvl.tasks.controls import CONTROLS, ImageControl, ImageOrder
from routingvl.train import train
from routingvl.training.run_folder import RunError, RunFolder

PYTHON_METRICS = {"metrics": ["CIDEr", "BLEU-4"], "caption_tokenizer": "python"}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    settings = {"vqa": {"max_steps": 30}, "caption": {"max_steps": 4}}
    for task, values in settings.items():
        train(tiny_config(tiny, folder / task, task, **values), log="quiet")
    return folder


def test_vqa(tiny, runs):
    metrics = evaluate(runs / "vqa", log="quiet")
    assert (metrics["n"], metrics["rule"], metrics["skipped"], metrics["missing"]) == (SPLITS["test"], "2021", 0, {})
    assert metrics["accuracy"] == 100.0  # four plain colours, learned in 30 steps
    assert metrics["soft_score"] == 100.0
    assert metrics["per_question_type"] == {"what color": 100.0}
    assert metrics["per_answer_type"] == {"other": 100.0}
    written = json.loads((runs / "vqa" / "eval-test" / "metrics.json").read_text())
    assert {key: written[key] for key in metrics} == metrics
    questions = json.loads((tiny / "data" / "karpathy_test.json").read_text())
    answers = read_vqa_results(metrics["predictions"])
    assert answers.keys() == {question["question_id"] for question in questions}
    assert vqa_report(answers, questions)["overall"] == metrics["accuracy"]


def test_captions(tiny, runs):
    metrics = evaluate(runs / "caption", split="val", log="quiet", **PYTHON_METRICS)
    assert metrics["n"] == SPLITS["val"]
    assert set(metrics) >= {"CIDEr", "BLEU-4", "missing", "tokenizer"}
    assert metrics["tokenizer"].startswith("python")
    captions = read_coco_results(metrics["predictions"])
    assert len(captions) == SPLITS["val"]
    assert (runs / "caption" / "eval-val" / "metrics.json").is_file()


def test_an_adapter_without_its_vision_tower_is_named(runs, tmp_path):
    run = shutil.copytree(runs / "vqa", tmp_path / "run")
    path = run / "best" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["backbones"]["vision"] = None
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"best/adapter_config\.json: backbones\.vision is null"):
        evaluate(run, log="quiet", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unavailable_metrics_are_named(runs, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java there
    metrics = evaluate(runs / "caption", limit=3, log="quiet", output=tmp_path / "out")
    assert metrics["METEOR"] is None
    assert "Java" in metrics["missing"]["METEOR"]
    assert metrics["SPICE"] is None
    assert metrics["n"] == 3
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_validation_agrees_with_evaluation(tiny, tmp_path, task):
    config = tiny_config(tiny, tmp_path / "run", task, max_steps=3, num_beams=1, precompute_features=True)
    result = train(config, log="quiet")
    settings = PYTHON_METRICS if task == "caption" else {}
    metrics = evaluate(result.run_dir, "val", log="quiet", precompute_features=False, **settings)
    assert metrics[result.metric] == pytest.approx(result.best_metric)


def test_batch_size_does_not_change_predictions(runs):
    settings = dict(PYTHON_METRICS, num_beams=3, log="quiet")
    alone = evaluate(runs / "caption", **{"eval.batch_size": 1}, **settings)
    one_by_one = read_coco_results(alone["predictions"])
    together = evaluate(runs / "caption", **{"eval.batch_size": 5}, **settings)
    assert read_coco_results(together["predictions"]) == one_by_one


def test_split_without_answers(tiny, runs, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rows = json.loads((tiny / "data" / "karpathy_test.json").read_text())
    bare = [{key: row[key] for key in ("img_id", "question_id", "sent")} for row in rows]
    (data / "karpathy_test.json").write_text(json.dumps(bare))
    metrics = evaluate(runs / "vqa", annotations=str(data), output=tmp_path / "out", log="quiet")
    assert "accuracy" not in metrics
    assert "has no answers" in metrics["missing"]["accuracy"]
    assert len(read_vqa_results(metrics["predictions"])) == len(rows)


def test_skipped_images_are_counted(tiny, runs, tmp_path):
    images = tmp_path / "val2014"
    shutil.copytree(tiny / "data" / "val2014", images)
    sorted(images.iterdir())[-1].write_bytes(b"no image")
    metrics = evaluate(runs / "vqa", images=str(tmp_path), on_bad_image="skip", output=tmp_path / "out", log="quiet")
    assert (metrics["skipped"], metrics["n"]) == (1, SPLITS["test"] - 1)


def test_errors(runs, tmp_path):
    with pytest.raises(RunError, match=r"has no config.yaml"):
        evaluate(tmp_path)
    with pytest.raises(ConfigError, match=r"routing.rank is fixed by the run"):
        evaluate(runs / "vqa", rank=2)
    with pytest.raises(ConfigError, match="did you mean 'num_beams'"):
        evaluate(runs / "vqa", num_beam=2)
    with pytest.raises(RunError, match="has no adapter 'first'"):
        evaluate(runs / "vqa", checkpoint="first")
    with pytest.raises(ConfigError, match=r"data.images: .*gone does not exist"):
        evaluate(runs / "vqa", images=str(tmp_path / "gone"))


def test_caption_settings_are_checked_before_anything_is_predicted(runs, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"eval.metrics='CIDer' .*did you mean 'CIDEr'"):
        evaluate(runs / "caption", metrics=["CIDer"], output=tmp_path / "out")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"caption_tokenizer='ptb' needs Java"):
        evaluate(runs / "caption", caption_tokenizer="ptb", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_and_backbones_may_move_together(tiny, tmp_path):
    home = tmp_path / "old"
    shutil.copytree(tiny, home)
    result = train(tiny_config(home, home / "run", "vqa", max_steps=2), log="quiet")
    before = evaluate(result.run_dir, log="quiet")
    shutil.move(home, tmp_path / "new")
    data = str(tmp_path / "new" / "data")
    after = evaluate(tmp_path / "new" / "run", annotations=data, images=data, log="quiet")
    assert after["soft_score"] == before["soft_score"]


def test_predictor(tiny, runs, tmp_path):
    images = sorted((tiny / "data" / "val2014").iterdir())[:3]
    vqa = Predictor(runs / "vqa")
    answers = vqa.answer(images[0], "what color is it?", top=9)
    assert answers[0][0] == "red"
    probabilities = [probability for _, probability in answers]
    assert len(probabilities) == 4
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(0 < probability < 1 for probability in probabilities)
    Image.open(images[0]).convert("L").save(tmp_path / "grey.png")
    captions = Predictor(runs / "caption", **{"eval.batch_size": 2}).caption([*images, tmp_path / "grey.png"])
    assert len(captions) == 4
    with pytest.raises(ConfigError, match="use routingvl answer"):
        vqa.caption(images)
    with pytest.raises(ConfigError, match="question is empty"):
        vqa.answer(images[0], "  ")


@pytest.mark.parametrize("features", [False, True], ids=["files", "features"])
def test_a_model_that_reads_the_image_loses_its_score_without_it(features, tiny, runs, tmp_path):
    plain = evaluate(runs / "vqa", log="quiet", output=tmp_path / "own")
    found = {"own": plain}
    for control in CONTROLS:
        settings = {"data.precompute_features": features, "output": tmp_path / control, "log": "quiet"}
        found[control] = evaluate(runs / "vqa", image_control=control, **settings)
        assert found[control]["image_control"] == control
        assert found[control]["n"] == plain["n"]
    assert "image_control" not in plain
    assert plain["accuracy"] == 100.0
    assert all(found[control]["accuracy"] < 100.0 for control in CONTROLS)


def test_image_controls(tiny, runs):
    task, _ = load_run(RunFolder(runs / "vqa"), "best", evaluation_config(RunFolder(runs / "vqa")))
    dataset = task.dataset(task.load_split("test"), training=False)
    shuffled, zeros, ones, noise = (ImageControl(dataset, task, control) for control in CONTROLS)
    images = [dataset.image(index, dataset.example(index)) for index in range(len(dataset))]
    by_path = {image.path: dataset.picture(image)["pixel_values"] for image in images}
    order, seen = ImageOrder((image,) for image in images), []
    for index, image in enumerate(images):
        item = shuffled[index]
        assert item.keys() == dataset[index].keys()
        assert {key: item[key] for key in item if key != "pixel_values"} == dataset.example(index)
        ((other,), *_) = order.others((image,))
        path = other.path
        assert path.read_bytes() != image.path.read_bytes()
        assert torch.equal(item["pixel_values"], by_path[path])
        seen.append(path)
    assert len(set(seen)) == len(by_path) - 1  # two files are one picture; else each image serves another one
    for control, value in ((zeros, 0.0), (ones, 1.0)):
        assert torch.equal(control[0]["vision_features"], torch.full((1, 32), value))
        assert "pixel_values" not in control[0]
    assert torch.equal(noise[1]["vision_features"], noise[1]["vision_features"])
    assert not torch.equal(noise[0]["vision_features"], noise[1]["vision_features"])


@pytest.mark.parametrize("control", CONTROLS)
def test_image_controls_score_the_examples_that_are_scored_without_them(control, tiny, runs, tmp_path):
    data = shutil.copytree(tiny / "data", tmp_path / "data")
    folder = RunFolder(runs / "vqa")
    settings = {"data.annotations": str(data), "data.images": str(data), "data.on_bad_image": "skip", "log": "quiet"}
    task, _ = load_run(folder, "best", evaluation_config(folder, **{k: v for k, v in settings.items() if "." in k}))
    bad = task.load_split("test").images[0].path
    bad.write_bytes(b"no image")
    found = []
    for options in ({}, {"image_control": control}):
        metrics = evaluate(runs / "vqa", output=tmp_path / str(len(found)), **options, **settings)
        found.append((metrics["n"], metrics["skipped"], read_vqa_results(metrics["predictions"]).keys()))
    assert found[0] == found[1]
    assert found[0][1] > 0


def test_an_example_gets_as_many_other_pictures(tmp_path):
    for name, content in (("a", "x"), ("b", "x"), ("c", "y"), ("d", "x"), ("e", "z")):
        (tmp_path / name).write_text(content)
    record = {name: ImageRecord(name, name, tmp_path / name) for name in "abcdef"}  # there is no file f
    order = ImageOrder(tuple(map(record.get, names)) for names in ("a", "b", "c", "d", "f", "ab", "da", "ce", "a"))
    assert len(order.groups) == 8
    for names, want in (("a", "cf"), ("b", "cf"), ("c", "abdf"), ("f", "abcd")):
        assert {image.image_id for (image,) in order.others((record[names],))} == set(want)
    others = list(order.others((record["a"], record["b"])))
    assert others == [(record["c"], record["e"])]


def test_image_controls_refuse(runs):
    with pytest.raises(ConfigError, match="image_control"):
        evaluate(runs / "vqa", image_control="swapped", log="quiet")
    with pytest.raises(ConfigError, match=r"needs two images, and split 'test' has none but COCO_val2014_\d+\.jpg"):
        evaluate(runs / "vqa", image_control="shuffled", limit=1, log="quiet")
