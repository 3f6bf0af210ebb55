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

from ..routing import ROUTINGS
from ..triton_common.cached_launcher import CachedKernel
from ..triton_common.dropout import dropout_arguments
from ..triton_common.launch import (
    Prepared,
    aligned,
    all_plain,
    define_op,
    image_gradient,
    launch_again,
    launch_kernel,
    prepare_backward,
    prepare_forward,
    processors,
    product_precision,
    sum_of_blocks,
    tf32_matters,
)
from ..triton_common.tiles import Tile, column_splits, padded_rank
from ..triton_common.visual_tokens import Visual, new_image_gradients, visual_tokens
from .options import LoRAOptions
from .rank_one import rank_one_backward_kernel, rank_one_forward_kernel
from .triton import dropped_gradient_kernel, lora_backward_kernel, lora_forward_kernel

SPLIT_ROWS = 512  # least rows for which another split of dropped_gradient pays
MAX_SPLITS = 32
ONE_TOKEN = int(Visual.ONE_TOKEN)
# Above so many components each group has programs of its own in the forward kernel, where the function lets it.
APART_ABOVE = 128
ELEMENTWISE = frozenset(row.code for row in ROUTINGS.values() if row.elementwise)

launch_lora_forward = CachedKernel(lora_forward_kernel)
launch_lora_backward = CachedKernel(lora_backward_kernel)
launch_dropped_gradient = CachedKernel(dropped_gradient_kernel)
launch_rank_one_forward = CachedKernel(rank_one_forward_kernel)
launch_rank_one_backward = CachedKernel(rank_one_backward_kernel)


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """``tensor``, or any other for a pointer that is not read."""
    return unused if tensor is None else tensor


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
        visual=visual, visual_tokens=visual_tokens(image), width_in=a.shape[1], width_out=b.shape[0] // groups,
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
    call = (y, x, a, image, b, seed, tokens, visual, accumulate, save_t, options)
    t = _new_activation(*call)
    if x.shape[0] == 0:
        return t
    pointers = dict(p_y=y, p_x=x, p_a=a, p_image=_or(image, b), p_b=b, p_t=t, p_seed=_or(seed, x))
    groups, width = options.groups, a.shape[0]
    apart = groups > 1 and width > APART_ABOVE and options.routing in ELEMENTWISE
    width = b.shape[1] if apart else width

    def prepare(tile: Tile) -> Prepared:
        arguments = dict(
            **_call_arguments(seed, tokens, accumulate, options), **_dense_arguments(a, image, visual, b, groups),
            stride_ym=y.stride(0), save_t=save_t, apart=apart,
        )  # fmt: skip
        arguments["block_r"] = padded_rank(width)
        return prepare_forward(x, b.shape[0] // groups, tile, arguments, groups if apart else 1)

    key = "lora_forward", y.stride(0), x.stride(0), visual, accumulate, save_t
    traits = dict(dropout=seed is not None, apart=apart)
    launch_kernel(launch_lora_forward, width, key, options, pointers, prepare, rows=x, **traits)
    return t


def lora_forward_again(
    y: Tensor, x: Tensor, a: Tensor, u: Tensor, b: Tensor, save_t: bool, options: LoRAOptions
) -> Tensor | None:
    """:func:`lora_forward_` for contiguous x [B, T, K], y [B, T, N] with the frozen product in it, one visual token
    u [B, 1, R] and no dropout, if it only has to be launched again. Returns t, any tensor where it is not saved; None,
    and y as it was, where it cannot.
    """
    (entries, tokens, width_in), t = x.shape, y
    if save_t:
        t = x.new_empty(entries * tokens, a.shape[0])
    pointers = dict(p_y=y, p_x=x, p_a=a, p_image=u, p_b=b, p_t=t, p_seed=x)
    key = "lora_forward", y.stride(1), width_in, ONE_TOKEN, True, save_t
    fits = a.is_contiguous() and u.is_contiguous() and b.is_contiguous() and aligned(x, a, u, b)
    return None if not fits or launch_again(launch_lora_forward, key, options, pointers, x) is None else t


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
    call = (dx, dy, t, a, image, b, seed, tokens, visual, accumulate, need_u, need_z, options)
    dt, dz, du, z = _new_gradients(*call)
    if t.shape[0] == 0:
        return dt, dz, du.zero_(), z
    target, width = _or(dx, t), t.shape[1]
    pointers = dict(
        p_dx=target, p_dt=dt, p_dz=dz, p_du=du, p_z=z, p_dy=dy, p_t=t, p_a=a, p_image=_or(image, b), p_b=b,
        p_seed=_or(seed, t),
    )  # fmt: skip

    def prepare(tile: Tile) -> Prepared:
        arguments = dict(
            **_call_arguments(seed, tokens, accumulate, options),
            **_dense_arguments(a, image, visual, b, options.groups), stride_dxm=target.stride(0),
            write_dx=dx is not None, write_z=need_z, need_u=need_u,
        )  # fmt: skip
        return prepare_backward(dy, width, a.shape[1], tile, arguments)

    key = ("lora_backward", target.stride(0), dy.stride(0), visual, accumulate, dx is None, need_u, need_z,
           tf32_matters(dy))  # fmt: skip
    traits = dict(dropout=seed is not None, relu=options.relu)
    parts = launch_kernel(launch_lora_backward, width, key, options, pointers, prepare, rows=dy, **traits)
    return dt, dz, image_gradient(parts, du, t, image, options.relu), z


def lora_backward_again(
    dx: Tensor, dy: Tensor, t: Tensor, a: Tensor, u: Tensor, b: Tensor, need_u: bool, need_z: bool, options: LoRAOptions
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """:func:`lora_backward_` for what :func:`lora_forward_again` is for: dt, du and z, or None if it cannot."""
    saved = (t, a, u, b)  # which hooks may have changed
    if not (all_plain(saved) and all(map(Tensor.is_contiguous, saved)) and aligned(dy, *saved)):
        return None
    dt = torch.empty_like(t)
    du, z = torch.empty_like(u) if need_u else dt, torch.empty_like(t) if need_z else dt
    pointers = dict(p_dx=dx, p_dt=dt, p_dz=dt, p_du=du, p_z=z, p_dy=dy, p_t=t, p_a=a, p_image=u, p_b=b, p_seed=t)
    key = ("lora_backward", dx.stride(0), dy.stride(0), ONE_TOKEN, True, False, need_u, need_z,
           tf32_matters(dy))  # fmt: skip
    parts = launch_again(launch_lora_backward, key, options, pointers, dy)
    return None if parts is None else (dt, image_gradient(parts, du, t, u, options.relu), z)


@define_op(lambda dt, x, seed, options: dt.new_empty(dt.shape[1], x.shape[1]))
def dropped_gradient(dt: Tensor, x: Tensor, seed: Tensor, options: LoRAOptions) -> Tensor:
    """dA [G*R, K] = dtᵀ dropout(x) from dt [M, G*R], the mask drawn again."""
    (rows, width_in), width = x.shape, dt.shape[1]
    if rows == 0:
        return dt.new_zeros(width, width_in)

    def prepare(tile: Tile) -> Prepared:
        # A function of the number of rows alone, so that equal calls add in the same order.
        split_rows = max(SPLIT_ROWS, -(-rows // MAX_SPLITS))
        splits = -(-rows // split_rows)
        arguments = dict(
            **dropout_arguments(seed, options.dropout), rows=rows, split_rows=split_rows, width_in=width_in,
            width=width, stride_xm=x.stride(0), block_r=padded_rank(width), precision=product_precision(x),
        )  # fmt: skip
        return (-(-width_in // tile.block_k), splits), arguments, {"p_da": ((splits, width, width_in), torch.float32)}

    pointers = dict(p_dt=dt, p_x=x, p_seed=seed)
    key, kernel = ("dropped_gradient", x.stride(0), tf32_matters(x)), launch_dropped_gradient
    parts = launch_kernel(kernel, width, key, options, pointers, prepare, rows=x, tiles_of="lora_backward")
    return parts["p_da"].sum(0).to(dt.dtype)


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
    call = (y, x, p, o, seed, tokens, accumulate, options)
    (rows, width_in), width_out = x.shape, o.shape[1] // options.groups
    c = _new_inner_products(*call)
    if rows == 0:
        return c

    def prepare(tile: Tile) -> Prepared:
        arguments = dict(
            **_call_arguments(seed, tokens, accumulate, options), width_in=width_in, width_out=width_out,
            stride_ym=y.stride(0), stride_xm=x.stride(0),
        )  # fmt: skip
        splits = column_splits(tile, rows, width_out, processors(x.device))
        return (rows // tokens, -(-tokens // tile.block_m), splits), arguments, {}

    pointers = dict(p_y=y, p_x=x, p_p=p, p_o=o, p_c=c, p_seed=_or(seed, x))
    key = "rank_one_forward", y.stride(0), x.stride(0), accumulate
    launch_kernel(launch_rank_one_forward, 1, key, options, pointers, prepare, rows=x)
    return c


def rank_one_forward_again(y: Tensor, x: Tensor, p: Tensor, o: Tensor, options: LoRAOptions) -> Tensor | None:
    """:func:`rank_one_forward_` for contiguous x [B, T, K], y [B, T, N] with the frozen product in it and no dropout,
    if it only has to be launched again. Returns c; None, and y as it was, where it cannot.
    """
    entries, tokens, width_in = x.shape
    if not (p.is_contiguous() and o.is_contiguous() and aligned(x, p, o)):
        return None
    c = x.new_empty(entries * tokens, dtype=torch.float32)
    pointers = dict(p_y=y, p_x=x, p_p=p, p_o=o, p_c=c, p_seed=x)
    key = "rank_one_forward", y.stride(1), width_in, True
    return None if launch_again(launch_rank_one_forward, key, options, pointers, x) is None else c


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
    call = (dx, dy, x, p, o, c, seed, tokens, accumulate, need_p, need_o, options)
    (rows, width_in), images = x.shape, p.shape[0]
    if rows == 0:
        empty = _new_factor_gradients(*call)
        return empty[0].zero_(), empty[1].zero_()
    target = _or(dx, x)

    def prepare(tile: Tile) -> Prepared:
        arguments = dict(
            **_call_arguments(seed, tokens, accumulate, options), width_in=width_in,
            width_out=o.shape[1] // options.groups, stride_dxm=target.stride(0), stride_dym=dy.stride(0),
            stride_xm=x.stride(0), write_dx=dx is not None, write_dp=need_p, write_do=need_o,
        )  # fmt: skip
        blocks = -(-tokens // tile.block_m)
        each = () if blocks == 1 else (blocks,)
        parts = {
            "p_dp": ((images if need_p else 0, *each, width_in), torch.float32),
            "p_do": ((images if need_o else 0, *each, o.shape[1]), torch.float32),
        }
        return (images, blocks), arguments, parts

    kernel, pointers = launch_rank_one_backward, dict(p_dx=target, p_dy=dy, p_x=x, p_p=p, p_o=o, p_c=c)
    pointers["p_seed"] = _or(seed, x)
    traits = dict(few=images * -(-tokens // 32) <= 2 * processors(x.device), two_parts=16 < tokens <= 32)
    key = "rank_one_backward", target.stride(0), dy.stride(0), x.stride(0), accumulate, dx is None, need_p, need_o
    parts = launch_kernel(kernel, 1, key, options, pointers, prepare, rows=x, **traits)
    return sum_of_blocks(parts["p_dp"], p.dtype), sum_of_blocks(parts["p_do"], o.dtype)


def rank_one_backward_again(
    dx: Tensor, dy: Tensor, x: Tensor, p: Tensor, o: Tensor, c: Tensor, options: LoRAOptions
) -> tuple[Tensor, Tensor] | None:
    """:func:`rank_one_backward_` for what :func:`rank_one_forward_again` is for, dp and do needed, or None."""
    saved = (x, p, o, c)  # which hooks may have changed
    if not (all_plain(saved) and all(map(Tensor.is_contiguous, saved)) and aligned(dy, *saved)):
        return None
    pointers = dict(p_dx=dx, p_dy=dy, p_x=x, p_p=p, p_o=o, p_c=c, p_seed=x)
    key = "rank_one_backward", dx.stride(0), dy.stride(0), x.shape[2], True, False, True, True
    parts = launch_again(launch_rank_one_backward, key, options, pointers, dy)
    return None if parts is None else (sum_of_blocks(parts["p_dp"], p.dtype), sum_of_blocks(parts["p_do"], o.dtype))
