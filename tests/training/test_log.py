"""What a run reports: accelerate's trackers get the records, and a log cut off by a crash is read."""

import json
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import LoggerType
from tiny import write_tiny
from training_runs import run

from routingvl.config import ConfigError
from routingvl.training.log import read_metrics


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def test_tensorboard(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = run(tiny, tmp_path / "run", "vqa", max_steps=2, trackers=["tensorboard"])
    (file,) = (result.run_dir / "tensorboard").rglob("events.*")
    events = accumulator.EventAccumulator(str(file.parent)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(r["step"], pytest.approx(r["loss"])) for r in result.history if r["kind"] == "train"]
    assert losses == expected


def test_wandb(tiny, tmp_path, monkeypatch):
    started, logged, ended = [], [], []
    board = SimpleNamespace(
        log=lambda values, step: logged.append((step, set(values))), finish=lambda: ended.append(True)
    )
    fake = SimpleNamespace(init=lambda **settings: started.append(settings) or board)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for module in ("accelerate.tracking", "routingvl.training.log"):
        monkeypatch.setattr(f"{module}.get_available_trackers", lambda: [LoggerType.WANDB])
    run(tiny, tmp_path / "mine", "vqa", max_steps=2, trackers=["wandb"])
    (settings,) = started
    assert (settings["project"], settings["name"]) == ("routingvl", "mine")
    assert settings["config"]["train.max_steps"] == 2
    assert [step for step, _ in logged] == [1, 2, 2]
    assert "train/loss" in logged[0][1]
    assert "validation/accuracy" in logged[2][1]
    assert ended == [True]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"train.trackers: wandb is not installed; pip install wandb"):
        run(tiny, tmp_path / "run", "vqa", trackers=["wandb"])
    assert not (tmp_path / "run").exists()


def test_a_last_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    records = [{"kind": "train", "step": step} for step in (1, 2)]
    path.write_text("\n".join(map(json.dumps, records)) + '\n{"kind": "tr')
    assert read_metrics(path) == records
