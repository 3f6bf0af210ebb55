"""The comparison of training throughput: its rows, its gate, and that each side is what it says."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers.activations import NewGELUActivation

from routingvl.benchmarks import training_speed
from routingvl.benchmarks.published_models import PublishedLoRALinear, published_model
from routingvl.layers import RoutedLoRALinear
from routingvl.models.dropout import LaneDropout

QUICK = ["--quick", "--rounds", "1", "--threads", "1"]


@pytest.mark.parametrize("task", list(training_speed.TASKS))
def test_row_and_message(tmp_path, capsys, task):
    assert training_speed.main([*QUICK, "--task", task, "--output", str(tmp_path / "rows.jsonl")]) == 0
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert row["case"] == f"training_{task}"
    assert row["gate"] == "passed"
    assert row["float32_error"] < 1e-4
    assert row["bfloat16_error"] > row["float32_error"]  # it did run in bfloat16
    assert row["float32_speedup"] == pytest.approx(row["float32_examples_s"] / row["published_examples_s"], rel=1e-3)
    assert f"{row['bfloat16_examples_s']} examples/s = {row['bfloat16_speedup']}x" in capsys.readouterr().out
    assert row["float32_step_mib"] < row["published_step_mib"]


def test_a_wrong_layer_shuts_the_gate(tmp_path, capsys, monkeypatch):
    published = PublishedLoRALinear.forward
    monkeypatch.setattr(PublishedLoRALinear, "forward", lambda self, x: published(self, x) * 1.01)
    assert training_speed.main([*QUICK, "--task", "vqa", "--output", str(tmp_path / "rows.jsonl")]) == 1
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["gate"] == "failed"
    assert not any("speedup" in key for key in row)
    assert "nothing was timed" in capsys.readouterr().out


@pytest.mark.parametrize("task", list(training_speed.TASKS))
def test_the_published_side_has_none_of_our_parts(task):
    model = training_speed.build_model(task, "tiny")
    reference = published_model(model)
    kinds = {type(module) for module in reference.language_model.modules()}
    assert PublishedLoRALinear in kinds
    assert not kinds & {RoutedLoRALinear, LaneDropout}
    assert not reference.context.readers
    if task == "caption":
        assert NewGELUActivation in kinds
        assert nn.GELU not in kinds
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {n for n, p in ours.items() if p.requires_grad} == {n for n, p in theirs.items() if p.requires_grad}


def test_text_lengths():
    captions, questions = (training_speed.text_lengths(task, 100_000) for task in ("caption", "vqa"))
    assert captions.mean() == pytest.approx(12, abs=0.1)
    assert np.quantile(captions, 0.99) == pytest.approx(25, abs=1)
    assert questions.mean() == pytest.approx(8, abs=0.1)
    assert questions.max() <= 17


def test_memory_of_a_step_counts_what_is_alive_at_once():
    def step(indices):
        first = torch.ones(2**18)  # 1 MiB
        second = first + 1
        del first
        torch.cat([second, second])  # 2 MiB beside 1

    assert training_speed.step_memory(step, [], torch.device("cpu")) == pytest.approx(3, abs=0.01)
