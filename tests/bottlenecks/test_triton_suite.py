"""ROUTINGVL_BACKEND decides what models run on; `make test-triton` sets it for the tests of all above the kernels."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from tiny import answerer, batch, captioner, randomise

from routingvl import RoutingConfig
from routingvl.bottlenecks.layers import RoutedLayer
from routingvl.kernels.optional_triton import interpreted

pytest.importorskip("triton")
if not interpreted() and not torch.cuda.is_available():
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

from routingvl.kernels.triton_common import launch as launch_module

DEVICE = "cpu" if interpreted() else "cuda"
ASKED_FOR = os.environ.get("ROUTINGVL_BACKEND")  # of the whole run, before any test changes it


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched so far in the test, by name."""
    seen, launch = [], launch_module.launch
    monkeypatch.setattr(launch_module, "launch", lambda kind, *rest: (seen.append(kind), launch(kind, *rest))[1])
    return seen


def step(build: Callable, **routing: str) -> int:
    """Forward and backward of a model; returns how often a bottleneck was called (GPT-2's sublayers share Adapters)."""
    model = randomise(build(RoutingConfig(rank=4, **routing))).to(DEVICE).train()
    inputs = {name: tensor.to(DEVICE) for name, tensor in batch().items()}
    calls = []
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.register_forward_hook(lambda *_: calls.append(1))
    model(**inputs).logits.square().mean().backward()
    return len(calls)


@pytest.mark.parametrize("build", [captioner, answerer])
@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_every_bottleneck_is_launched_forward_and_backward(
    build: Callable, method: str, routing: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROUTINGVL_BACKEND", "triton")
    calls = step(build, method=method, routing=routing)
    kernel = "adapter" if method == "adapter" else "rank_one" if routing == "vllora" else "lora"
    assert sorted(launches) == sorted([f"{kernel}_forward", f"{kernel}_backward"] * calls)
    launches.clear()
    monkeypatch.setenv("ROUTINGVL_BACKEND", "eager")
    step(build, method=method, routing=routing)
    assert not launches


@pytest.mark.skipif(ASKED_FOR != "triton", reason="the run does not ask for Triton: make test-triton does")
def test_this_run_is_on_triton(launches: list[str]) -> None:
    """The same without setting anything: what the other tests of this run stand on."""
    assert len(launches) == 0
    calls = step(captioner, routing="mul")
    assert launches.count("lora_forward") == launches.count("lora_backward") == calls > 0
