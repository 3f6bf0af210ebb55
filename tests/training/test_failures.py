"""What goes wrong while a run is opened, trained, validated or saved: nothing is lost, and one sentence says why."""

import json
import os
import signal

import pytest
import torch
from tiny import write_tiny
from training_runs import assert_same_weights, run, weights

from routingvl.data.images import ImageError
from routingvl.models import ViTRobertaForVQA
from routingvl.models.base import ModelOutput
from routingvl.tasks.captioning import CaptionTask
from routingvl.tasks.vqa import VQATask
from routingvl.training import loop, resume
from routingvl.training.log import read_metrics
from routingvl.training.loop import Trainer
from routingvl.training.run_folder import RunError


@pytest.fixture
def own(tmp_path):
    """Inputs that the test may damage."""
    return write_tiny(tmp_path / "inputs")


def saved_step(folder):
    return json.loads((folder / "state" / "training_state.json").read_text())["step"]


# ----------------------------------------------------------------------------------------------------------- opening


def wrong_size(inputs):
    path = inputs / "vit" / "preprocessor_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"size": {"height": 24, "width": 24}}))


def images(inputs):
    return sorted((inputs / "data" / "val2014").iterdir())


def pipe(inputs):
    path = images(inputs)[3]
    path.unlink()
    os.mkfifo(path)


INPUTS = {
    "size": (wrong_size, ValueError, "24.*16"),
    "missing image": (lambda inputs: images(inputs)[3].unlink(), ImageError, "does not exist"),
    "first image": (lambda inputs: images(inputs)[0].write_bytes(b"x"), ImageError, "cannot be read"),
    "pipe": (pipe, ImageError, "not a regular file"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_do_not_fit_leave_no_folder(own, tmp_path, name):
    change, error, message = INPUTS[name]
    change(own)
    with pytest.raises(error, match=message):
        run(own, tmp_path / "runs" / "run", "vqa")
    assert not (tmp_path / "runs").exists()


def test_no_readable_image_leaves_no_folder(own, tmp_path):
    for path in images(own):
        path.write_bytes(b"x")
    with pytest.raises(ImageError, match="no image of split 'train' can be read"):
        run(own, tmp_path / "run", "vqa", on_bad_image="skip")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_before_any_step_leaves_no_folder(tiny, tmp_path, monkeypatch):
    broken = ModelOutput(torch.tensor(float("nan")), None)
    monkeypatch.setattr(ViTRobertaForVQA, "forward", lambda self, **inputs: broken)
    with pytest.raises(FloatingPointError, match="loss of the first example is nan"):
        run(tiny, tmp_path / "run", "vqa")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- training


def test_weights_that_are_not_finite_replace_nothing(tiny, tmp_path, monkeypatch):
    step = Trainer.train_step

    def ruined(trainer, batches):
        step(trainer, batches)
        if trainer.step == 5:
            next(iter(trainer.trainable.values())).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(Trainer, "train_step", ruined)
    good = run(tiny, tmp_path / "good", "vqa", max_steps=4, eval_every=2)
    with pytest.raises(FloatingPointError, match=r"no longer finite at step 5, what was saved at step 4 stays"):
        run(tiny, tmp_path / "run", "vqa", max_steps=5, eval_every=2, schedule="constant")
    assert saved_step(tmp_path / "run") == 4
    for name in ("best", "last"):
        assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run", name).values())
    assert good.steps == 4


def test_the_first_step_ruins_the_weights(tiny, tmp_path):
    with pytest.raises(FloatingPointError, match=r"no longer finite at step 1, nothing was saved"):
        run(tiny, tmp_path / "run", "vqa", max_steps=1, lr=3e38)
    assert not {"best", "last", "state"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_what_was_trained_is_saved_when_a_data_worker_is_killed(tiny, tmp_path):
    def kill_a_worker(record):
        if record["step"] == 3:
            children = open(f"/proc/self/task/{os.getpid()}/children").read().split()  # noqa: SIM115
            workers = [int(pid) for pid in children if b"python" in open(f"/proc/{pid}/cmdline", "rb").read()]  # noqa: SIM115
            os.kill(workers[-1], signal.SIGKILL)

    with pytest.raises(RunError, match=r"a data worker was killed after step \d+ .*continue with --resume"):
        run(tiny, tmp_path / "run", "vqa", max_steps=500, workers=1, log=kill_a_worker)
    step = saved_step(tmp_path / "run")
    assert 3 <= step < 500
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, step + 1))


def test_an_image_that_breaks_in_the_middle_costs_no_step(own, tmp_path):
    last = images(own)[11]
    last.write_bytes(last.read_bytes()[:50])
    with pytest.raises(ImageError, match=last.name):
        run(own, tmp_path / "run", "vqa", max_steps=50, **{"train.batch_size": 1})
    step = saved_step(tmp_path / "run")
    assert step == len(read_metrics(tmp_path / "run" / "metrics.jsonl"))


# -------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("error", [KeyError("CIDEr"), RuntimeError("out of memory"), ValueError("no word")])
def test_a_failed_validation_is_told_and_the_run_goes_on(tiny, tmp_path, monkeypatch, caplog, error):
    scores = CaptionTask.validation_scores

    def failing(task, predictions):
        if not caplog.records:
            raise error
        return scores(task, predictions)

    monkeypatch.setattr(CaptionTask, "validation_scores", failing)
    result = run(tiny, tmp_path / "run", "caption", max_steps=4, eval_every=2)
    assert f"step 2: validation failed, training goes on ({type(error).__name__}: {error})" in caplog.messages
    assert [r["step"] for r in result.history if r["kind"] == "validation"] == [4]
    assert result.best_step == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_not_the_best(tiny, tmp_path, monkeypatch, caplog, value):
    monkeypatch.setattr(VQATask, "validation_scores", lambda task, predictions: {"accuracy": value})
    result = run(tiny, tmp_path / "run", "vqa", max_steps=2)
    assert result.best_metric is None
    assert caplog.messages[-1] == "no validation succeeded: best/ is the last adapter"
    assert_same_weights(weights(tmp_path / "run", "best"), weights(tmp_path / "run"))


def test_no_readable_image_to_validate_with(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loop, "predict_dataset", lambda *args, **kwargs: {})
    run(tiny, tmp_path / "run", "caption", max_steps=2, on_bad_image="skip")
    assert any("no validation example has a readable image" in message for message in caplog.messages)


def test_the_step_is_saved_before_it_is_validated(tiny, tmp_path, monkeypatch):
    steps = []

    def scores(trainer):
        steps.append(saved_step(tmp_path / "run"))
        return {"accuracy": 1.0}

    monkeypatch.setattr(Trainer, "validation_scores", scores)
    run(tiny, tmp_path / "run", "vqa", max_steps=4, eval_every=2)
    assert steps == [2, 4]


# ------------------------------------------------------------------------------------------------------------ saving


@pytest.mark.parametrize("place", ["state", "metrics", "adapter"])
def test_a_full_disk_names_the_file_and_leaves_the_old_ones(tiny, tmp_path, monkeypatch, place):
    folder = tmp_path / "run"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fill(record):
        if record["step"] == 3:
            if place == "state":
                monkeypatch.setattr(resume, "save_file", full)
            elif place == "adapter":
                monkeypatch.setattr("routingvl.bottlenecks.checkpoint.save_file", full)
            else:
                monkeypatch.setattr("routingvl.training.log.append_text", full)

    names = {"state": f"'{folder}/state'", "adapter": f"'{folder}/last/adapter_model.safetensors'", "metrics": ""}
    with pytest.raises(OSError, match=f"No space left on device.*{names[place]}"):
        run(tiny, folder, "vqa", max_steps=6, save_every=2, log=fill)
    assert saved_step(folder) == 2
    assert not list(folder.rglob(".*"))
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(tiny, folder, "vqa", max_steps=6, save_every=2, resume=True).steps == 6


def test_a_full_disk_at_the_start_leaves_no_folder(tiny, tmp_path, monkeypatch):
    def full(task, folder):
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").touch()
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(VQATask, "save_files", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/runs/run'"):
        run(tiny, tmp_path / "runs" / "run", "vqa")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_before_the_first_step_leaves_a_run_to_resume(tiny, tmp_path, monkeypatch, number):
    open_log = Trainer.open_log
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "open_log", lambda *args: open_log(*args) or os.kill(os.getpid(), number))
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path / "run", "vqa", max_steps=2)
    assert saved_step(tmp_path / "run") == 0
    run(tiny, tmp_path / "run", "vqa", max_steps=2, resume=True)
    run(tiny, tmp_path / "whole", "vqa", max_steps=2)
    assert_same_weights(weights(tmp_path / "run"), weights(tmp_path / "whole"))
