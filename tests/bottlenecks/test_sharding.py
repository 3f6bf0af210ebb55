"""Saving and loading where DeepSpeed's ZeRO-3 has taken the parameters apart.

deepspeed is not among the test's packages: a stand-in empties the parameters as ZeRO-3 does, keeps what they hold in
ds_tensor and their shape in ds_shape, and gives them back inside GatheredParameters.
"""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny import captioner, randomise

from routingvl.bottlenecks import checkpoint
from routingvl.bottlenecks.sharding import full_shape, is_sharded, whole


@contextlib.contextmanager
def gathered(parameters, modifier_rank=None):
    for parameter in parameters:
        parameter.data = parameter.ds_tensor.clone()
    try:
        yield
    finally:
        for parameter in parameters:
            if modifier_rank is not None:
                parameter.ds_tensor = parameter.data.clone()
            parameter.data = parameter.data.new_empty(0)


def take_apart(model: torch.nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = number, parameter.shape
        parameter.ds_tensor, parameter.data = parameter.data.clone(), parameter.data.new_empty(0)


@pytest.fixture(autouse=True)
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=gathered)))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)


def test_a_model_taken_apart_saves_and_loads_whole(tmp_path) -> None:
    model = randomise(captioner())
    model.save_pretrained(tmp_path / "whole")
    want = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    take_apart(model)
    model.save_pretrained(tmp_path / "apart")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "apart" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    other = captioner()
    take_apart(other)
    config = checkpoint.read_adapter_config(tmp_path / "apart")
    checkpoint.load_adapter(other, tmp_path / "apart", config)
    for name, parameter in other.named_parameters():
        assert is_sharded(parameter)
        assert full_shape(parameter) == list(want[name].shape)
        assert torch.equal(whole(parameter), want[name]), name
        assert parameter.shape == (0,)
