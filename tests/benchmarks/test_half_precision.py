"""Under bfloat16 autocast the errors of our layers, against float64, beside those of the published chain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from tolerances import run
from torch import Tensor
from torch.nn import functional as F

from routingvl.benchmarks.published_layers import published_adapter, published_lora_linear, published_merged_linear
from routingvl.kernels import ROUTINGS, routed_adapter, routed_lora_linear
from routingvl.kernels.optional_triton import interpreted

B, T, K, N, R = 4, 20, 64, 64, 16
SEEDS = {"eager": range(16), "triton": range(2)}  # the interpreter takes longer
# How much larger our error may be than the published chain's. A gradient of A has two parts, of the text and of the
# image; where the published chain transposes A it casts it for each of them, and they meet in float32. What is rank one
# for each image goes through w = Aᵀ p(u), which is rounded once more than t.
LIMIT, TWO_CASTS, RANK_ONE = 1.1, 1.3, {"eager": 1.35, "triton": 1.6}  # of few draws there
Layer = Callable[..., Tensor]


def layers(kind: str, routing: str, backend: str) -> tuple[Layer, Layer]:
    """The published layer, and ours."""
    if kind == "adapter":
        same = dict(routing=routing, activation="gelu", residual=True)
        return partial(published_adapter, **same), partial(routed_adapter, backend=backend, **same)
    same = dict(routing=routing, scaling=1.0)
    if kind == "linear":
        return partial(published_lora_linear, **same), partial(routed_lora_linear, backend=backend, **same)
    same |= dict(groups=2, columns=(0, 2 * N))
    ours = partial(routed_lora_linear, weight_layout="kn", backend=backend, **same)
    return partial(published_merged_linear, **same), ours


def operands(kind: str, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Those of a layer and the gradient of its output, in float32 and exact in bfloat16."""
    torch.manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).bfloat16().float()

    given = {"x": draw(B, T, K), "v": draw(B, 1, K)}
    if kind == "adapter":
        given |= {"down_weight": draw(R, K, scale=K**-0.5), "down_bias": draw(R, scale=0.1)}
        given |= {"up_weight": draw(K, R, scale=R**-0.5), "up_bias": draw(K, scale=0.1)}
        return given, draw(B, T, K)
    groups, width = (1, N) if kind == "linear" else (2, 3 * N)
    weight = draw(width, K, scale=K**-0.5)
    given |= {"weight": weight if kind == "linear" else weight.t().contiguous(), "bias": draw(width, scale=0.1)}
    given |= {"a": draw(groups * R, K, scale=K**-0.5), "b": draw(groups * N, R, scale=R**-0.5)}
    return given, draw(B, T, width)


def autocast(layer: Layer) -> Layer:
    def call(**given: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(**given)

    return call


def squared_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: F.mse_loss(got[name].double(), want[name]).item() for name in want if name in got}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("kind", ["linear", "c_attn", "adapter"])
@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("triton", marks=pytest.mark.skipif(not interpreted(), reason="only interpreted on a CPU"))],
)
def test_errors_are_no_larger_than_the_published_chains(kind: str, routing: str, backend: str) -> None:
    published, ours = layers(kind, routing, backend)
    total: dict[str, list[float]] = {}
    for seed in SEEDS[backend]:
        given, dy = operands(kind, seed)
        want = run(published, {name: tensor.double() for name, tensor in given.items()}, dy.double())
        found = [squared_errors(run(autocast(layer), given, dy.bfloat16()), want) for layer in (published, ours)]
        for name in found[0]:
            sums = total.setdefault(name, [0.0, 0.0])
            sums[:] = (before + errors[name] for before, errors in zip(sums, found, strict=True))
    rank_one = ROUTINGS[routing].is_rank_one(1)
    if rank_one:
        total.pop("ddown_bias", None)  # one number for all components with expand: chance decides which error is larger
    for name, (theirs, mine) in total.items():
        limit = RANK_ONE[backend] if rank_one else TWO_CASTS if (kind, name) == ("linear", "da") else LIMIT
        assert mine <= limit**2 * theirs, name
    assert len(total) >= 6
