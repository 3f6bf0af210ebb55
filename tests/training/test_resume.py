"""Resuming: bit for bit on what the run began with, and one sentence for anything else, with nothing changed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_config, write_tiny
from training_runs import assert_same_weights, weights

from routingvl.config.files import load_config
from routingvl.config.schema import NEWER_KEYS, override
from routingvl.train import train
from routingvl.training import opening
from routingvl.training.log import read_metrics
from routingvl.training.loop import PROGRESS, Trainer
from routingvl.training.run_folder import RunError

SETTINGS = {"max_steps": 8, "eval_every": 4, "dropout": 0.2}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with inputs in inputs/ and a run in run/, stopped at step 4, and the weights it would have had."""
    folder = tmp_path_factory.mktemp("stopped")
    write_tiny(folder / "inputs")
    whole = train(tiny_config(folder / "inputs", folder / "whole", "vqa", **SETTINGS), log="quiet")
    step = Trainer.train_step

    def step_and_stop(trainer, batches):
        step(trainer, batches)
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGHUP)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_config(folder / "inputs", folder / "run", "vqa", **SETTINGS), log="quiet")
    return folder, weights(whole.run_dir)


@pytest.fixture
def again(stopped):
    """The same folder, put back afterwards as it was."""
    folder, _ = stopped
    shutil.copytree(folder, kept := folder.with_name("kept"))
    yield folder
    shutil.rmtree(folder)
    kept.rename(folder)


def resume(folder, **settings):
    config = override(load_config(folder / "run" / "config.yaml"), **settings)
    return train(config, log="quiet", resume=True)


def edit_json(path, change):
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def edit_config(key, value):
    def edit(folder):
        path = folder / "run" / "config.yaml"
        config = yaml.safe_load(path.read_text())
        part, name = key.split(".")
        config[part][name] = value
        path.write_text(yaml.safe_dump(config))

    return edit


def edit_image(folder):
    path = next((folder / "inputs" / "data" / "val2014").iterdir())
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened


def edit_weight(folder):
    path = folder / "inputs" / "roberta" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.0.output.dense.weight"][3, 5] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def swap_words(folder):
    def swap(tokenizer):
        words = tokenizer["model"]["vocab"]
        one, other = [word for word in words if words[word] > 5][:2]
        words[one], words[other] = words[other], words[one]

    edit_json(folder / "inputs" / "roberta" / "tokenizer.json", swap)


DATA = Path("inputs") / "data"
OTHER = {
    "lr": (edit_config("train.lr", 0.5), "train.lr was 0.01 and is now 0.5"),
    "rank": (edit_config("routing.rank", 8), "routing.rank was 4 and is now 8"),
    "label": (
        lambda f: edit_json(f / DATA / "karpathy_train.json", lambda rows: rows[0].update(label={"blue": 1.0})),
        "the training examples",
    ),
    "order": (
        lambda f: edit_json(f / DATA / "karpathy_train.json", lambda rows: rows[::-1]),
        "the training examples",
    ),
    "validation": (
        lambda f: edit_json(f / DATA / "karpathy_val.json", lambda rows: rows[0].update(label={"blue": 1.0})),
        "the validation examples",
    ),
    "answers": (
        lambda f: edit_json(f / DATA / "trainval_label2ans.json", lambda rows: rows[::-1]),
        "the answers to choose from",
    ),
    "image": (edit_image, r"the content of images \(data.images\) changed, .*\.jpg for one"),
    "preprocessing": (
        lambda f: edit_json(f / "inputs/vit/preprocessor_config.json", lambda c: c.update(image_mean=[0.4, 0.5, 0.5])),
        "the image preprocessing",
    ),
    "weight": (edit_weight, "the text backbone"),
    "backbone settings": (
        lambda f: edit_json(f / "inputs/roberta/config.json", lambda c: c.update(layer_norm_eps=1e-3)),
        "the text backbone",
    ),
    "tokenizer": (swap_words, "the tokenizer"),
    "run.json": (lambda f: (f / "run/run.json").unlink(), "run.json"),
    "run.json of others": (lambda f: (f / "run/run.json").write_text("{}"), "not written by this version"),
    "damaged run.json": (lambda f: edit_json(f / "run/run.json", lambda v: v.update(content=5)), "content is no dict"),
    "escaping run.json": (lambda f: edit_json(f / "run/run.json", lambda v: v.update(files={"../x": "0"})), "damaged"),
    "no state": (lambda f: shutil.rmtree(f / "run/state"), "nothing to resume"),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_run_is_refused_by_name_and_nothing_is_written(again, name):
    change, message = OTHER[name]
    change(again)
    before = contents(again / "run")
    with pytest.raises(RunError, match=message):
        resume(again)
    assert contents(again / "run") == before


def state(change):
    return lambda folder: edit_json(folder / "run/state/training_state.json", change)


def tensors(change):
    def edit(folder):
        path = folder / "run/state/training_state.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        found = load_file(path)
        save_file(change(found) or found, path, metadata=metadata)

    return edit


def first(found, start, end=""):
    return next(name for name in sorted(found) if name.startswith(start) and name.endswith(end))


def fill(start, value, end=""):
    return tensors(lambda t: t[first(t, start, end)].view(-1)[:1].fill_(value) and None)


DAMAGED = {
    **{f"step {step!r}": state(lambda v, step=step: v.update(step=step)) for step in (10**9, -5, 1.5, True, "4", 3)},
    "step NaN": state(lambda v: v.update(step=float("nan"))),
    **{
        f"no {key}": state(lambda v, key=key: {name: v[name] for name in v if name != key})
        for key in (*PROGRESS, "format", "run", "schedule_steps", "scaler", "random", "history")
    },
    "schedule": state(lambda v: v.update(schedule_steps=-1)),
    "best": state(lambda v: v.update(best="high")),
    "scaler": state(lambda v: v.update(scaler={"scale": 1.0})),
    "history": state(lambda v: v.update(history=[5])),
    "another run": state(lambda v: v.update(run="0" * 32)),
    "more processes": state(lambda v: v.update(random=v["random"] * 2)),
    "Python's random state": state(lambda v: v["random"][0].update(python=[1, 2])),
    "numpy's random state": state(lambda v: v["random"][0].update(numpy=["MT19937", [1], 2, 0, 0.0])),
    "no JSON": lambda folder: (folder / "run/state/training_state.json").write_text("["),
    "weights of another shape": tensors(lambda t: t.update({first(t, "trainable/"): torch.zeros(3, 3)})),
    "moments of another shape": tensors(lambda t: t.update({first(t, "optimizer/"): torch.zeros(3, 3)})),
    "float16": tensors(lambda t: {k: v.half() if k.startswith("trainable/") else v for k, v in t.items()}),
    "a weight missing": tensors(lambda t: t.pop(first(t, "trainable/")) is None),
    "a moment missing": tensors(lambda t: t.pop(first(t, "optimizer/")) is None),
    "a tensor more": tensors(lambda t: t.update(more=torch.zeros(1))),
    "NaN": fill("trainable/", float("nan")),
    "infinity": fill("optimizer/", float("inf")),
    "a negative square": fill("optimizer/", -1.0, "/exp_avg_sq"),
    "a moment's step": fill("optimizer/", 1e9, "/step"),
    "torch's random state": tensors(lambda t: t["random/0/torch"].zero_() is None),
    "a truncated file": lambda folder: os.truncate(folder / "run/state/training_state.safetensors", 1000),
    "no tensors": lambda folder: (folder / "run/state/training_state.safetensors").unlink(),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_state_that_cannot_be_of_this_run_is_refused(again, name):
    DAMAGED[name](again)
    before = contents(again / "run")
    with pytest.raises(RunError, match="training_state"):
        resume(again)
    assert contents(again / "run") == before


def test_the_state_of_an_older_version_is_refused(again):
    shutil.rmtree(again / "run/state")
    (again / "run/state").mkdir()
    (again / "run/state/training_state.pt").write_bytes(b"pickle")
    with pytest.raises(RunError, match=r"training_state.pt was written by an older version .* start the run anew"):
        resume(again)


def move_inputs(folder):
    (folder / "inputs").rename(folder / "moved")
    data, model = folder / "moved" / "data", folder / "moved"
    paths = {"annotations": data, "images": data, "vision": model / "vit", "text": model / "roberta"}
    return {name: str(path) for name, path in paths.items()}


def touch_images(folder):
    for path in (folder / DATA / "val2014").iterdir():
        os.utime(path)


def without_newer_settings(folder):
    """The files of a run that began before some settings were there."""

    def older(recorded):
        for key in NEWER_KEYS:
            del recorded["config"][key]

    edit_json(folder / "run/run.json", older)
    config = yaml.safe_load((folder / "run/config.yaml").read_text())
    for part, _, name in (key.rpartition(".") for key in NEWER_KEYS):
        del config[part][name]
    (folder / "run/config.yaml").write_text(yaml.safe_dump(config))


SAME = {
    "nothing": lambda folder: None,
    "an older version": without_newer_settings,
    "moved inputs": move_inputs,
    "touched images": touch_images,
    "workers": lambda folder: {"workers": 1},
    "metrics": lambda folder: (folder / "run/metrics.jsonl").write_text("5\n") and None,
    "files of the task": lambda folder: shutil.rmtree(folder / "run/tokenizer"),
    "labels": lambda folder: (folder / "run/label2ans.json").write_text("[]") and None,
    "image list": lambda folder: (folder / "run/images.jsonl").unlink(),
    "adapters": lambda folder: [shutil.rmtree(folder / "run" / name) for name in ("best", "last")] and None,
}


QUIET = ("nothing", "an older version", "touched images", "image list")  # what is not worth a word


@pytest.mark.parametrize("name", SAME)
def test_the_same_run_goes_on_bit_for_bit_and_what_it_wrote_is_mended(stopped, again, name, caplog):
    kept = {name: (again / "run" / name).read_bytes() for name in ("label2ans.json", "tokenizer/tokenizer.json")}
    history = read_metrics(again / "run" / "metrics.jsonl")
    settings = SAME[name](again) or {}
    result = resume(again, **settings)
    assert_same_weights(stopped[1], weights(again / "run"))
    assert {name: (again / "run" / name).read_bytes() for name in kept} == kept
    assert result.history[: len(history)] == history
    assert read_metrics(again / "run" / "metrics.jsonl") == result.history
    assert (again / "run" / "best" / "adapter_config.json").is_file()
    assert bool(caplog.records) == (name not in QUIET)


def test_unchanged_images_are_not_read_again(again, monkeypatch):
    resume(again)
    read = []
    digest = opening.file_digest
    monkeypatch.setattr(opening, "file_digest", lambda path: read.append(path) or digest(path))
    path = next((again / DATA / "val2014").iterdir())
    os.utime(path)
    resume(again)
    assert read == [path]


def test_a_validation_that_was_cut_short_is_done_on_resuming(tiny, tmp_path, monkeypatch):
    config = tiny_config(tiny, tmp_path / "run", "vqa", **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validation_scores", lambda trainer: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):  # at once, because the step is saved
            train(config, log="quiet")
    assert json.loads((tmp_path / "run/state/training_state.json").read_text())["step"] == 4
    result = train(config, log="quiet", resume=True)
    assert [record["step"] for record in result.history if record["kind"] == "validation"] == [4, 8]
