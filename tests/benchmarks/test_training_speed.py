"""Training throughput against the published step: its rows, its gate, and what it takes for the published step."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import nn
from transformers.activations import NewGELUActivation

from routingvl.backbones.dropout import LaneDropout
from routingvl.benchmarks import published_models, training_speed, training_steps
from routingvl.benchmarks.memory import can_measure, process_peak, tensor_peak
from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.training import compile as compilation

QUICK = ["--quick", "--rounds", "1", "--threads", "1"]


def run(tmp_path, *flags):
    path = tmp_path / "rows.jsonl"
    status = training_speed.main([*QUICK, *flags, "--output", str(path)])
    return status, [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_and_message(tmp_path, capsys):
    status, rows = run(tmp_path)
    assert status == 0
    assert [(row["case"], row["B"], row["gate"]) for row in rows] == [
        ("training_vqa", 32, "passed"),
        ("training_caption", 8, "passed"),
    ]
    printed = capsys.readouterr().out
    for row in rows:
        assert {"commit", "torch", "device", "threads", "timestamp"} <= set(row)
        for dtype in ("float32", "bfloat16"):
            ratio = row[f"{dtype}_examples_s"] / row["published_examples_s"]
            assert row[f"{dtype}_speedup"] == pytest.approx(ratio, rel=1e-2)
            assert f"= {row[f'{dtype}_speedup']}x" in printed
            assert 0 < row[f"{dtype}_error"] <= training_speed.TOLERANCES[dtype]
    if can_measure():
        assert all(rows[1][f"{side}_process_mib"] > 50 for side in ("published", "float32", "bfloat16"))
    # The published captioning step keeps all logits of 51 positions; ours holds those of the words.
    assert rows[1]["float32_step_mib"] < rows[1]["published_step_mib"] / 2


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_compiled_sides_are_gated_and_timed_too(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    status, (row,) = run(tmp_path, "--task", task, "--compile")
    assert status == 0
    assert 0 < row["bfloat16_compiled_error"] <= training_speed.TOLERANCES["bfloat16"]
    assert f"bfloat16_compiled: {row['bfloat16_compiled_examples_s']} examples/s" in capsys.readouterr().out
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # training and the gate's evaluation
    assert row["warm_up_s"] > 0


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_a_wrong_layer_shuts_the_gate(task, tmp_path, capsys, monkeypatch):
    forward = RoutedLoRALinear.forward
    monkeypatch.setattr(RoutedLoRALinear, "forward", lambda self, x, v=None: forward(self, x, v) * 1.01)
    status, (row,) = run(tmp_path, "--task", task)
    assert status == 1
    assert row["gate"] == "failed"
    assert not [key for key in row if "speedup" in key or "examples_s" in key]
    assert "nothing was timed" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_published_model_computes_the_same_with_none_of_our_layers(task):
    ours = training_speed.routed_model(task, "tiny").eval()
    theirs = published_models.published_model(ours)
    assert not any(isinstance(module, RoutedLoRALinear) for module in theirs.modules())
    replaced = [module for module in theirs.modules() if isinstance(module, published_models.PublishedLoRALinear)]
    assert len(replaced) == sum(isinstance(module, RoutedLoRALinear) for module in ours.modules()) > 0
    assert {name for name, p in theirs.named_parameters() if p.requires_grad} == {
        name for name, p in ours.named_parameters() if p.requires_grad
    }
    generator = torch.Generator().manual_seed(7)
    inputs = {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "input_ids": torch.randint(3, 150, (2, 6), generator=generator),
    }
    logits = ours(**inputs).logits
    torch.testing.assert_close(theirs(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # a copy: its weights are its own
        replaced[0].lora_B.add_(1.0)
    assert torch.equal(ours(**inputs).logits, logits)


def test_lengths_have_the_stated_distribution():
    captions, questions = (training_steps.text_lengths(task, 50_000) for task in ("caption", "vqa"))
    assert captions.mean() == pytest.approx(12, abs=0.2)
    assert np.mean(captions < 25) == pytest.approx(0.99, abs=0.005)
    assert questions.mean() == pytest.approx(8, abs=0.2)
    assert questions.max() <= 17  # with two special tokens and the prefix, the recipe's 20 positions


def test_batches_are_the_grouped_ones_and_published_texts_have_fixed_length(tmp_path):
    data = training_speed.Data("caption", training_speed.routed_model("caption", "tiny"), tmp_path)
    order = data.order()
    steps = [next(order) for _ in range(200)]
    assert len({index for step in steps for index in step}) == 200 * data.batch  # no example twice in an epoch
    padded = sum(data.texts(step)["input_ids"].numel() for step in steps)
    assert padded < 1.15 * data.lengths[np.concatenate(steps)].sum()
    fixed = data.texts(steps[0], data.fixed, all_count=True)
    assert fixed["input_ids"].shape == fixed["labels"].shape == (8, 50)
    assert torch.equal(fixed["labels"], fixed["input_ids"])


@pytest.mark.skipif(not can_measure(), reason="this system does not tell the peak of a process")
def test_peak_counts_what_is_freed_within_the_call_and_nothing_from_before():
    torch.ones(2**26)  # 256 MiB, freed at once
    before = process_peak(lambda: None)
    assert 200 < process_peak(lambda: torch.ones(2**26)) - before < 300
    assert abs(process_peak(lambda: None) - before) < 50


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_the_published_side_has_none_of_our_parts(task):
    model = training_speed.routed_model(task, "tiny")
    reference = published_models.published_model(model)
    kinds = {type(module) for module in reference.language_model.modules()}
    assert LaneDropout not in kinds
    assert RoutedLoRALinear not in kinds
    assert task == "vqa" or (NewGELUActivation in kinds and nn.GELU not in kinds)


def test_memory_of_a_step_counts_what_is_alive_at_once():
    def step(indices):
        first = torch.ones(2**18)  # 1 MiB
        second = first + 1
        del first
        torch.cat([second, second])  # 2 MiB beside 1

    assert tensor_peak(lambda: step([]), torch.device("cpu")) == pytest.approx(3, abs=0.01)


def test_measuring_memory_does_not_log_the_profiler():
    """In a process of its own: the profiler reads its log level once."""
    program = (
        "import torch\n"
        "from routingvl.benchmarks.memory import tensor_peak\n"
        "print(tensor_peak(lambda: torch.ones(2**18), torch.device('cpu')))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    assert float(done.stdout) == pytest.approx(1, abs=0.01)
    assert "profiler_start" not in done.stderr


def test_published_step_in_half_precision(tmp_path):
    """The recipe's own bfloat16 form: gated in float32 like the other, and marked in its row."""
    status, (row,) = run(tmp_path, "--task", "vqa", "--published-dtype", "bfloat16")
    assert (status, row["gate"], row["published_dtype"], row["size"]) == (0, "passed", "bfloat16", "tiny")
    model = training_speed.routed_model("vqa", "tiny")
    data = training_speed.Data("vqa", model, tmp_path)
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    for dtype in ("float32", "bfloat16"):
        training_speed.published_step(data, model, torch.device("cpu"), dtype)(next(data.order()))
    assert seen == [torch.float32, torch.bfloat16]


def test_without_a_compiler_nothing_is_measured(tmp_path, capsys):
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(SystemExit):
        training_speed.main([*QUICK, "--compile", "--output", str(tmp_path / "rows.jsonl")])
    assert "--compile: torch.compile needs a C++ compiler" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()
