"""Triton kernels of the routed Adapter: y = [x +] act(route(x Aᵀ + b_down, image)) Bᵀ + b_up in one pass, and back.

Letters and names as in :mod:`routingvl.kernels.lora.triton`. A program takes its rows of text through the whole
bottleneck: t leaves the registers once, written for the backward pass, between the down- and the up-projection.

Where z is rank one in each image, the down-projection collapses to one inner product per row: z = c u with
c = x . w + k, where w = Aᵀ p(u) and k = b_down . p(u) are the image's (constexpr RANK_ONE).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..activations import act_bwd, act_fwd
from ..routing import route_bwd, route_fwd, sum_of_products
from ..triton_common.products import dot, low_rank_rows
from ..triton_common.visual_tokens import NO_IMAGE, ONE_TOKEN, route_tokens, store_image_gradient

# Sizes that change from batch to batch: compiling anew when one becomes divisible by 16 would not pay.
_VARYING = ["rows", "span", "tokens", "visual_tokens", "images"]


@triton.jit(do_not_specialize=_VARYING)
def adapter_forward_kernel(
    p_y,  # [M, K] result
    p_t,  # t [M, R] result; RANK_ONE: c [M] float32
    p_x,  # [M, K]
    p_down,  # A [R, K]; RANK_ONE: w [B, K]
    p_down_bias,  # b_down [R]; RANK_ONE: k [B]
    p_image,  # u [B, R], or as VISUAL says
    p_up,  # B [K, R]
    p_up_bias,  # b_up [K]
    rows,
    span,
    tokens,
    visual_tokens,
    width,  # K
    rank,
    stride_xm,
    ROUTING: tl.constexpr,
    RELU: tl.constexpr,
    VISUAL: tl.constexpr,
    ACT: tl.constexpr,
    RANK_ONE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    DOWN_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    SAVE_T: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: blocks of rows, splits of the columns of y (each repeats the down-projection)."""
    block, i_m, m_m, o_m, i_r, m_r, m_mr = low_rank_rows(rows, span, rank, BLOCK_M, BLOCK_R)
    i_b = i_m // tokens
    saves = SAVE_T and tl.program_id(1) == 0

    if RANK_ONE:
        products = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for k in tl.range(0, width, BLOCK_K, num_stages=3):
            i_k = k + tl.arange(0, BLOCK_K)
            m_mk = m_m[:, None] & (i_k < width)[None, :]
            x = tl.load(p_x + o_m * stride_xm + i_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
            w = tl.load(p_down + i_b.to(tl.int64)[:, None] * width + i_k[None, :], mask=m_mk, other=0.0)
            products += x * w.to(tl.float32)
        c = tl.sum(products, 1)
        if DOWN_BIAS:
            c += tl.load(p_down_bias + i_b, mask=m_m, other=0.0).to(tl.float32)
        if saves:
            tl.store(p_t + i_m, c, mask=m_m)
        u = tl.load(p_image + i_b[:, None] * rank + i_r[None, :], mask=m_mr, other=0.0)
        z = c[:, None] * u.to(tl.float32)
    else:
        t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in range(0, width, BLOCK_K):
            i_k = k + tl.arange(0, BLOCK_K)
            m_k = i_k < width
            x = tl.load(p_x + o_m * stride_xm + i_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            down = tl.load(p_down + i_r[None, :] * width + i_k[:, None], mask=m_r[None, :] & m_k[:, None], other=0.0)
            t = dot(x, down, t, PRECISION)
        if DOWN_BIAS:
            t += tl.load(p_down_bias + i_r, mask=m_r, other=0.0).to(tl.float32)[None, :]
        if saves:
            tl.store(p_t + o_m * rank + i_r[None, :], t.to(p_t.dtype.element_ty), mask=m_mr)
        if VISUAL == NO_IMAGE:
            z = tl.where(m_r[None, :], route_fwd(t, t, ROUTING, RELU), 0.0)
        elif VISUAL == ONE_TOKEN:
            u = tl.load(p_image + i_b[:, None] * rank + i_r[None, :], mask=m_mr, other=0.0)
            z = tl.where(m_r[None, :], route_fwd(t, u.to(tl.float32), ROUTING, RELU), 0.0)
        else:
            z = route_tokens(
                t, t, p_image, p_image, block, span, visual_tokens, rank, False, RELU, VISUAL, False, BLOCK_R,
                PRECISION, BLOCK_M,
            )  # fmt: skip
    h = act_fwd(z, ACT).to(p_up.dtype.element_ty)

    split = tl.cdiv(tl.cdiv(width, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    first = tl.program_id(1) * split
    if UP_BIAS:  # each step loads that of the next: it is too narrow for an asynchronous copy, which runs ahead alone
        i_n = first + tl.arange(0, BLOCK_N)
        up_bias = tl.load(p_up_bias + i_n, mask=i_n < width, other=0.0)
    # Stages are asked for because only then the tile of x is loaded ahead like the operands of the product.
    for n in tl.range(first, tl.minimum(first + split, width), BLOCK_N, num_stages=3):
        i_n = n + tl.arange(0, BLOCK_N)
        m_n = i_n < width
        m_mn = m_m[:, None] & m_n[None, :]
        up = tl.load(p_up + i_n[None, :] * rank + i_r[:, None], mask=m_r[:, None] & m_n[None, :], other=0.0)
        y = dot(h, up, None, PRECISION)
        if UP_BIAS:
            y += up_bias.to(tl.float32)[None, :]
            up_bias = tl.load(p_up_bias + i_n + BLOCK_N, mask=i_n + BLOCK_N < width, other=0.0)
        if RESIDUAL:  # the second reading of x meets the L2 cache
            y += tl.load(p_x + o_m * stride_xm + i_n[None, :], mask=m_mn, other=0.0).to(tl.float32)
        tl.store(p_y + o_m * width + i_n[None, :], y.to(p_y.dtype.element_ty), mask=m_mn)


@triton.jit(do_not_specialize=_VARYING)
def adapter_backward_kernel(
    p_dx,  # [M, K] result
    p_dt,  # dt [M, R] result; RANK_ONE: dc [M] float32
    p_dz,  # [M, R] result
    p_du,  # [B, blocks per image, R] result; of several visual tokens [B, L, R]
    p_h,  # [M, R] result
    p_dy,  # [M, K]
    p_t,  # what the forward pass saved
    p_down,  # as in the forward kernel, and so on
    p_image,
    p_up,
    rows,
    span,
    tokens,
    visual_tokens,
    images,  # B
    width,
    rank,
    stride_dym,
    ROUTING: tl.constexpr,
    RELU: tl.constexpr,
    VISUAL: tl.constexpr,
    ACT: tl.constexpr,
    RANK_ONE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WRITE_DX: tl.constexpr,
    WRITE_DU: tl.constexpr,
    WRITE_DZ: tl.constexpr,
    WRITE_H: tl.constexpr,
    ONE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dh = dy B, then back through activation and routing to dt; dx = [dy +] dt A; h once more for the gradient of B.

    du is summed over this program's rows of each of its images: nobody else adds to those sums, so there are no atomics
    and equal calls give equal bits. Grid: blocks of rows, splits of the columns of dx, the first of which writes
    everything else; span is a whole number of images.
    """
    block, i_m, m_m, o_m, i_r, m_r, m_mr = low_rank_rows(rows, span, rank, BLOCK_M, BLOCK_R)
    i_b = i_m // tokens
    o_mr = o_m * rank + i_r[None, :]

    dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n in range(0, width, BLOCK_N):
        i_n = n + tl.arange(0, BLOCK_N)
        m_n = i_n < width
        dy = tl.load(p_dy + o_m * stride_dym + i_n[None, :], mask=m_m[:, None] & m_n[None, :], other=0.0)
        up = tl.load(p_up + i_n[:, None] * rank + i_r[None, :], mask=m_n[:, None] & m_r[None, :], other=0.0)
        dh = dot(dy, up, dh, PRECISION)

    if VISUAL == ONE_TOKEN:
        u = tl.load(p_image + i_b[:, None] * rank + i_r[None, :], mask=m_mr, other=0.0).to(tl.float32)
    if RANK_ONE:
        c = tl.load(p_t + i_m, mask=m_m, other=0.0)
        z = c[:, None] * u
    else:
        t = tl.load(p_t + o_mr, mask=m_mr, other=0.0).to(tl.float32)
        if VISUAL == NO_IMAGE:
            z = tl.where(m_r[None, :], route_fwd(t, t, ROUTING, RELU), 0.0)
        elif VISUAL == ONE_TOKEN:
            z = tl.where(m_r[None, :], route_fwd(t, u, ROUTING, RELU), 0.0)
        else:
            z = route_tokens(
                t, t, p_image, p_image, block, span, visual_tokens, rank, False, RELU, VISUAL, False, BLOCK_R,
                PRECISION, BLOCK_M,
            )  # fmt: skip
    leads = tl.program_id(1) == 0
    if WRITE_H and leads:
        tl.store(p_h + o_mr, act_fwd(z, ACT).to(p_h.dtype.element_ty), mask=m_mr)
    dz = act_bwd(dh, z, ACT)
    if WRITE_DZ and leads:
        tl.store(p_dz + o_mr, dz.to(p_dz.dtype.element_ty), mask=m_mr)

    if RANK_ONE:
        dc = sum_of_products(dz, u, 1)
        du = c[:, None] * dz
        if leads:
            tl.store(p_dt + i_m, dc, mask=m_m)
    else:
        if VISUAL == NO_IMAGE:
            dt, du = route_bwd(dz, t, t, ROUTING, RELU)
        elif VISUAL == ONE_TOKEN:
            # Loaded again, from the cache: kept through the activation they would cost registers, up to spilling.
            t = tl.load(p_t + o_mr, mask=m_mr, other=0.0).to(tl.float32)
            u = tl.load(p_image + i_b[:, None] * rank + i_r[None, :], mask=m_mr, other=0.0).to(tl.float32)
            dt, du = route_bwd(dz, t, u, ROUTING, RELU)
        else:
            dt = route_tokens(
                t, dz, p_image, p_du, block, span, visual_tokens, rank, True, RELU, VISUAL, WRITE_DU, BLOCK_R,
                PRECISION, BLOCK_M,
            )  # fmt: skip
        dt = tl.where(m_r[None, :], dt, 0.0).to(p_down.dtype.element_ty)
        if leads:
            tl.store(p_dt + o_mr, dt, mask=m_mr)
    if VISUAL == ONE_TOKEN:  # noqa: SIM102 (elsewhere there is no du)
        if WRITE_DU and leads:
            store_image_gradient(p_du, du, block, i_m, m_m, i_r, m_r, span, tokens, images, rank, ONE_ROW, BLOCK_M)

    if WRITE_DX:
        split = tl.cdiv(tl.cdiv(width, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        first = tl.program_id(1) * split
        for k in tl.range(first, tl.minimum(first + split, width), BLOCK_K, num_stages=3):
            i_k = k + tl.arange(0, BLOCK_K)
            m_k = i_k < width
            m_mk = m_m[:, None] & m_k[None, :]
            if RANK_ONE:
                w = tl.load(p_down + i_b.to(tl.int64)[:, None] * width + i_k[None, :], mask=m_mk, other=0.0)
                dx = dc[:, None] * w.to(tl.float32)
            else:
                down = tl.load(
                    p_down + i_r[:, None] * width + i_k[None, :], mask=m_r[:, None] & m_k[None, :], other=0.0
                )
                dx = dot(dt, down, None, PRECISION)
            if RESIDUAL:
                dx += tl.load(p_dy + o_m * stride_dym + i_k[None, :], mask=m_mk, other=0.0).to(tl.float32)
            tl.store(p_dx + o_m * width + i_k[None, :], dx.to(p_dx.dtype.element_ty), mask=m_mk)
