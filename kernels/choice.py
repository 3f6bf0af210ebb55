"""Calls that the Triton kernels could run and torch runs faster, as a table by form and number of rows.

Every entry rests on times of kernels on an H100 in bfloat16 (benchmarks/results/gpu, benchmarks/NOTES.md), so it holds
for GPUs of that family and products in half precision. For want of such times Adapters, calls of rank one and other
GPUs have none. Exact products of float32 are left to torch on every GPU (``dispatch.py``). A backend that is asked for
by name overrides both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .triton_common.tiles import family_of

FAMILY = "sm_90"


@dataclass(frozen=True)
class TorchWins:
    """Calls of a LoRA that multiplies matrices, forward and backward, in which torch takes less time.

    Attributes:
        rows: from and up to how many rows of text.
        why: with the times, in microseconds of kernels unless said otherwise.
        plain: only where no image is read.
        grouped, dropout: only where several projections share the bottleneck; only where inputs are dropped.
    """

    rows: tuple[int, float]
    why: str
    plain: bool = False
    grouped: bool = False
    dropout: bool = False


# The first entry that fits decides.
TABLE = (
    TorchWins((1, math.inf), "a LoRA without an image is two products of cuBLAS (118 us, kernels 123)", plain=True),
    TorchWins((65, 8448), "a joined projection with dropout (118 us, kernels 162)", grouped=True, dropout=True),
    TorchWins((65, 1024), "few rows (steps from a CUDA graph: RoBERTa 4.8 ms, kernels 5.1; GPT-2 4.3, 4.7)"),
)


def torch_wins(
    arch: str, dtype: torch.dtype | None, rows: int, *, plain: bool, grouped: bool, dropout: bool
) -> str | None:
    """Why a call of a LoRA that multiplies matrices is torch's, or None where it is not.

    Args:
        arch: of the GPU, as :func:`~.triton_common.tiles.arch_of` gives it.
        dtype, rows: of the text; M rows.
        plain, grouped, dropout: as in :class:`TorchWins`.
    """
    if dtype not in (torch.float16, torch.bfloat16) or family_of(arch) != FAMILY:
        return None
    for entry in TABLE:
        low, high = entry.rows
        fits = (plain or not entry.plain) and (grouped or not entry.grouped) and (dropout or not entry.dropout)
        if fits and low <= rows <= high:
            return f"torch is faster on an H100: {entry.why}; backend='triton' overrides this"
    return None
