"""Gate, time and memory of the providers of one case. Nothing here prints or writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .cases import Case, Layer, definition, make_tensors
from .gate import exact_convolutions, failures, relative_rms
from .memory import cuda_peak
from .timing import Timer

MODES = ("fwd", "bwd", "fwdbwd")
WARM_UP = 2

Result = TypeVar("Result")


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


@dataclass
class Pass:
    """A forward pass, and the tensors to which a backward pass from its result gives gradients."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]

    def run(self) -> None:
        """Forward pass, and backward pass from ones."""
        y = self.forward()
        y.backward(torch.ones_like(y))

    def gradients(self) -> list[Tensor]:
        """The gradients that are there."""
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]

    def clear(self) -> None:
        """Drop the gradients, so that the next backward pass makes them anew."""
        for leaf in self.leaves:
            leaf.grad = None


def half_autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Half types run under autocast, as in training; others do not."""
    half = dtype.itemsize == 2
    return torch.autocast(device.type, dtype=dtype if half else None, enabled=half)


def run_layer(layer: Layer, tensors: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One forward pass, under autocast where a half type is measured."""
    with half_autocast(tensors["x"].device, dtype):
        return layer(**tensors)


def values_and_gradients(layer: Layer, tensors: dict[str, Tensor], dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output y and the gradient d<name> of every tensor that needs one."""
    y = run_layer(layer, tensors, dtype)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@exact_convolutions()
def check(
    case: Case, routing: str, layers: dict[str, Layer], dtype: torch.dtype, device: torch.device
) -> dict[str, Checked]:
    """The gate: every provider's output and gradients against the definition in float64. Layers are without dropout."""
    exact = make_tensors(case, seed=0, dtype=torch.float64, device=str(device), rounded_to=dtype)
    tensors = {name: tensor.detach().float().requires_grad_(tensor.requires_grad) for name, tensor in exact.items()}
    dy = torch.randn(case.B, case.T, case.N, generator=torch.Generator().manual_seed(1)).to(device=device, dtype=dtype)
    plain_layer = definition(case, routing)
    oracle = values_and_gradients(plain_layer, exact, dy.double(), torch.float64)
    plain = values_and_gradients(plain_layer, tensors, dy, dtype)
    found = {}
    for name, layer in layers.items():
        got, found[name] = attempt(lambda layer=layer: values_and_gradients(layer, tensors, dy, dtype), device)
        if got is not None:
            found[name].worst_error = max(relative_rms(got[key], oracle[key]) for key in oracle)
            found[name].missed = [f"{key} {what}" for key, what in failures(got, plain, oracle, dtype).items()]
    return found


def attempt(run: Callable[[], Result], device: torch.device) -> tuple[Result | None, Checked]:
    """What ``run`` gives, None where it raises, and how long that took or what was raised."""
    start = time.perf_counter()
    try:
        result = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever a compiler or a launch raises: the others are still measured
        return None, Checked(missed=[in_words(error)], raised=True)
    return result, Checked(first_call_s=round(time.perf_counter() - start, 3))


def obstacle(case: Case, layer: Layer, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a layer with dropout cannot be timed: it raises, or gives what is not finite; None when it can.

    Dropped values differ from provider to provider, so there is no common result to compare with.
    """
    tensors = make_tensors(case, seed=0, dtype=torch.float32, device=str(device))
    dy = torch.randn(case.B, case.T, case.N, device=device)
    try:
        got = values_and_gradients(layer, tensors, dy, dtype)
    except Exception as error:
        return f"with dropout: {in_words(error)}"
    wrong = [name for name, tensor in got.items() if not tensor.isfinite().all()]
    return f"with dropout: {', '.join(wrong)} not finite" if wrong else None


def in_words(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def turns(names: Iterable[str], repeats: int, warm_up: int = WARM_UP) -> Iterator[tuple[str, bool]]:
    """Whose turn it is, and whether it counts: each repetition has all names and starts with another one."""
    order = list(names)
    for repeat in range(-warm_up, repeats):
        first = repeat % max(len(order), 1)
        for name in order[first:] + order[:first]:
            yield name, repeat >= 0


def pass_of(case: Case, layer: Layer, dtype: torch.dtype, device: torch.device) -> Pass:
    """A pass of a layer through random tensors, all of which are its leaves."""
    tensors = make_tensors(case, seed=0, dtype=torch.float32, device=str(device))
    return Pass(partial(run_layer, layer, tensors, dtype), list(tensors.values()))


def measure(
    case: Case, layers: dict[str, Layer], dtype: torch.dtype, timer: Timer, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repetition, by provider and mode."""
    tensors = make_tensors(case, seed=0, dtype=torch.float32, device=str(timer.device))
    dy = torch.randn(case.B, case.T, case.N, device=timer.device)
    leaves = list(tensors.values())
    passes = {name: Pass(partial(run_layer, layer, tensors, dtype), leaves) for name, layer in layers.items()}
    return measure_passes(passes, dy, timer, turns(layers, repeats))


def measure_passes(
    passes: Mapping[str, Pass], dy: Tensor, timer: Timer, order: Iterable[tuple[str, bool]]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of a forward pass, its backward pass from ``dy``, and their sum, by name and mode.

    ``order`` is what :func:`turns` gives.
    """
    seconds = {name: {mode: [] for mode in MODES} for name in passes}
    for name, counts in order:
        passes[name].clear()
        forward, y = timer(passes[name].forward)
        grad = dy.to(y.dtype)
        backward, _ = timer(lambda y=y, grad=grad: y.backward(grad))
        if counts:
            for mode, value in zip(MODES, (forward, backward, forward + backward), strict=True):
                seconds[name][mode].append(value)
    return seconds


def memory(case: Case, layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, float | None]:
    """MiB that autograd keeps for the backward pass beyond the layer's own inputs (saved_mib), and on a GPU the peak of
    a forward and backward pass above what was there before it (peak_mib).
    """
    whole = pass_of(case, layer, dtype, device)
    saved = saved_mib(whole.forward, whole.leaves)
    return {"saved_mib": saved, "peak_mib": round(cuda_peak(whole.run, device), 3) if device.type == "cuda" else None}


def saved_mib(forward: Callable[[], Tensor], given: Iterable[Tensor]) -> float:
    """MiB that autograd keeps for the backward pass of ``forward`` beyond the tensors ``given``."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself it would hold the graph that holds it, for ever where it is a node's result

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # until here everything kept was alive, so that no two tensors had one address
    return round(sum(kept.values()) / 2**20, 3)
