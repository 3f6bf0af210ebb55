"""Several data sets in one run: what is drawn, learned and scored, resuming, and what cannot be mixed."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from pair_and_gqa_data import write_gqa, write_nlvr2
from task_texts import KINDS, write_text_model
from tiny import SPLITS, tiny_config, write_tiny
from training_runs import assert_same_weights, losses, weights

from routingvl.cli import main
from routingvl.config import ConfigError
from routingvl.config.files import config_to_yaml, load_config
from routingvl.config.schema import override
from routingvl.data.files import DataError
from routingvl.data.images import ImagePreprocessor
from routingvl.evaluate import evaluate
from routingvl.metrics import read_coco_results, read_gqa_results, read_nlvr2_results
from routingvl.predict import Predictor
from routingvl.tasks.base import find_task
from routingvl.train import train
from routingvl.training.log import read_metrics

FAST = {"eval.metrics": ["CIDEr"], "eval.caption_tokenizer": "python", "max_text_length": 30}
FAST |= {"eval.num_beams": 1, "eval.max_new_tokens": 4, "eval.batch_size": 16}
SIZES = {"vqa": SPLITS["train"], "gqa": 16, "nlvr": 32, "coco": 2 * SPLITS["train"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    folder = write_tiny(tmp_path_factory.mktemp("tiny"))
    write_text_model(folder / "bart", "bart")
    write_gqa(folder / "gqa")
    write_nlvr2(folder / "nlvr2")
    return folder


def mixture_of(tiny):
    """The four data sets of VL-Adapter's setting; captions twice in an epoch."""
    gqa, nlvr2 = ({"annotations": str(tiny / name), "images": str(tiny / name / "images")} for name in ("gqa", "nlvr2"))
    coco = {"annotations": str(tiny / "data"), "images": str(tiny / "data")}
    return {
        "vqa": {"task": "vqa-generate", "prompt": "vqa: ", **coco},
        "gqa": {"task": "gqa-generate", "prompt": "gqa: ", "test_split": "val_all", **gqa},
        "nlvr": {
            "task": "nlvr2-generate",
            "prompt": "nlvr: ",
            "val_split": "dev",
            "test_split": "test1",
            **nlvr2,
        },
        "coco": {"task": "caption-generate", "prompt": "caption:", "weight": 2, **coco},
    }


def config_of(tiny, output, task="mixture", **settings):
    if task == "mixture":
        settings = {"mixture": mixture_of(tiny), "annotations": None, "images": None} | settings
    return tiny_config(tiny, output, task, text=str(tiny / "bart"), targets=KINDS["bart"][4], **FAST | settings)


def task_of(tiny, **settings):
    return find_task("mixture")(config_of(tiny, tiny / "none", **settings), None, ImagePreprocessor(size=16))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """Six steps with validations at the third and the last."""
    return train(config_of(tiny, tmp_path_factory.mktemp("runs") / "whole", eval_every=3, save_every=1), log="quiet")


def test_an_epoch_has_each_example_as_often_as_it_weighs(tiny):
    task = task_of(tiny)
    train_split, val_split = task.read_training_splits()
    data = task.dataset(train_split, training=True)
    counts = Counter(example.id.partition(":")[0] for example in data.examples)
    assert counts == {name: size * (1 + (name == "coco")) for name, size in SIZES.items()}
    prompts = {example.id.partition(":")[0]: example.prompt for example in data.examples}
    assert {name: prompt.partition(":")[0] for name, prompt in prompts.items()} == {
        "vqa": "vqa", "gqa": "gqa", "nlvr": "nlvr", "coco": "caption"
    }  # fmt: skip
    assert {len(example.images) for example in data.examples if example.id.startswith("nlvr:")} == {2}
    assert {example.target for example in data.examples if example.id.startswith("nlvr:")} == {"true", "false"}
    assert len(task.dataset(val_split, training=False)) == SPLITS["val"] + 9 + 16 + SPLITS["val"]


def test_scores_of_each_data_set_and_their_mean(run, tiny):
    first, last = (record for record in run.history if record["kind"] == "validation")
    assert {"vqa/accuracy", "gqa/accuracy", "nlvr/consistency", "coco/CIDEr", "mean"} <= last.keys()
    parts = [last[f"{name}/accuracy"] for name in ("vqa", "gqa", "nlvr")] + [100 * last["coco/CIDEr"]]
    assert last["mean"] == pytest.approx(sum(parts) / 4)
    assert (run.metric, run.best_metric) == ("mean", max(first["mean"], last["mean"]))
    assert losses(run)[-1] < losses(run)[0]


def test_evaluation(run, tiny):
    metrics = evaluate(run.run_dir, log="quiet")
    reports = metrics["tasks"]
    assert [reports[name]["n"] for name in SIZES] == [SPLITS["test"], 13, 16, SPLITS["test"]]
    assert reports["gqa"]["missing"] == {}
    folder = Path(metrics["predictions"])
    assert len(read_gqa_results(folder / "gqa_val_all_whole-gqa_results.json")) == 13
    found = read_nlvr2_results(folder / "nlvr2_test1_whole-nlvr_results.csv")
    rows = [json.loads(line) for line in (tiny / "nlvr2" / "test1.json").read_text().splitlines()]
    right = sum(found[row["identifier"]] == row["label"] for row in rows)
    assert reports["nlvr"]["accuracy"] == round(100 * right / 16, 2)
    ids = read_coco_results(folder / "captions_test_whole-coco_results.json").keys()
    assert ids == {121 - SPLITS["test"] + i + 1 for i in range(SPLITS["test"])}
    one = evaluate(run.run_dir, "nlvr:dev", image_control="shuffled", log="quiet")
    assert (one["n"], one["mean"]) == (16, one["tasks"]["nlvr"]["accuracy"])
    assert Path(one["predictions"]).name == "nlvr2_dev_whole-nlvr_results.csv"
    hidden = evaluate(run.run_dir, "gqa:test", log="quiet")
    assert hidden["missing"] == {"mean": "gqa has no score"}
    image = next((tiny / "gqa" / "images").iterdir())
    assert Predictor(run.run_dir).predict([image], "gqa: What color?")[0].keys() == {"answer"}
    for split, message in (
        ("dev", r"split='dev' is not one of 'train', 'val', 'test', 'vqa:SPLIT'"),
        ("nlvr2:dev", r"the data set of split='nlvr2' is not one of .*; did you mean 'nlvr'"),
    ):
        with pytest.raises(ConfigError, match=message):
            evaluate(run.run_dir, split, log="quiet")


def test_resuming_is_going_on(run, tiny, tmp_path):
    class StopError(Exception):
        pass

    def stop(record):
        if record["kind"] == "train" and record["step"] == 4:
            raise StopError

    config = config_of(tiny, tmp_path / "run", eval_every=3, save_every=1)
    with pytest.raises(StopError):
        train(config, log=stop)
    shutil.copytree(tiny / "gqa", tmp_path / "gqa")  # a data set may lie elsewhere by now
    moved = {"annotations": str(tmp_path / "gqa"), "images": str(tmp_path / "gqa" / "images")}
    elsewhere = mixture_of(tiny) | {"gqa": mixture_of(tiny)["gqa"] | moved}
    resumed = train(override(config, mixture=elsewhere), log="quiet", resume=True)
    assert losses(resumed) == losses(run)
    for name in ("best", "last"):
        assert_same_weights(weights(resumed.run_dir, name), weights(run.run_dir, name))
    changed = override(config, mixture=mixture_of(tiny) | {"coco": {**mixture_of(tiny)["coco"], "weight": 1}})
    with pytest.raises(ValueError, match=r"data\.mixture\.coco\.weight was 2 and is now 1"):
        train(changed, log="quiet", resume=True)


@pytest.mark.slow
def test_two_processes_equal_one(tiny, tmp_path):
    settings = {"max_steps": 4, "accumulation": 1, "eval_every": 2}
    alone = train(config_of(tiny, tmp_path / "1", **settings), log="quiet")
    path, shared = tmp_path / "config.yaml", tmp_path / "2"
    path.write_text(config_to_yaml(config_of(tiny, shared, **settings)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "routingvl"]
    done = subprocess.run([*launch, "train", "--config", str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = read_metrics(shared / "metrics.jsonl")
    assert [r["loss"] for r in records if r["kind"] == "train"] == pytest.approx(losses(alone), rel=1e-5)
    scores, expected = (
        [{key: value for key, value in r.items() if "/" in key or key == alone.metric} for r in found]
        for found in ([r for r in of if r["kind"] == "validation"] for of in (records, alone.history))
    )
    assert scores == [pytest.approx(score, rel=1e-4) for score in expected]
    for name, value in weights(alone.run_dir).items():
        torch.testing.assert_close(weights(shared)[name], value, rtol=1e-3, atol=2e-5)


def test_features_from_the_cache(run, tiny, tmp_path):
    cached = train(
        config_of(tiny, tmp_path / "run", feature_cache=str(tmp_path / "features"), val_split=None), log="quiet"
    )
    assert losses(cached) == pytest.approx(losses(run), rel=1e-5)


def test_on_the_command_line(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tiny)  # paths of data sets may be relative
    mixture = json.loads(json.dumps(mixture_of(tiny)).replace(f"{tiny}/", ""))
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config_of(tiny, tmp_path / "run", mixture=mixture, max_steps=1, val_split=None)))
    assert load_config(path).absolute().data.mixture == mixture_of(tiny)
    assert main(["train", "--config", str(path), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == sum(SIZES.values()) + SIZES["coco"]
    assert main(["train", "--config", str(path), "--quiet"]) == 0
    mixture["gqa"]["annotations"] = "gone"
    given = ["--data.mixture", json.dumps(mixture)]
    assert main(["train", "--config", str(path), *given, "--dry-run"]) == 0
    assert "gone does not exist, so the numbers of examples" in capsys.readouterr().out
    assert main(["train", "--config", str(path), *given, "--overwrite"]) == 2
    assert "data.mixture.gqa.annotations: gone does not exist" in capsys.readouterr().err
    settings = path.read_text().replace("weight: 2", "weight: 0")
    (tiny / "bad.yaml").write_text(settings)
    assert main(["train", "--config", "bad.yaml"]) == 2
    assert "bad.yaml: data.mixture.coco: weight=0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"task": "classify"}, r"data\.mixture\.one\.task: the one model .* task 'classify' does"),
        ({"task": "mixture"}, r"data\.mixture\.one\.task: .* task 'mixture' does not"),
        ({"task": "vqa-genrate"}, r"data\.mixture\.one: task='vqa-genrate' is .*did you mean 'vqa-generate'"),
        ({"task": "vqa-generate", "wieght": 2}, "mixture.one: unknown key 'wieght'; did you mean 'weight'"),
        ({"task": "vqa-generate", "weight": 0}, "mixture.one: weight=0 must be at least 1"),
        ({"task": "vqa-generate", "weight": 0.5}, r"mixture.one: weight=0\.5 must be an integer"),
        ({"prompt": "vqa"}, "mixture.one: task missing"),
        ("vqa", "mixture.one must hold keys such as task, not 'vqa'"),
    ],
)
def test_parts_that_cannot_be(tiny, tmp_path, part, message):
    data = str(tiny / "data")
    with pytest.raises(ConfigError, match=message):
        train(config_of(tiny, tmp_path / "run", mixture={"one": part}, annotations=data, images=data), log="quiet")


def test_faults(tiny, tmp_path):
    for mixture, message in (({}, "mixture is empty"), ({"a:b": {}}, "mixture: 'a:b' must be a name of letters")):
        with pytest.raises(ConfigError, match=message):
            config_of(tiny, tmp_path / "run", mixture=mixture)
    with pytest.raises(ConfigError, match=r"data\.mixture\.one\.images is not set"):
        train(
            config_of(tiny, tmp_path, mixture={"one": {"task": "vqa-generate", "annotations": str(tiny)}}), log="quiet"
        )
    with pytest.raises(ConfigError, match=r"task 'mixture' needs data\.mixture"):
        train(config_of(tiny, tmp_path / "run", mixture=None, **dict.fromkeys(("annotations", "images"), str(tiny))))
    other = {"annotations": str(tiny / "data"), "images": str(tiny / "data"), "mixture": mixture_of(tiny)}
    with pytest.raises(ConfigError, match=r"task 'vqa-generate' reads one data set, not data\.mixture"):
        train(config_of(tiny, tmp_path / "run", "vqa-generate", **other), log="quiet")
    single = mixture_of(tiny)["coco"] | {"annotations": str(tmp_path / "captions.json")}
    content = json.loads((tiny / "data" / "dataset_coco.json").read_text())["images"]
    images = [{"id": image["cocoid"], "file_name": image["filename"]} for image in content]
    captions = [{"id": i, "image_id": image["id"], "caption": "a"} for i, image in enumerate(images)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    task = task_of(tiny, mixture={"coco": single})
    with pytest.raises(
        DataError, match=r"captions\.json names no splits, so it cannot be trained on and serve as 'test'"
    ):
        task.load_split("test")
    assert len(task.load_split("train").images) == len(images)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gqa", {"val_split": "train"}, r"^splits 'train' and 'train' share .* set data\.mixture\.gqa\.val_split to"),
        ("gqa", {"train_split": "non"}, r"^no questions of split 'non'.*: data\.mixture\.gqa\.annotations must be"),
        ("nlvr", {"train_split": "non"}, r"^cannot read .*non\.json: .*; data\.mixture\.nlvr\.annotations must be"),
        ("nlvr", {"annotations": "few"}, r"^data\.mixture\.nlvr: .*dev\.json has no examples"),
    ],
)
def test_faults_of_a_data_set_name_its_own_settings(tiny, tmp_path, monkeypatch, name, changes, message):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny / "nlvr2", tmp_path / "few")
    (tmp_path / "few" / "dev.json").write_text("")
    parts = mixture_of(tiny)
    with pytest.raises(DataError, match=message):
        task_of(tiny, mixture=parts | {name: parts[name] | changes}).read_training_splits()


@pytest.mark.parametrize("task", ["gqa-generate", "nlvr2-generate", "caption-generate"])
def test_data_sets_alone(tiny, tmp_path, task):
    name = {"gqa-generate": "gqa", "nlvr2-generate": "nlvr", "caption-generate": "coco"}[task]
    part = mixture_of(tiny)[name]
    settings = {key: part[key] for key in ("annotations", "images", "val_split") if key in part}
    result = train(config_of(tiny, tmp_path / "run", task, max_steps=2, **settings), log="quiet")
    metrics = evaluate(result.run_dir, part.get("test_split", "test"), log="quiet")
    assert metrics["missing"] == {}
    images = sorted(path for path in Path(settings["images"]).rglob("*.[jp][pn]g"))[:2]
    predictor = Predictor(result.run_dir)
    rows = predictor.predict(images, None if name == "coco" else "Both squares have the same color.")
    assert [set(row) for row in rows] == {"gqa": [{"answer"}] * 2, "nlvr": [{"answer"}], "coco": [{"caption"}] * 2}[
        name
    ]
    if name == "coco":
        assert predictor.caption(images[:1]) == [rows[0]["caption"]]


@pytest.mark.parametrize("task", ["mixture", "caption", "vqa-generate"])
def test_a_list_of_answers_is_refused_where_answers_are_written(tiny, tmp_path, task):
    answers = tmp_path / "answers.json"
    answers.write_text('["yes", "no"]')
    with pytest.raises(
        ConfigError, match=r"data\.answers: task '.*' writes its answers and chooses none; leave it null"
    ):
        train(config_of(tiny, tmp_path / "run", task, answers=str(answers)), log="quiet")
