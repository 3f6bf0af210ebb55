"""Forward and backward passes: what trying one gives, and their times in turns. Nothing here prints or writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from .timing import Spent, Timer

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


def measure_passes(
    passes: Mapping[str, Pass], dy: Tensor, timer: Timer, order: Iterable[tuple[str, bool]]
) -> dict[str, dict[str, list[Spent]]]:
    """What a forward pass, its backward pass from ``dy``, and both take, by name and mode.

    ``order`` is what :func:`turns` gives. By the clock "gpu" the host's time is that of further turns, without the
    profiler, which slows it down.
    """
    order, grads = list(order), {}

    def calls() -> Iterator[Callable[[], object]]:
        for name, _ in order:
            passes[name].clear()
            made: list[Tensor] = []
            yield lambda name=name, made=made: made.append(passes[name].forward())
            y = made.pop()
            if y.dtype not in grads:
                grads[y.dtype] = dy.to(y.dtype)  # in a turn that warms up
            yield lambda y=y: y.backward(grads[y.dtype])

    spent = timer.all(calls())
    if timer.clock == "gpu":
        spent = [Spent(one.seconds, other.host) for one, other in zip(spent, timer.walls(calls()), strict=True)]
    found = {name: {mode: [] for mode in MODES} for name in passes}
    for (name, counts), forward, backward in zip(order, spent[::2], spent[1::2], strict=True):
        if counts:
            host = None if forward.host is None else forward.host + backward.host
            both = Spent(forward.seconds + backward.seconds, host)
            for mode, value in zip(MODES, (forward, backward, both), strict=True):
                found[name][mode].append(value)
    return found
