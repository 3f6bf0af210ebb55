"""The levels "op" and "layer": one layer of random tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .comparison import Comparison
from .gate import exact_convolutions, failures, relative_errors
from .layer_cases import DTYPES, Case, Layer, definition, make_tensors
from .layer_providers import COMPILED, providers
from .memory import cuda_peak, saved_mib
from .passes import Checked, Pass, attempt, half_autocast, in_words, measure_passes, turns
from .suites import Plan
from .timing import Spent, Timer


class LayerComparison(Comparison):
    """See :class:`benchmarks.comparison.Comparison`; the sides are functions of the case's tensors."""

    case: Case

    def gated(self) -> tuple[dict[str, str], dict[str, Checked]]:
        """The gate looks at layers without dropout; with it they have to run."""
        case, plan, device = self.case, self.setting.plan, self.setting.device
        wanted, skipped = self.setting.providers, {}
        for name in COMPILED:
            if name in wanted and (why := self.setting.left_out(name)):
                skipped[name] = why
        wanted = tuple(name for name in wanted if name not in skipped)
        self.sides, unable = providers(case, self.routing, plan.dropout, str(device), wanted)
        judged = providers(case, self.routing, 0.0, str(device), wanted)[0] if plan.dropout else self.sides
        judged = {name: layer for name, layer in judged.items() if name != "base" and name in self.sides}
        gate = check(case, self.routing, judged, DTYPES[plan.dtype], device, plan.pure)
        if plan.dropout:
            for name, found in gate.items():
                what = None if found.raised else obstacle(case, self.sides[name], plan, device)
                found.missed += [what] if what else []
        return skipped | unable, gate

    def seconds(self, names: Sequence[str], timer: Timer, repeats: int) -> dict[str, dict[str, list[Spent]]]:
        """By "fwd", "bwd" and "fwdbwd"."""
        layers = {name: self.sides[name] for name in names}
        return measure(self.case, layers, self.setting.plan, timer, repeats)

    def pass_of(self, provider: str) -> Pass:
        """Through random tensors."""
        return pass_of(self.case, self.sides[provider], self.setting.plan, self.setting.device)

    def memory(self, provider: str) -> dict[str, float | None]:
        """See :func:`memory`."""
        return memory(self.case, self.sides[provider], self.setting.plan, self.setting.device)

    def rates(self, provider: str, mode: str, seconds: float) -> dict[str, Any]:
        """Operations and bytes of the formula, their rates, and the device's limit."""
        dtype = self.setting.plan.dtype
        flops, moved = self.case.work(mode, DTYPES[dtype].itemsize, bottleneck=provider != "base")
        least, bound = self.setting.limits().seconds(flops, moved, dtype)
        return {
            "flops": flops,
            "tflop_s": round(flops / seconds / 1e12, 4),
            "bytes_moved": moved,
            "gb_s": round(moved / seconds / 1e9, 3),
            "limit": bound,
            "limit_ms": round(least * 1e3, 5),
            "limit_percent": round(100 * least / seconds, 2),
        }


def run_layer(layer: Layer, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One forward pass, under autocast where a half type is measured and the tensors are not of it themselves."""
    if tensors["x"].dtype == dtype:
        return layer(**tensors)
    with half_autocast(tensors["x"].device, dtype):
        return layer(**tensors)


def random_tensors(case: Case, plan: Plan, device: torch.device | str) -> dict[str, Tensor]:
    """What a layer is timed with: float32, or the pass's dtype where that is pure."""
    dtype = DTYPES[plan.dtype] if plan.pure else torch.float32
    return make_tensors(case, seed=0, dtype=dtype, device=str(device))


def values_and_gradients(layer: Layer, tensors: dict[str, Tensor], dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output y and the gradient d<name> of every tensor that needs one."""
    y = run_layer(layer, tensors, dtype)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@exact_convolutions()
def check(
    case: Case,
    routing: str,
    layers: dict[str, Layer],
    dtype: torch.dtype,
    device: torch.device,
    pure: bool = False,
) -> dict[str, Checked]:
    """The gate: every provider's output and gradients against the definition in float64. Layers are without dropout."""
    exact = make_tensors(case, seed=0, dtype=torch.float64, device=str(device), rounded_to=dtype)
    given = dtype if pure else torch.float32
    tensors = {name: tensor.detach().to(given).requires_grad_(tensor.requires_grad) for name, tensor in exact.items()}
    dy = torch.randn(case.B, case.T, case.N, generator=torch.Generator().manual_seed(1)).to(device=device, dtype=dtype)
    plain_layer = definition(case, routing)
    oracle = values_and_gradients(plain_layer, exact, dy.double(), torch.float64)
    plain = values_and_gradients(plain_layer, tensors, dy, dtype)
    found = {}
    for name, layer in layers.items():
        got, found[name] = attempt(lambda layer=layer: values_and_gradients(layer, tensors, dy, dtype), device)
        if got is not None:
            found[name].worst_error = max(relative_errors(got, oracle).values())
            found[name].missed = [f"{key} {what}" for key, what in failures(got, plain, oracle, dtype).items()]
    return found


def obstacle(case: Case, layer: Layer, plan: Plan, device: torch.device) -> str | None:
    """Why a layer with dropout cannot be timed: it raises, or gives what is not finite; None when it can.

    Dropped values differ from provider to provider, so there is no common result to compare with.
    """
    tensors = random_tensors(case, plan, device)
    dy = torch.randn(case.B, case.T, case.N, device=device)
    try:
        got = values_and_gradients(layer, tensors, dy, DTYPES[plan.dtype])
    except Exception as error:
        return f"with dropout: {in_words(error)}"
    wrong = [name for name, tensor in got.items() if not tensor.isfinite().all()]
    return f"with dropout: {', '.join(wrong)} not finite" if wrong else None


def pass_of(case: Case, layer: Layer, plan: Plan, device: torch.device) -> Pass:
    """A pass of a layer through random tensors, all of which are its leaves."""
    tensors = random_tensors(case, plan, device)
    return Pass(partial(run_layer, layer, tensors, DTYPES[plan.dtype]), list(tensors.values()))


def measure(
    case: Case, layers: dict[str, Layer], plan: Plan, timer: Timer, repeats: int
) -> dict[str, dict[str, list[Spent]]]:
    """What every repetition takes, by provider and mode."""
    tensors, dtype = random_tensors(case, plan, timer.device), DTYPES[plan.dtype]
    dy = torch.randn(case.B, case.T, case.N, device=timer.device)
    leaves = list(tensors.values())
    passes = {name: Pass(partial(run_layer, layer, tensors, dtype), leaves) for name, layer in layers.items()}
    return measure_passes(passes, dy, timer, turns(layers, repeats))


def memory(case: Case, layer: Layer, plan: Plan, device: torch.device) -> dict[str, float | None]:
    """MiB that autograd keeps for the backward pass beyond the layer's own inputs (saved_mib), and on a GPU the peak of
    a forward and backward pass above what was there before it (peak_mib).
    """
    whole = pass_of(case, layer, plan, device)
    saved = saved_mib(whole.forward, whole.leaves)
    return {"saved_mib": saved, "peak_mib": round(cuda_peak(whole.run, device), 3) if device.type == "cuda" else None}
