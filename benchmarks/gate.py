"""The numerical tolerance of every op: one table, used by the tests and as the gate before any timing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

# Largest relative RMS error against a float64 oracle on inputs rounded to the dtype, for outputs and gradients alike.
CAPS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.float16: 1.5e-3,
    torch.bfloat16: 1e-2,
}
TF32_CAP = 1.5e-3
# An op may err at most this much more than the plain composition in the same dtype.
FACTOR = 2.0
SLACK = 1e-6
# A tensor of the oracle that is smaller than this, beside the largest one, is nothing but rounding: its terms cancel.
ROUNDING = 1e-9


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """cuDNN's convolutions of float32, which the published layers have, are exact inside the block; by torch's default
    they are tf32 on a GPU, and nobody could agree with that to float32's tolerance.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def relative_rms(got: Tensor, want: Tensor) -> float:
    """Root mean square of got - want over that of want (absolute where want is 0), computed in float64."""
    got, want = got.detach().double(), want.detach().double()
    error, scale = torch.linalg.vector_norm(got - want).item(), torch.linalg.vector_norm(want).item()
    return error / scale if scale > 0 else error


def relative_errors(got: Mapping[str, Tensor], oracle: Mapping[str, Tensor]) -> dict[str, float]:
    """:func:`relative_rms` of each tensor; of one whose terms cancel, relative to the largest tensor of ``oracle``.

    Such is the gradient of an Adapter's b_down with z = t - u: zero, up to rounding.
    """
    sizes = {name: _rms(want) for name, want in oracle.items()}
    scales = sizes | dict.fromkeys(_rounding(sizes), max(sizes.values(), default=0.0))
    differences = {name: _rms(got[name].double() - want.double()) for name, want in oracle.items()}
    return {name: error / scales[name] if scales[name] > 0 else error for name, error in differences.items()}


def _rounding(sizes: Mapping[str, float]) -> set[str]:
    """Names of the tensors that are nothing but rounding beside the largest one."""
    return {name for name, size in sizes.items() if size <= ROUNDING * max(sizes.values())}


def _rms(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.detach().double()).item() / max(x.numel(), 1) ** 0.5


def allowed_error(dtype: torch.dtype, plain_error: float) -> float:
    """The largest error that passes, given the error of the plain composition in the same dtype."""
    return min(CAPS[dtype], FACTOR * plain_error + SLACK)


def failures(
    got: Mapping[str, Tensor], plain: Mapping[str, Tensor], oracle: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, str]:
    """The tensors of ``got`` that miss the tolerance, each with its error in words; empty when all pass.

    ``plain`` holds the same tensors by the plain composition in ``dtype``, ``oracle`` by the same in float64. What
    cancels is held to the cap alone: how much of the rounding is left there is chance, in the plain composition too.
    """
    missed = {
        name: f"has shape {list(got[name].shape)}, not {list(want.shape)}"
        for name, want in oracle.items()
        if got[name].shape != want.shape
    }
    comparable = {name: want for name, want in oracle.items() if name not in missed}
    chance = _rounding({name: _rms(want) for name, want in comparable.items()})
    found, plainly = relative_errors(got, comparable), relative_errors(plain, comparable)
    for name, error in found.items():
        limit = CAPS[dtype] if name in chance else allowed_error(dtype, plainly[name])
        if not error <= limit:
            missed[name] = f"relative RMS error {error:.2e} is above {limit:.2e}"
    return missed
