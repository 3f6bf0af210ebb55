"""The training loop end to end on tiny backbones: learning, resuming, reproducibility, accumulation, and its errors."""

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from PIL import Image
from tiny import tiny_config
from training_runs import assert_same_weights, losses, run, weights

from routingvl.config import ConfigError
from routingvl.config.files import config_to_yaml
from routingvl.config.schema import override
from routingvl.data.images import ImageError
from routingvl.models import load_pretrained
from routingvl.train import train
from routingvl.training.log import read_metrics
from routingvl.training.loop import Trainer
from routingvl.training.run_folder import RunError

TASKS = ("vqa", "caption", "classify")


@pytest.mark.parametrize("task", TASKS)
def test_training_lowers_the_loss_and_fills_the_folder(tiny, tmp_path, task):
    result = run(tiny, tmp_path / "run", task, max_steps=25, eval_every=10)
    assert sum(losses(result)[-5:]) < sum(losses(result)[:5])
    assert [r["step"] for r in result.history if r["kind"] == "validation"] == [10, 20, 25]
    found = {path.name for path in result.run_dir.iterdir()}
    assert found >= {
        "best", "last", "state", "config.yaml", "environment.json", "metrics.jsonl", "tokenizer", "train.log"
    }  # fmt: skip
    assert not [name for name in found if name.startswith(".")]
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history
    environment = json.loads((result.run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    assert environment["hardware"]["cpus"] >= 1
    values = [r[result.metric] for r in result.history if r["kind"] == "validation"]
    assert result.best_metric == max(values)
    assert result.best_step == [10, 20, 25][values.index(max(values))]
    assert result.trainable == sum(tensor.numel() for tensor in weights(result.run_dir).values())


@pytest.mark.parametrize(("task", "log_every"), [("vqa", 1), ("caption", 1), ("caption", 3), ("classify", 1)])
def test_resumed_run_equals_uninterrupted_run(tiny, tmp_path, monkeypatch, task, log_every):
    # Dropout makes the random state matter, and 5 examples a step make a step cross the end of an epoch.
    settings = {"max_steps": 9, "train.batch_size": 5, "dropout": 0.3, "eval_every": 4, "log_every": log_every}
    whole = run(tiny, tmp_path / "whole", task, **settings)

    step = Trainer.train_step

    def step_and_stop(trainer, batches):
        step(trainer, batches)
        if trainer.step == 5:  # with a line every 3 steps this is between two lines
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path / "parts", task, **settings)
    torch.manual_seed(12345)  # a new process starts from some other random state
    resumed = run(tiny, tmp_path / "parts", task, resume=True, **settings)
    assert_same_weights(weights(whole.run_dir), weights(resumed.run_dir))
    assert_same_weights(weights(whole.run_dir, "best"), weights(resumed.run_dir, "best"))
    assert losses(resumed) == losses(whole)
    assert (resumed.best_metric, resumed.best_step) == (whole.best_metric, whole.best_step)


def test_interrupt_leaves_a_loadable_checkpoint(tiny, tmp_path):
    def stop_at_once(record):
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "run", "vqa", log=stop_at_once, max_steps=50)
    assert (tmp_path / "run" / "state" / "training_state.json").is_file()
    load_pretrained(tmp_path / "run" / "last")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resume_refuses_other_settings_and_empty_folders(tiny, tmp_path):
    run(tiny, tmp_path / "run", "vqa", max_steps=1)
    with pytest.raises(RunError, match=r"cannot resume .*train.lr was 0.01 and is now 0.5"):
        run(tiny, tmp_path / "run", "vqa", max_steps=1, lr=0.5, resume=True)
    with pytest.raises(RunError, match="nothing to resume"):
        run(tiny, tmp_path / "other", "vqa", resume=True)


def test_run_folder_is_not_overwritten_by_accident(tiny, tmp_path):
    first = run(tiny, tmp_path / "run", "vqa", max_steps=1)
    before = weights(first.run_dir)
    with pytest.raises(RunError, match=r"is not empty; .*--resume, .*--overwrite"):
        run(tiny, tmp_path / "run", "vqa", max_steps=2)
    assert_same_weights(before, weights(first.run_dir))
    assert run(tiny, tmp_path / "run", "vqa", max_steps=2, overwrite=True).steps == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match=r"no run folder.* not overwritten"):
        run(tiny, tmp_path / "mine", "vqa", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("task", TASKS)
def test_seeds(tiny, tmp_path, task):
    settings = {"max_steps": 3, "dropout": 0.2}
    one, same, other = (run(tiny, tmp_path / str(i), task, seed=seed, **settings) for i, seed in enumerate((4, 4, 5)))
    assert_same_weights(weights(one.run_dir), weights(same.run_dir))
    assert losses(one) != losses(other)


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_equals_the_large_batch(tiny, tmp_path, task):
    # Captions differ in length, so a mean of the pieces' means would not be the mean over all tokens.
    whole = run(tiny, tmp_path / "1", task, max_steps=4, accumulation=1, max_grad_norm=0.5)
    pieces = run(tiny, tmp_path / "3", task, max_steps=4, accumulation=3, max_grad_norm=0.5)
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5)
    for name, value in weights(whole.run_dir).items():
        torch.testing.assert_close(weights(pieces.run_dir)[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("task", TASKS)
def test_precomputed_features_change_nothing(tiny, tmp_path, task):
    read = run(tiny, tmp_path / "read", task, max_steps=3)
    stored = run(tiny, tmp_path / "stored", task, max_steps=3, precompute_features=True)
    assert losses(stored) == pytest.approx(losses(read), rel=1e-5)


def test_loader_workers_change_nothing(tiny, tmp_path):
    alone = run(tiny, tmp_path / "0", "vqa", max_steps=3, dropout=0.2)
    helped = run(tiny, tmp_path / "2", "vqa", max_steps=3, dropout=0.2, workers=2)
    assert_same_weights(weights(alone.run_dir), weights(helped.run_dir))


@pytest.mark.parametrize(
    "settings",
    [
        {"mixed_precision": "bf16"},
        {"activation_checkpointing": True, "dropout": 0.2},
        {"caption_loss": "reference", "train.accumulation": 2},
        {"visual_prefix": False, "train.accumulation": 2},
        {"routing.method": "adapter", "schedule": "cosine"},
        {"routing.routing": "vllora", "vision_features": "tokens", "schedule": "constant", "val_split": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_variants_train(tiny, tmp_path, settings):
    result = run(tiny, tmp_path / "run", "caption", max_steps=12, **settings)
    assert sum(losses(result)[-4:]) < sum(losses(result)[:4])
    load_pretrained(result.run_dir / "best")


def test_accumulation_weighs_the_reference_loss(tiny, tmp_path):
    settings = {"max_steps": 3, "caption_loss": "reference"}
    whole = run(tiny, tmp_path / "1", "caption", **settings)
    pieces = run(tiny, tmp_path / "2", "caption", accumulation=2, **settings)
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-5)


def test_given_model_and_tokenizer_are_used(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path / "first", "vqa", max_steps=2)
    train(config, log="quiet")
    model = load_pretrained(tmp_path / "first" / "last")
    result = train(override(config, output_dir=str(tmp_path / "second")), model=model, log="quiet")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(weights(result.run_dir)[name], parameter.detach())


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one(tiny, tmp_path, task):
    settings = {"max_steps": 5, "accumulation": 1, "max_grad_norm": 0.5, "eval_every": 2}
    alone = run(tiny, tmp_path / "1", task, **settings)
    shared = tmp_path / "2"
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(tiny_config(tiny, shared, task, **settings)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "routingvl"]
    done = subprocess.run([*launch, "train", "--config", str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 steps in") == 1
    records = read_metrics(shared / "metrics.jsonl")
    assert [r["loss"] for r in records if r["kind"] == "train"] == pytest.approx(losses(alone), rel=1e-5)
    expected = [r[alone.metric] for r in alone.history if r["kind"] == "validation"]
    assert [r[alone.metric] for r in records if r["kind"] == "validation"] == pytest.approx(expected, rel=1e-4)
    for name, value in weights(alone.run_dir).items():
        torch.testing.assert_close(weights(shared)[name], value, rtol=1e-3, atol=2e-5)


def test_unreadable_images(tiny, tmp_path):
    broken = tmp_path / "images" / "val2014"
    broken.mkdir(parents=True)
    names = sorted((tiny / "data" / "val2014").iterdir())
    for path in names:
        with Image.open(path) as image:
            image.save(broken / path.name)
    # The first training image; validation and test images stay whole.
    (broken / names[0].name).write_bytes(names[0].read_bytes()[:50])
    settings = {"max_steps": 4, "images": str(tmp_path / "images")}
    with pytest.raises(ImageError, match=names[0].name):
        run(tiny, tmp_path / "fail", "vqa", **settings)
    result = run(tiny, tmp_path / "skip", "vqa", on_bad_image="skip", **settings)
    assert result.skipped_images == 2  # 4 steps of 6 are two passes over 12 questions


def test_bad_input_leaves_nothing(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"data.images: .* does not exist"):
        run(tiny, tmp_path / "run", "vqa", images=str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"fp16.* needs a GPU"):
        run(tiny, tmp_path / "run", "vqa", mixed_precision="fp16")
    with pytest.raises(ConfigError, match="log='loud'"):
        run(tiny, tmp_path / "run", "vqa", log="loud")
    assert not (tmp_path / "run").exists()


def test_divergence_is_reported(tiny, tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) at step \d+; lower train.lr"):
        run(tiny, tmp_path / "run", "vqa", max_steps=20, lr=1e30)
