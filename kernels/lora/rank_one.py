"""Triton kernels of the routed LoRA where it is rank one in each image: y_b += c_b o_b with c_b = x_b . p_b, and back.

There is no low-rank activation and no matrix product: a row costs K + N multiply-adds, all in float32, and the kernels
run at the speed of reading x and y. Letters and prefixes as in :mod:`.triton`. A program owns BLOCK_M rows of one
image.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..routing import sum_of_products
from ..triton_common.dropout import keep_mask

_VARYING = ["tokens", "threshold"]


@triton.jit
def image_rows(tokens, BLOCK_M: tl.constexpr):
    """Rows [BLOCK_M] of this program in x and y, and whether they exist."""
    i_t = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.program_id(0) * tokens + i_t, i_t < tokens


@triton.jit(do_not_specialize=_VARYING)
def rank_one_forward_kernel(
    p_y,  # [M, N], modified in place
    p_x,  # [M, K]
    p_p,  # [B, K]
    p_o,  # [B, G*n]
    p_c,  # [M] float32 result
    p_seed,  # [1]
    tokens,
    width_in,
    width_out,  # n, columns of y per group
    stride_ym,
    stride_xm,
    column,  # of y, where the first group's outputs are
    column_step,  # from group to group
    threshold,
    keep_scale,
    GROUPS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[:, columns of g] (+)= (x . p) o_g. Grid: images, blocks of rows, splits of the columns of y."""
    image = tl.program_id(0).to(tl.int64)
    i_m, m_m = image_rows(tokens, BLOCK_M)
    o_m = i_m.to(tl.int64)[:, None]

    products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for k in range(0, width_in, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K)
        m_k = i_k < width_in
        x = tl.load(p_x + o_m * stride_xm + i_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        p = tl.load(p_p + image * width_in + i_k, mask=m_k, other=0.0).to(tl.float32)
        if DROPOUT:
            x = tl.where(keep_mask(p_seed, i_m, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        products += x * p[None, :]
    c = tl.sum(products, 1)
    if DROPOUT:
        c *= keep_scale
    if tl.program_id(2) == 0:
        tl.store(p_c + i_m, c, mask=m_m)

    split = tl.cdiv(tl.cdiv(width_out, BLOCK_N), tl.num_programs(2)) * BLOCK_N
    first = tl.program_id(2) * split
    for group in tl.static_range(GROUPS):
        p_y_g = p_y + column + group * column_step
        p_o_g = p_o + (image * GROUPS + group) * width_out
        for n in range(first, tl.minimum(first + split, width_out), BLOCK_N):
            i_n = n + tl.arange(0, BLOCK_N)
            m_n = i_n < width_out
            m_mn = m_m[:, None] & m_n[None, :]
            o = tl.load(p_o_g + i_n, mask=m_n, other=0.0).to(tl.float32)
            y = c[:, None] * o[None, :]
            if ACCUMULATE:
                y += tl.load(p_y_g + o_m * stride_ym + i_n[None, :], mask=m_mn, other=0.0).to(tl.float32)
            tl.store(p_y_g + o_m * stride_ym + i_n[None, :], y.to(p_y.dtype.element_ty), mask=m_mn)


@triton.jit(do_not_specialize=_VARYING)
def rank_one_backward_kernel(
    p_dx,  # [M, K], modified in place
    p_dp,  # [B, blocks, K] float32 result
    p_do,  # [B, blocks, G*n] float32 result
    p_dy,  # [M, N]
    p_x,  # [M, K]
    p_p,  # [B, K]
    p_o,  # [B, G*n]
    p_c,  # [M] float32
    p_seed,  # [1]
    tokens,
    width_in,
    width_out,
    stride_dxm,
    stride_dym,
    stride_xm,
    column,
    column_step,
    threshold,
    keep_scale,
    GROUPS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WRITE_DX: tl.constexpr,
    WRITE_DP: tl.constexpr,
    WRITE_DO: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dc = dy . o, dx (+)= dc p, and dp = dcᵀ x and do = cᵀ dy over this program's rows. Grid: images, blocks of rows.

    The blocks of an image write apart and are added afterwards: no atomics, equal calls give equal bits.
    """
    image = tl.program_id(0).to(tl.int64)
    block = image * tl.num_programs(1) + tl.program_id(1)
    i_m, m_m = image_rows(tokens, BLOCK_M)
    o_m = i_m.to(tl.int64)[:, None]
    c = tl.load(p_c + i_m, mask=m_m, other=0.0)

    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in tl.static_range(GROUPS):
        p_dy_g = p_dy + column + group * column_step
        p_o_g = p_o + (image * GROUPS + group) * width_out
        p_do_g = p_do + (block * GROUPS + group) * width_out
        for n in range(0, width_out, BLOCK_N):
            i_n = n + tl.arange(0, BLOCK_N)
            m_n = i_n < width_out
            m_mn = m_m[:, None] & m_n[None, :]
            dy = tl.load(p_dy_g + o_m * stride_dym + i_n[None, :], mask=m_mn, other=0.0).to(tl.float32)
            o = tl.load(p_o_g + i_n, mask=m_n, other=0.0).to(tl.float32)
            products += dy * o[None, :]
            if WRITE_DO:
                tl.store(p_do_g + i_n, sum_of_products(dy, tl.broadcast_to(c[:, None], dy.shape), 0), mask=m_n)

    if WRITE_DX or WRITE_DP:
        dc = tl.sum(products, 1)
        if DROPOUT:
            dc *= keep_scale
        for k in range(0, width_in, BLOCK_K):
            i_k = k + tl.arange(0, BLOCK_K)
            m_k = i_k < width_in
            m_mk = m_m[:, None] & m_k[None, :]
            weight = tl.broadcast_to(dc[:, None], (BLOCK_M, BLOCK_K))
            if DROPOUT:
                weight = tl.where(keep_mask(p_seed, i_m, k, threshold, BLOCK_M, BLOCK_K), weight, 0.0)
            if WRITE_DP:
                x = tl.load(p_x + o_m * stride_xm + i_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
                tl.store(p_dp + block * width_in + i_k, sum_of_products(weight, x, 0), mask=m_k)
            if WRITE_DX:
                p = tl.load(p_p + image * width_in + i_k, mask=m_k, other=0.0).to(tl.float32)
                dx = weight * p[None, :]
                if ACCUMULATE:
                    dx += tl.load(p_dx + o_m * stride_dxm + i_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
                tl.store(p_dx + o_m * stride_dxm + i_k[None, :], dx.to(p_dx.dtype.element_ty), mask=m_mk)
