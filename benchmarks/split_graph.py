"""Two products in one kernel, as LoRAFusion's split graph has them: x Wᵀ + bias + z Bᵀ, and dy W + dt A.

The second product goes on in the registers where the first one has been added up, so the frozen product's result is
written once and never read. Nothing of the library uses this: it is a competitor to measure against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from routingvl.kernels.float32_precision import tf32_allowed
from routingvl.kernels.optional_triton import interpreted, tl, triton

# Rows, columns, inner step, warps, stages; the fastest for a size is found by its first call.
TILES = ((128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4))


@triton.jit
def _add_product(acc, p_left, p_right, m, n, inner, rows, columns, s_lm, s_lk, s_rk, s_rn, PRECISION: tl.constexpr,
                 BLOCK_K: tl.constexpr):  # fmt: skip
    """acc += left[m, :] right[:, n]."""
    for start in range(0, inner, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(
            p_left + m[:, None] * s_lm + k[None, :] * s_lk, mask=(m[:, None] < rows) & (k[None, :] < inner), other=0.0
        )
        right = tl.load(
            p_right + k[:, None] * s_rk + n[None, :] * s_rn,
            mask=(k[:, None] < inner) & (n[None, :] < columns),
            other=0.0,
        )
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def two_products_kernel(
    p_x, p_w, p_bias, p_z, p_b, p_y, rows, columns, inner, rank,
    s_xm, s_xk, s_wk, s_wn, s_zm, s_zk, s_bk, s_bn, s_ym,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = x w + bias + z b; x [rows, inner], w [inner, columns], z [rows, rank], b [rank, columns], any strides."""
    m = (tl.program_id(0).to(tl.int64) * BLOCK_M) + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _add_product(acc, p_x, p_w, m, n, inner, rows, columns, s_xm, s_xk, s_wk, s_wn, PRECISION, BLOCK_K)
    acc = _add_product(acc, p_z, p_b, m, n, rank, rows, columns, s_zm, s_zk, s_bk, s_bn, PRECISION, BLOCK_K)
    if BIAS:
        acc += tl.load(p_bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    mask = (m[:, None] < rows) & (n[None, :] < columns)
    tl.store(p_y + m[:, None] * s_ym + n[None, :], acc.to(p_y.dtype.element_ty), mask=mask)


_fastest: dict[tuple, tuple[int, ...]] = {}


def two_products(x: Tensor, w: Tensor, bias: Tensor | None, z: Tensor, b: Tensor) -> Tensor:
    """x w + bias + z b [M, N] of x [M, K], w [K, N], z [M, R], b [R, N], in x's dtype, summed in float32."""
    y = x.new_empty(x.shape[0], w.shape[1])
    z = z.to(x.dtype)
    precision = "tf32" if x.dtype != torch.float32 or tf32_allowed() else "ieee"

    def launch(tile: tuple[int, ...]) -> None:
        block_m, block_n, block_k, warps, stages = tile
        grid = (triton.cdiv(x.shape[0], block_m), triton.cdiv(w.shape[1], block_n))
        two_products_kernel[grid](
            x, w, x if bias is None else bias, z, b, y, *y.shape, x.shape[1], z.shape[1],
            *x.stride(), *w.stride(), *z.stride(), *b.stride(), y.stride(0),
            BIAS=bias is not None, PRECISION=precision, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip

    key = (x.shape, w.shape, w.stride(), z.shape[1], x.dtype, bias is None)
    if key not in _fastest:
        _fastest[key] = TILES[-1] if interpreted() else _fastest_of(launch, x.dtype)
    launch(_fastest[key])
    return y


def _fastest_of(launch, dtype: torch.dtype) -> tuple[int, ...]:
    """The tile that takes least time on this GPU; float32 has half as long inner steps, for the shared memory."""
    tiles = [(m, n, k * 2 // dtype.itemsize, warps, stages) for m, n, k, warps, stages in TILES]
    return min(tiles, key=lambda tile: triton.testing.do_bench(lambda: launch(tile), warmup=5, rep=20))
