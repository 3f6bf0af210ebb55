"""Gate, time and memory of the providers of one case. Nothing here prints or writes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cases import Case, Layer, definition, make_tensors
from .gate import failures, relative_rms
from .memory import cuda_peak
from .timing import Timer

MODES = ("fwd", "bwd", "fwdbwd")
WARM_UP = 2


@dataclass
class Checked:
    """What the gate found of one provider.

    Attributes:
        worst_error: largest relative RMS error of the output and the gradients.
        missed: what missed the tolerance, or the error raised, in words; empty when the provider may be timed.
        first_call_s: seconds of the first forward and backward pass, so with all compiling and tuning.
        raised: whether the provider did not run at all.
    """

    worst_error: float | None = None
    missed: list[str] = field(default_factory=list)
    first_call_s: float = 0.0
    raised: bool = False


def autocast_of(dtype: torch.dtype) -> torch.dtype | None:
    """Half types run under autocast, as in training; float32 does not."""
    return None if dtype == torch.float32 else dtype


def run_layer(layer: Layer, tensors: dict[str, Tensor], autocast: torch.dtype | None) -> Tensor:
    """One forward pass, under autocast where a half type is measured."""
    with torch.autocast(tensors["x"].device.type, dtype=autocast, enabled=autocast is not None):
        return layer(**tensors)


def values_and_gradients(
    layer: Layer, tensors: dict[str, Tensor], dy: Tensor, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """Output y and the gradient d<name> of every tensor that needs one."""
    y = run_layer(layer, tensors, autocast)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check(
    case: Case, routing: str, layers: dict[str, Layer], dtype: torch.dtype, device: torch.device
) -> dict[str, Checked]:
    """The gate: every provider's output and gradients against the definition in float64. Layers are without dropout."""
    exact = make_tensors(case, seed=0, dtype=torch.float64, device=str(device), rounded_to=dtype)
    tensors = {name: tensor.detach().float().requires_grad_(tensor.requires_grad) for name, tensor in exact.items()}
    dy = torch.randn(case.B, case.T, case.N, generator=torch.Generator().manual_seed(1)).to(device=device, dtype=dtype)
    plain_layer = definition(case, routing)
    oracle = values_and_gradients(plain_layer, exact, dy.double(), None)
    plain = values_and_gradients(plain_layer, tensors, dy, autocast_of(dtype))
    found = {}
    for name, layer in layers.items():
        start = time.perf_counter()
        try:
            got = values_and_gradients(layer, tensors, dy, autocast_of(dtype))
        except Exception as error:  # whatever a compiler or a launch raises: the others are still measured
            found[name] = Checked(missed=[_in_words(error)], raised=True)
            continue
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        worst = max(relative_rms(got[key], oracle[key]) for key in oracle)
        missed = [f"{key} {what}" for key, what in failures(got, plain, oracle, dtype).items()]
        found[name] = Checked(worst, missed, round(seconds, 3))
    return found


def obstacle(case: Case, layer: Layer, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a layer with dropout cannot be timed: it raises, or gives what is not finite; None when it can.

    Dropped values differ from provider to provider, so there is no common result to compare with.
    """
    tensors = make_tensors(case, seed=0, dtype=torch.float32, device=str(device))
    dy = torch.randn(case.B, case.T, case.N, device=device)
    try:
        got = values_and_gradients(layer, tensors, dy, autocast_of(dtype))
    except Exception as error:
        return f"with dropout: {_in_words(error)}"
    wrong = [name for name, tensor in got.items() if not tensor.isfinite().all()]
    return f"with dropout: {', '.join(wrong)} not finite" if wrong else None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def measure(
    case: Case, layers: dict[str, Layer], dtype: torch.dtype, timer: Timer, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repetition, by provider and mode; each repetition starts with another provider."""
    tensors = make_tensors(case, seed=0, dtype=torch.float32, device=str(timer.device))
    dy = torch.randn(case.B, case.T, case.N, device=timer.device)
    seconds = {name: {mode: [] for mode in MODES} for name in layers}
    order = list(layers)
    for repeat in range(-WARM_UP, repeats):
        turn = repeat % len(order)
        for name in order[turn:] + order[:turn]:
            for tensor in tensors.values():
                tensor.grad = None
            forward, y = timer(lambda name=name: run_layer(layers[name], tensors, autocast_of(dtype)))
            grad = dy.to(y.dtype)
            backward, _ = timer(lambda y=y, grad=grad: y.backward(grad))
            if repeat >= 0:
                for mode, value in zip(MODES, (forward, backward, forward + backward), strict=True):
                    seconds[name][mode].append(value)
    return seconds


def memory(case: Case, layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, float | None]:
    """MiB that autograd keeps for the backward pass beyond the layer's own inputs (saved_mib), and on a GPU the peak of
    a forward and backward pass above what was there before it (peak_mib).
    """
    tensors = make_tensors(case, seed=0, dtype=torch.float32, device=str(device))
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run_layer(layer, tensors, autocast_of(dtype))
    y.backward(torch.ones_like(y))
    del y
    peak = _peak_mib(layer, tensors, dtype, device) if device.type == "cuda" else None
    return {"saved_mib": round(sum(kept.values()) / 2**20, 3), "peak_mib": peak}


def _peak_mib(layer: Layer, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> float:
    for tensor in tensors.values():
        tensor.grad = None

    def forward_and_backward() -> None:
        y = run_layer(layer, tensors, autocast_of(dtype))
        y.backward(torch.ones_like(y))

    return round(cuda_peak(forward_and_backward, device), 3)
