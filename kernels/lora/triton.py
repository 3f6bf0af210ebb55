"""Triton kernels of the routed LoRA for any routing function: y += s route(x Aᵀ, image) Bᵀ in one pass, and back.

Letters: B images, T rows of text per image, M = B T rows, L visual tokens, K columns of x, N columns of y, R rank,
C = G*R the width of the low-rank activation that G groups share. Names: p_ pointer, i_ index, m_ mask, o_ offset. A
program owns BLOCK_M rows and keeps their t, z and gradients, padded to BLOCK_R components, in registers. How the image
reaches a kernel (VISUAL): :mod:`~routingvl.kernels.triton_common.visual_tokens`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..routing import route_bwd, route_fwd
from ..triton_common.dropout import keep_mask
from ..triton_common.products import dot, low_rank_rows
from ..triton_common.visual_tokens import NO_IMAGE, ONE_TOKEN, route_tokens, store_image_gradient

# Sizes that change from batch to batch: compiling anew when one becomes divisible by 16 would not pay.
_VARYING = ["rows", "span", "tokens", "visual_tokens", "images", "split_rows", "threshold"]


@triton.jit(do_not_specialize=_VARYING)
def lora_forward_kernel(
    p_y,  # [M, N], modified in place
    p_x,  # [M, K]
    p_a,  # [C, K]
    p_image,  # see VISUAL
    p_b,  # [G*n, R]
    p_t,  # [M, C] result
    p_seed,  # [1]
    rows,
    span,
    tokens,
    visual_tokens,
    width_in,
    width_out,  # n, columns of y per group
    rank,
    stride_ym,
    stride_xm,
    column,  # of y, where the first group's outputs are
    column_step,  # from group to group
    scaling,
    threshold,
    keep_scale,
    ROUTING: tl.constexpr,
    RELU: tl.constexpr,
    VISUAL: tl.constexpr,
    GROUPS: tl.constexpr,
    APART: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    SAVE_T: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y[:, columns of g] (+)= scaling z_g B_gᵀ. Grid: blocks of rows, splits of the columns of y.

    APART: each group has programs of its own, so that a program has R components and not G*R; for functions that do
    not mix components. The second axis is then splits times groups, the groups of a split side by side.
    """
    width = GROUPS * rank
    mine: tl.constexpr = 1 if APART else GROUPS  # groups of a program
    block, i_m, m_m, o_m, i_c, m_c, m_mc = low_rank_rows(rows, span, mine * rank, BLOCK_M, BLOCK_R)
    first_group = tl.program_id(1) % (GROUPS // mine)
    i_c += first_group * rank

    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, width_in, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K)
        m_k = i_k < width_in
        x = tl.load(p_x + o_m * stride_xm + i_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        a = tl.load(p_a + i_c[None, :] * width_in + i_k[:, None], mask=m_c[None, :] & m_k[:, None], other=0.0)
        if DROPOUT:
            x = tl.where(keep_mask(p_seed, i_m, k, threshold, BLOCK_M, BLOCK_K), x, 0.0).to(a.dtype)
        t = dot(x, a, t, PRECISION)
    if DROPOUT:
        t *= keep_scale
    share = tl.program_id(1) // (GROUPS // mine)
    if SAVE_T and share == 0:
        tl.store(p_t + o_m * width + i_c[None, :], t.to(p_t.dtype.element_ty), mask=m_mc)

    if VISUAL == NO_IMAGE:
        z = tl.where(m_c[None, :], route_fwd(t, t, ROUTING, RELU), 0.0)
    elif VISUAL == ONE_TOKEN:
        u = tl.load(p_image + (i_m // tokens)[:, None] * width + i_c[None, :], mask=m_mc, other=0.0)
        z = tl.where(m_c[None, :], route_fwd(t, u.to(tl.float32), ROUTING, RELU), 0.0)
    else:
        z = route_tokens(
            t, t, p_image, p_image, block, span, visual_tokens, width, False, RELU, VISUAL, False, BLOCK_R, PRECISION,
            BLOCK_M,
        )  # fmt: skip
    z = (z * scaling).to(p_b.dtype.element_ty)

    shares = tl.num_programs(1) // (GROUPS // mine)
    split = tl.cdiv(tl.cdiv(width_out, BLOCK_N), shares) * BLOCK_N
    first = share * split
    for group in tl.static_range(mine):
        i_r = i_c - (first_group + group) * rank
        m_r = (i_r >= 0) & (i_r < rank)
        p_b_g = p_b + (first_group + group) * width_out * rank
        p_y_g = p_y + column + (first_group + group) * column_step
        # Stages are asked for because only then the tile of y is loaded ahead like the operands of the product.
        for n in tl.range(first, tl.minimum(first + split, width_out), BLOCK_N, num_stages=4):
            i_n = n + tl.arange(0, BLOCK_N)
            m_n = i_n < width_out
            b = tl.load(p_b_g + i_n[None, :] * rank + i_r[:, None], mask=m_r[:, None] & m_n[None, :], other=0.0)
            m_mn = m_m[:, None] & m_n[None, :]
            y = dot(z, b, None, PRECISION)
            if ACCUMULATE:
                y += tl.load(p_y_g + o_m * stride_ym + i_n[None, :], mask=m_mn, other=0.0).to(tl.float32)
            tl.store(p_y_g + o_m * stride_ym + i_n[None, :], y.to(p_y.dtype.element_ty), mask=m_mn)


@triton.jit(do_not_specialize=_VARYING)
def lora_backward_kernel(
    p_dx,  # [M, K], modified in place
    p_dt,  # [M, C] result
    p_dz,  # [M, C] result
    p_z,  # [M, C] result, where there is an image
    p_du,  # [B, blocks per image, C] result; of several visual tokens [B, L, C]
    p_dy,  # [M, N]
    p_t,  # [M, C]
    p_a,  # [C, K]
    p_image,  # see VISUAL
    p_b,  # [G*n, R]
    p_seed,  # [1]
    rows,
    span,
    tokens,
    visual_tokens,
    images,  # B
    width_in,
    width_out,
    rank,
    stride_dxm,
    stride_dym,
    column,
    column_step,
    scaling,
    threshold,
    keep_scale,
    ROUTING: tl.constexpr,
    RELU: tl.constexpr,
    VISUAL: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    WRITE_DX: tl.constexpr,
    WRITE_DU: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    WRITE_Z: tl.constexpr,
    ONE_ROW: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dz = scaling dy B, dt, z, dx (+)= dt A, and du summed over this program's rows of each of its images.

    Nobody else adds to those sums, so there are no atomics and equal calls give equal bits. Grid: blocks of rows,
    splits of the columns of dx, the first of which writes everything else; span is a whole number of images.
    """
    width = GROUPS * rank
    block, i_m, m_m, o_m, i_c, m_c, m_mc = low_rank_rows(rows, span, width, BLOCK_M, BLOCK_R)

    o_mc = o_m * width + i_c[None, :]
    leads = tl.program_id(1) == 0
    if WRITE_Z and leads:
        # Here, because kept until then t and u would cost registers; they are loaded again, from the cache.
        t = tl.load(p_t + o_mc, mask=m_mc, other=0.0).to(tl.float32)
        if VISUAL == ONE_TOKEN:
            u = tl.load(p_image + (i_m // tokens)[:, None] * width + i_c[None, :], mask=m_mc, other=0.0)
            z = route_fwd(t, u.to(tl.float32), ROUTING, RELU)
        else:
            z = route_tokens(
                t, t, p_image, p_image, block, span, visual_tokens, width, False, RELU, VISUAL, False, BLOCK_R,
                PRECISION, BLOCK_M,
            )  # fmt: skip
        tl.store(p_z + o_mc, z.to(p_z.dtype.element_ty), mask=m_mc)

    dz = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for group in tl.static_range(GROUPS):
        i_r = i_c - group * rank
        m_r = (i_r >= 0) & (i_r < rank)
        p_b_g = p_b + group * width_out * rank
        p_dy_g = p_dy + column + group * column_step
        for n in range(0, width_out, BLOCK_N):
            i_n = n + tl.arange(0, BLOCK_N)
            m_n = i_n < width_out
            dy = tl.load(p_dy_g + o_m * stride_dym + i_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
            b = tl.load(p_b_g + i_n[:, None] * rank + i_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0)
            dz = dot(dy, b, dz, PRECISION)
    dz *= scaling
    if WRITE_DZ and leads:
        tl.store(p_dz + o_mc, dz.to(p_dz.dtype.element_ty), mask=m_mc)

    t = tl.load(p_t + o_mc, mask=m_mc, other=0.0).to(tl.float32)
    if VISUAL == NO_IMAGE:
        dt, du = route_bwd(dz, t, t, ROUTING, RELU)
    elif VISUAL == ONE_TOKEN:
        u = tl.load(p_image + (i_m // tokens)[:, None] * width + i_c[None, :], mask=m_mc, other=0.0).to(tl.float32)
        dt, du = route_bwd(dz, t, u, ROUTING, RELU)
        if WRITE_DU and leads:
            store_image_gradient(p_du, du, block, i_m, m_m, i_c, m_c, span, tokens, images, width, ONE_ROW, BLOCK_M)
    else:
        dt = route_tokens(
            t, dz, p_image, p_du, block, span, visual_tokens, width, True, RELU, VISUAL, WRITE_DU, BLOCK_R, PRECISION,
            BLOCK_M,
        )  # fmt: skip
    dt = tl.where(m_c[None, :], dt, 0.0).to(p_a.dtype.element_ty)
    if leads:
        tl.store(p_dt + o_mc, dt, mask=m_mc)

    if WRITE_DX:
        split = tl.cdiv(tl.cdiv(width_in, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        first = tl.program_id(1) * split
        for k in tl.range(first, tl.minimum(first + split, width_in), BLOCK_K, num_stages=3):
            i_k = k + tl.arange(0, BLOCK_K)
            m_k = i_k < width_in
            a = tl.load(p_a + i_c[:, None] * width_in + i_k[None, :], mask=m_c[:, None] & m_k[None, :], other=0.0)
            m_mk = m_m[:, None] & m_k[None, :]
            dx = dot(dt, a, None, PRECISION)
            if DROPOUT:
                dx = tl.where(keep_mask(p_seed, i_m, k, threshold, BLOCK_M, BLOCK_K), dx * keep_scale, 0.0)
            if ACCUMULATE:
                dx += tl.load(p_dx + o_m * stride_dxm + i_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
            tl.store(p_dx + o_m * stride_dxm + i_k[None, :], dx.to(p_dx.dtype.element_ty), mask=m_mk)


@triton.jit(do_not_specialize=_VARYING)
def dropped_gradient_kernel(
    p_da,  # [splits, C, K] float32 result
    p_dt,  # [M, C]
    p_x,  # [M, K]
    p_seed,  # [1]
    rows,
    split_rows,  # rows per split
    width_in,
    width,  # C
    stride_xm,
    threshold,
    keep_scale,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """da = dtᵀ dropout(x) with the mask drawn again, over one split of the rows. Grid: columns of x, splits."""
    k = tl.program_id(0) * BLOCK_K
    split = tl.program_id(1)
    i_k = k + tl.arange(0, BLOCK_K)
    m_k = i_k < width_in
    i_c = tl.arange(0, BLOCK_R)
    m_c = i_c < width
    last = tl.minimum((split + 1) * split_rows, rows)
    da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(split * split_rows, last, BLOCK_M):
        i_m = m + tl.arange(0, BLOCK_M)
        m_m = i_m < last
        o_m = i_m.to(tl.int64)
        dt = tl.load(p_dt + o_m[None, :] * width + i_c[:, None], mask=m_c[:, None] & m_m[None, :], other=0.0)
        x = tl.load(p_x + o_m[:, None] * stride_xm + i_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        x = tl.where(keep_mask(p_seed, i_m, k, threshold, BLOCK_M, BLOCK_K), x, 0.0).to(dt.dtype)
        da = dot(dt, x, da, PRECISION)
    o_da = (split.to(tl.int64) * width + i_c[:, None]) * width_in + i_k[None, :]
    tl.store(p_da + o_da, da * keep_scale, mask=m_c[:, None] & m_k[None, :])
