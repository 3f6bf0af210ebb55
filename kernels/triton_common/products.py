"""What a program with a low-rank activation does: the rows it owns, and products of tiles on the tensor cores."""

from __future__ import annotations

from functools import cache

import torch

from ..optional_triton import constexpr, jit, tl

SIDE = constexpr(16)


@jit
def low_rank_rows(rows, span, width, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program's block, its rows and the components of their low-rank activation, where blocks do not cross a multiple
    of ``span`` rows: block; rows [BLOCK_M], whether they exist, and as offsets [BLOCK_M, 1]; components [BLOCK_R] and
    whether they exist; whether both do [BLOCK_M, BLOCK_R].
    """
    block = tl.program_id(0)
    blocks = tl.cdiv(span, BLOCK_M)
    i_s = (block % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_m = (block // blocks) * span + i_s
    m_m = (i_s < span) & (i_m < rows)
    i_c = tl.arange(0, BLOCK_R)
    m_c = i_c < width
    return block, i_m, m_m, i_m.to(tl.int64)[:, None], i_c, m_c, m_m[:, None] & m_c[None, :]


@jit
def nearest_tf32(x, PRECISION: tl.constexpr):
    """float32 rounded to the nearest tf32 where products are in tf32: the tensor cores cut off the lower bits, and such
    errors all have one sign. Other types stay as they are.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN has no bits to carry into
    return x


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; acc may be None."""
    return tl.dot(nearest_tf32(a, PRECISION), nearest_tf32(b, PRECISION), acc, input_precision=PRECISION)


@jit
def _square_kernel(p_x, p_y):
    places = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    x = tl.load(p_x + places)
    tl.store(p_y + places, tl.dot(x, x))


@cache
def bfloat16_dot_error(device: str = "cpu") -> float:
    """Largest error of ``tl.dot`` on a product of bfloat16 matrices [16, 16] of small integers, which is exact."""
    x = (torch.arange(256, dtype=torch.float32, device=device).reshape(16, 16) % 7 - 3).bfloat16()
    y = torch.empty(16, 16, dtype=torch.float32, device=device)
    _square_kernel[(1,)](x, y)
    return (y - x.float() @ x.float()).abs().nan_to_num(float("inf")).max().item()
