"""The registered ops of the routed LoRA's Triton backend: each checks nothing, allocates results and launches a kernel.

Tensors are matrices of rows: x [M, K], y [M, N], with the last dimension contiguous; weights and the image are
contiguous. ``tokens`` is T, rows per image. ``seed`` [1] int64 draws the dropout mask, None for none. ``visual`` and
``image``: see :func:`~routingvl.kernels.triton_common.visual_tokens.image_operand`. The start columns in ``options``
are equally spaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..triton_common.cached_launcher import CachedKernel
from ..triton_common.dropout import dropout_arguments
from ..triton_common.launch import (
    define_op,
    image_gradient,
    launch_backward,
    launch_fitting,
    launch_forward,
    processors,
    product_precision,
    sum_of_blocks,
)
from ..triton_common.tiles import Tile, column_splits, padded_rank
from ..triton_common.visual_tokens import image_arguments, new_image_gradients
from .options import LoRAOptions
from .rank_one import rank_one_backward_kernel, rank_one_forward_kernel
from .triton import dropped_gradient_kernel, lora_backward_kernel, lora_forward_kernel

SPLIT_ROWS = 512  # least rows for which another split of dropped_gradient pays
MAX_SPLITS = 32

launch_lora_forward = CachedKernel(lora_forward_kernel)
launch_lora_backward = CachedKernel(lora_backward_kernel)
launch_dropped_gradient = CachedKernel(dropped_gradient_kernel)
launch_rank_one_forward = CachedKernel(rank_one_forward_kernel)
launch_rank_one_backward = CachedKernel(rank_one_backward_kernel)


def _call_arguments(seed: Tensor | None, tokens: int, accumulate: bool, options: LoRAOptions) -> dict[str, Any]:
    """What every kernel of the LoRA may ask for, by the names of its parameters in lower case."""
    columns = options.columns
    return {
        **options._asdict(), **dropout_arguments(seed, options.dropout), "groups": len(columns), "column": columns[0],
        "column_step": columns[1] - columns[0] if len(columns) > 1 else 0, "tokens": tokens, "accumulate": accumulate,
    }  # fmt: skip


def _dense_arguments(a: Tensor, image: Tensor | None, visual: int, b: Tensor, groups: int) -> dict[str, Any]:
    """What the two kernels with a low-rank activation take besides."""
    return dict(
        **image_arguments(image, visual, unused=b), p_a=a, p_b=b, width_in=a.shape[1], width_out=b.shape[0] // groups,
        rank=b.shape[1], block_r=padded_rank(a.shape[0]), precision=product_precision(a),
    )  # fmt: skip


def _new_activation(y, x, a, image, b, seed, tokens, visual, accumulate, save_t, options):
    return x.new_empty(x.shape[0] if save_t else 0, a.shape[0])


@define_op(_new_activation, mutates=["y"])
def lora_forward_(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    image: Tensor | None,
    b: Tensor,
    seed: Tensor | None,
    tokens: int,
    visual: int,
    accumulate: bool,
    save_t: bool,
    options: LoRAOptions,
) -> Tensor:
    """y[:, columns of each group] (+)= scaling z Bᵀ; returns t [M, G*R], empty unless ``save_t``."""
    width, dropout = a.shape[0], seed is not None
    t = _new_activation(y, x, a, image, b, seed, tokens, visual, accumulate, save_t, options)
    if len(x):
        arguments = dict(
            **_call_arguments(seed, tokens, accumulate, options),
            **_dense_arguments(a, image, visual, b, options.groups),
            p_y=y, p_t=t, p_seed=seed if dropout else x, stride_ym=y.stride(0), save_t=save_t,
        )  # fmt: skip
        columns = b.shape[0] // options.groups
        launch_forward("lora_forward", launch_lora_forward, x, width, columns, arguments, dropout=dropout)
    return t


def _new_gradients(dx, dy, t, a, image, b, seed, tokens, visual, accumulate, need_u, need_z, options):
    z = torch.empty_like(t) if need_z else t.new_empty(0, t.shape[1])
    return torch.empty_like(t), *new_image_gradients(t, image, visual, t.shape[1], need_u), z


@define_op(_new_gradients, mutates=["dx"])
def lora_backward_(
    dx: Tensor | None,
    dy: Tensor,
    t: Tensor,
    a: Tensor,
    image: Tensor | None,
    b: Tensor,
    seed: Tensor | None,
    tokens: int,
    visual: int,
    accumulate: bool,
    need_u: bool,
    need_z: bool,
    options: LoRAOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (+)= dt A where given; returns dt [M, G*R]; where ``need_u``, du [B, L, G*R], or for GRAM dz [M, G*R] in its
    place; and where ``need_z``, z [M, G*R]. What is not needed is empty.
    """
    call = dict(dropout=seed is not None, relu=options.relu)
    dt, dz, du, z = _new_gradients(dx, dy, t, a, image, b, seed, tokens, visual, accumulate, need_u, need_z, options)
    if len(t) == 0:
        return dt, dz, du.zero_(), z
    target = t if dx is None else dx
    arguments = dict(
        **_call_arguments(seed, tokens, accumulate, options), **_dense_arguments(a, image, visual, b, options.groups),
        p_dx=target, p_dt=dt, p_dz=dz, p_du=du, p_z=z, p_t=t, p_seed=t if seed is None else seed,
        stride_dxm=target.stride(0), write_dx=dx is not None, write_z=need_z, need_u=need_u,
    )  # fmt: skip
    kernel, width = launch_lora_backward, t.shape[1]
    parts = launch_backward("lora_backward", kernel, dy, width, a.shape[1], arguments, **call)
    return dt, dz, image_gradient(parts, du, t, image, options.relu), z


@define_op(lambda dt, x, seed, options: dt.new_empty(dt.shape[1], x.shape[1]))
def dropped_gradient(dt: Tensor, x: Tensor, seed: Tensor, options: LoRAOptions) -> Tensor:
    """dA [G*R, K] = dtᵀ dropout(x) from dt [M, G*R], the mask drawn again."""
    (rows, width_in), width = x.shape, dt.shape[1]
    if rows == 0:
        return dt.new_zeros(width, width_in)
    # A function of the number of rows alone, so that equal calls add in the same order.
    split_rows = max(SPLIT_ROWS, -(-rows // MAX_SPLITS))
    splits = -(-rows // split_rows)
    da = x.new_empty(splits, width, width_in, dtype=torch.float32)
    arguments = dict(
        **dropout_arguments(seed, options.dropout), p_da=da, p_dt=dt, p_x=x, p_seed=seed, rows=rows,
        split_rows=split_rows, width_in=width_in, width=width, stride_xm=x.stride(0), block_r=padded_rank(width),
        precision=product_precision(x),
    )  # fmt: skip

    def attempt(tile: Tile) -> None:
        launch_dropped_gradient((-(-width_in // tile.block_k), splits), {**arguments, **vars(tile)})

    launch_fitting("dropped_gradient", width, x, attempt, tiles_of="lora_backward")
    return da.sum(0).to(dt.dtype)


def _new_inner_products(y, x, p, o, seed, tokens, accumulate, options):
    return x.new_empty(x.shape[0], dtype=torch.float32)


@define_op(_new_inner_products, mutates=["y"])
def rank_one_forward_(
    y: Tensor,
    x: Tensor,
    p: Tensor,
    o: Tensor,
    seed: Tensor | None,
    tokens: int,
    accumulate: bool,
    options: LoRAOptions,
) -> Tensor:
    """y_b[:, columns of each group] (+)= c_b o_b; returns c [M] = x . p in float32."""
    (rows, width_in), width_out = x.shape, o.shape[1] // options.groups
    c = _new_inner_products(y, x, p, o, seed, tokens, accumulate, options)
    if rows == 0:
        return c
    arguments = dict(
        **_call_arguments(seed, tokens, accumulate, options), p_y=y, p_x=x, p_p=p, p_o=o, p_c=c,
        p_seed=x if seed is None else seed, width_in=width_in, width_out=width_out, stride_ym=y.stride(0),
        stride_xm=x.stride(0),
    )  # fmt: skip

    def attempt(tile: Tile) -> None:
        splits = column_splits(tile, rows, width_out, processors(x.device))
        grid = (rows // tokens, -(-tokens // tile.block_m), splits)
        launch_rank_one_forward(grid, {**arguments, **vars(tile)})

    launch_fitting("rank_one_forward", 1, x, attempt)
    return c


def _new_factor_gradients(dx, dy, x, p, o, c, seed, tokens, accumulate, need_p, need_o, options):
    images = p.shape[0]
    return p.new_empty(images if need_p else 0, p.shape[1]), o.new_empty(images if need_o else 0, o.shape[1])


@define_op(_new_factor_gradients, mutates=["dx"])
def rank_one_backward_(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    p: Tensor,
    o: Tensor,
    c: Tensor,
    seed: Tensor | None,
    tokens: int,
    accumulate: bool,
    need_p: bool,
    need_o: bool,
    options: LoRAOptions,
) -> tuple[Tensor, Tensor]:
    """dx (+)= dc p where given; returns dp [B, K] and do [B, G*n], empty unless needed."""
    (rows, width_in), images = x.shape, p.shape[0]
    if rows == 0:
        empty = _new_factor_gradients(dx, dy, x, p, o, c, seed, tokens, accumulate, need_p, need_o, options)
        return empty[0].zero_(), empty[1].zero_()
    target = x if dx is None else dx
    arguments = dict(
        **_call_arguments(seed, tokens, accumulate, options), p_dx=target, p_dy=dy, p_x=x, p_p=p, p_o=o, p_c=c,
        p_seed=x if seed is None else seed, width_in=width_in, width_out=o.shape[1] // options.groups,
        stride_dxm=target.stride(0), stride_dym=dy.stride(0), stride_xm=x.stride(0), write_dx=dx is not None,
        write_dp=need_p, write_do=need_o,
    )  # fmt: skip

    def attempt(tile: Tile) -> tuple[Tensor, Tensor]:
        blocks = -(-tokens // tile.block_m)
        dp = x.new_empty(images if need_p else 0, blocks, width_in, dtype=torch.float32)
        do = x.new_empty(images if need_o else 0, blocks, o.shape[1], dtype=torch.float32)
        launch_rank_one_backward((images, blocks), {**arguments, "p_dp": dp, "p_do": do, **vars(tile)})
        return dp, do

    few = images * -(-tokens // 32) <= 2 * processors(x.device)
    dp, do = launch_fitting("rank_one_backward", 1, x, attempt, few=few, two_parts=16 < tokens <= 32)
    return sum_of_blocks(dp, p.dtype), sum_of_blocks(do, o.dtype)
