"""train.compile: the same training, one graph for all text lengths, the same checkpoints, and its errors."""

import sys
from contextlib import nullcontext

import pytest
import torch
from tiny import answerer, batch, captioner, tiny_config
from torch._dynamo.utils import counters
from training_runs import losses, weights

from routingvl.backbones.dropout import LaneDropout
from routingvl.config import ConfigError
from routingvl.models import load_pretrained
from routingvl.train import train
from routingvl.training import compile as compilation


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()


def compare(tiny, tmp_path, task):
    """Train with and without torch.compile: losses, weights and models agree, with one compilation."""
    lengths = set()
    mark = torch._dynamo.maybe_mark_dynamic

    def noted(tensor, dimension):
        lengths.add(tensor.shape[dimension])
        mark(tensor, dimension)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo, "maybe_mark_dynamic", noted)
        runs = [
            train(tiny_config(tiny, tmp_path / str(on), task, **{"train.compile": on}), log="quiet")
            for on in (False, True)
        ]
    assert counters["stats"]["unique_graphs"] == 1
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    plain, compiled = (weights(run.run_dir) for run in runs)
    assert plain.keys() == compiled.keys()
    load_pretrained(runs[1].run_dir / "last")
    return lengths


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_a_compiled_run_equals_a_plain_one(tiny, tmp_path, monkeypatch, task):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # inductor's code takes a minute to compile
    lengths = compare(tiny, tmp_path, task)
    assert task == "vqa" or len(lengths) > 1


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_with_inductor(tiny, tmp_path, task):
    compare(tiny, tmp_path, task)


@pytest.mark.parametrize("build", [captioner, answerer])
def test_dropout_of_the_backbone_is_part_of_the_graph_and_its_numbers_are_torchs(build, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    model, inputs = build().train(), batch()
    if build is captioner:
        inputs |= {"labels": inputs["input_ids"], "return_logits": False}
    for part in model.language_model.modules():
        if isinstance(part, LaneDropout):
            part.p = 0.2
    found = []
    for block in (nullcontext(), compilation.compiled(model)):
        torch.manual_seed(0)
        with block:
            output = model(**compilation.compiled_inputs(model, inputs))
        found.append(output.logits if output.loss is None else output.loss)
    torch.testing.assert_close(*found)
    assert counters["stats"]["unique_graphs"] == 1
    assert not torch._inductor.config.fallback_random


def test_the_callers_model_is_not_left_compiled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    config = tiny_config(tiny, tmp_path / "run", "vqa", **{"train.compile": True, "max_steps": 1})
    train(config, log="quiet")
    model = load_pretrained(tmp_path / "run" / "last")
    train(config, model=model, log="quiet", overwrite=True)
    assert model._compiled_call_impl is None
    assert not any("_orig_mod" in name for name in model.state_dict())


def test_without_a_compiler_nothing_is_written(tiny, tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(
            ConfigError, match=r"train.compile=true: torch.compile needs a C\+\+ compiler .* train.compile=false"
        ),
    ):
        train(tiny_config(tiny, tmp_path / "run", "vqa", **{"train.compile": True}), log="quiet")
    assert not (tmp_path / "run").exists()


def test_a_triton_that_the_compiler_cannot_use_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor.compile_fx", None)  # importing it fails
    with pytest.raises(ConfigError, match=r"torch 2.8 or newer, or set train.compile=false"):
        train(tiny_config(tiny, tmp_path / "run", "vqa", **{"train.compile": True}), log="quiet")
    assert not (tmp_path / "run").exists()


def test_activation_checkpointing_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="exclude each other"):
        tiny_config(tiny, tmp_path, "vqa", **{"train.compile": True, "activation_checkpointing": True})
