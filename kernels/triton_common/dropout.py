"""Dropout inside a kernel: the mask is drawn where it is needed, from a seed, and never stored."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


def dropout_arguments(seed: Tensor | None, dropout: float) -> dict[str, Any]:
    """Threshold of a 31-bit integer, and the factor of what is kept."""
    if seed is None:
        return {"dropout": False, "threshold": 0, "keep_scale": 1.0}
    keep_scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    return {"dropout": True, "threshold": round(dropout * 2**31), "keep_scale": keep_scale}


@triton.jit
def keep_mask(p_seed, i_m, k, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Which of the columns k, k+1, ... of these rows dropout keeps [BLOCK_M, BLOCK_K]; k is a multiple of 4.

    The bit of an element depends on the seed, its row and its column alone, never on the tile, so every kernel draws
    the same mask. One call of the generator serves four neighbouring columns. ``threshold``: probability times 2^31.
    """
    zeros = tl.zeros((BLOCK_M, BLOCK_K // 4), tl.int32)
    i_q = k // 4 + tl.arange(0, BLOCK_K // 4)
    seed = tl.load(p_seed)
    w0, w1, w2, w3 = tl.philox(seed, zeros + i_q[None, :], zeros + i_m[:, None], zeros, zeros, n_rounds=7)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (word >> 1).to(tl.int32) >= threshold
