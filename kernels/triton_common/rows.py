"""Which rows of the text a program owns."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_rows(block, rows, span, BLOCK_M: tl.constexpr):
    """Rows [BLOCK_M] of a program and whether they exist, where blocks do not cross a multiple of ``span`` rows."""
    blocks = tl.cdiv(span, BLOCK_M)
    i_s = (block % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    i_m = (block // blocks) * span + i_s
    return i_m, (i_s < span) & (i_m < rows)


@triton.jit
def image_rows(tokens, BLOCK_M: tl.constexpr):
    """Rows [BLOCK_M] of this program in x and y, and whether they exist."""
    i_t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.program_id(0) * tokens + i_t, i_t < tokens
