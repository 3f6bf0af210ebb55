"""TF32 by either of torch's interfaces, and by mixtures of them, is read without an error and means the same."""

import pytest
import torch

from routingvl.kernels import routed_lora_linear, select_backend
from routingvl.kernels.float32_precision import exact_on_cpu, tf32_allowed
from routingvl.kernels.triton_common.tiles import precision_of

matmul = torch.backends.cuda.matmul
newer = pytest.mark.skipif(not hasattr(matmul, "fp32_precision"), reason="torch < 2.9 has one interface")


@pytest.fixture(autouse=True)
def restored():
    yield
    if hasattr(matmul, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")


def allow_old(value: bool) -> None:
    matmul.allow_tf32 = value


def allow_new(value: str) -> None:
    matmul.fp32_precision = value


def allow_everywhere(value: str) -> None:
    matmul.fp32_precision, torch.backends.fp32_precision = "none", value


WAYS = {
    "default": ([], False),
    "old": ([(allow_old, True)], True),
    "old, taken back": ([(allow_old, True), (allow_old, False)], False),
    "function": ([(torch.set_float32_matmul_precision, "high")], True),
    "new": ([(allow_new, "tf32")], True),
    "new, taken back": ([(allow_new, "tf32"), (allow_new, "ieee")], False),
    "everywhere": ([(allow_everywhere, "tf32")], True),
    "new after old": ([(allow_old, False), (allow_new, "tf32")], True),
    "old after new": ([(allow_new, "tf32"), (allow_old, False)], False),
    "function after new": ([(allow_new, "ieee"), (torch.set_float32_matmul_precision, "high")], True),
}


@newer
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_allowing_tf32(way):
    steps, allowed = WAYS[way]
    for step, value in steps:
        step(value)
    assert tf32_allowed() is allowed
    assert precision_of(torch.float32, "sm_90") == ("tf32" if allowed else "ieee")
    assert precision_of(torch.float32, "gfx942") == "ieee"
    assert precision_of(torch.bfloat16, "sm_90") == "half"
    name, _ = select_backend("cuda", dtype=torch.float32, routing="mul", visual_tokens=1, products=True)
    assert name in ("eager", "triton")


@newer
@pytest.mark.parametrize("routing", ["none", "add", "mul", "vllora"])
def test_layers_run_on_a_cpu_whatever_was_said(routing):
    x, v, w = torch.randn(2, 60, 8), torch.randn(2, 1, 8), torch.randn(6, 8)
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    before = routed_lora_linear(x, v, w, None, a, b, routing=routing)
    allow_new("tf32")
    assert torch.allclose(routed_lora_linear(x, v, w, None, a, b, routing=routing), before, atol=1e-5)


def test_rounded_products_on_a_cpu():
    assert exact_on_cpu()
    torch.set_float32_matmul_precision("medium")
    assert not exact_on_cpu()
