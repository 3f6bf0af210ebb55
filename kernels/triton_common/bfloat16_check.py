"""One small product by Triton's ``tl.dot``, whose result is known."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

SIDE = 16


@triton.jit
def _square_kernel(x_ptr, y_ptr, SIDE: tl.constexpr):
    places = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    x = tl.load(x_ptr + places)
    tl.store(y_ptr + places, tl.dot(x, x))


@cache
def bfloat16_dot_error(device: str = "cpu") -> float:
    """Largest error of ``tl.dot`` on a product of bfloat16 matrices [16, 16] of small integers, which is exact."""
    x = (torch.arange(SIDE * SIDE, dtype=torch.float32, device=device).reshape(SIDE, SIDE) % 7 - 3).bfloat16()
    y = torch.empty(SIDE, SIDE, dtype=torch.float32, device=device)
    _square_kernel[(1,)](x, y, SIDE=SIDE)
    return (y - x.float() @ x.float()).abs().nan_to_num(float("inf")).max().item()
