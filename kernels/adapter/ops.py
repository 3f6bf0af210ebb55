"""The registered ops of the routed Adapter's Triton backend: each checks nothing, allocates results, launches a kernel.

Tensors are matrices of rows, x [M, K], with the last dimension contiguous; every weight and the image are contiguous.
``tokens`` is T, rows per image; ``visual`` and ``image``: see
:func:`~routingvl.kernels.triton_common.visual_tokens.image_operand`. With ``rank_one`` the down weight is w [B, K], its
bias k [B] and t the inner products c [M] in float32, see :class:`~routingvl.kernels.image_code.ImageCode`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..triton_common.cached_launcher import CachedKernel
from ..triton_common.launch import (
    Prepared,
    define_op,
    image_gradient,
    launch_kernel,
    prepare_backward,
    prepare_forward,
    product_precision,
    tf32_matters,
)
from ..triton_common.tiles import Tile, padded_rank
from ..triton_common.visual_tokens import new_image_gradients, visual_tokens
from .options import AdapterOptions
from .triton import adapter_backward_kernel, adapter_forward_kernel

launch_adapter_forward = CachedKernel(adapter_forward_kernel)
launch_adapter_backward = CachedKernel(adapter_backward_kernel)
GELU_NEW = ACTIVATIONS["gelu_new"].code


def _new_t(rows: Tensor, count: int, rank: int, rank_one: bool) -> Tensor:
    """Memory for what the forward pass saves, and for its gradient."""
    return rows.new_empty(count, dtype=torch.float32) if rank_one else rows.new_empty(count, rank)


def _call_arguments(
    image: Tensor | None, up: Tensor, tokens: int, visual: int, rank_one: bool, options: AdapterOptions
) -> dict[str, Any]:
    """What both kernels take, by the names of their parameters in lower case."""
    width, rank = up.shape
    return dict(
        **options._asdict(), visual=visual, visual_tokens=visual_tokens(image), tokens=tokens, width=width, rank=rank,
        rank_one=rank_one, block_r=padded_rank(rank), precision=product_precision(up),
    )  # fmt: skip


def _new_activation(y, x, down, down_bias, image, up, up_bias, tokens, visual, rank_one, save_t, options):
    return _new_t(x, x.shape[0] if save_t else 0, up.shape[1], rank_one)


@define_op(_new_activation, mutates=["y"])
def adapter_forward_(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    image: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    tokens: int,
    visual: int,
    rank_one: bool,
    save_t: bool,
    options: AdapterOptions,
) -> Tensor:
    """Writes y [M, K]; returns t [M, R], or c [M] where ``rank_one``, empty unless ``save_t``."""
    call = (y, x, down, down_bias, image, up, up_bias, tokens, visual, rank_one, save_t, options)
    t = _new_activation(*call)
    if x.shape[0] == 0:
        return t
    pointers = dict(
        p_y=y, p_x=x, p_down=down, p_down_bias=x if down_bias is None else down_bias,
        p_image=up if image is None else image, p_up=up, p_up_bias=x if up_bias is None else up_bias, p_t=t,
    )  # fmt: skip

    def prepare(tile: Tile) -> Prepared:
        arguments = dict(
            **_call_arguments(image, up, tokens, visual, rank_one, options), down_bias=down_bias is not None,
            up_bias=up_bias is not None, save_t=save_t,
        )  # fmt: skip
        return prepare_forward(x, x.shape[1], tile, arguments)

    key = "adapter_forward", x.stride(0), visual, rank_one, save_t
    launch_kernel(launch_adapter_forward, up.shape[1], key, options, pointers, prepare, rows=x)
    return t


def _new_gradients(dy, t, down, image, up, tokens, visual, rank_one, need_x, need_u, need_h, options):
    (rows, width), rank = dy.shape, up.shape[1]
    return (
        dy.new_empty(rows if need_x else 0, width),
        _new_t(dy, rows, rank, rank_one),
        *new_image_gradients(dy, image, visual, rank, need_u),
        dy.new_empty(rows if need_h else 0, rank),
    )


@define_op(_new_gradients)
def adapter_backward(
    dy: Tensor,
    t: Tensor,
    down: Tensor,
    image: Tensor | None,
    up: Tensor,
    tokens: int,
    visual: int,
    rank_one: bool,
    need_x: bool,
    need_u: bool,
    need_h: bool,
    options: AdapterOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx [M, K], the gradient of t, for GRAM dz [M, R] and else du [B, L, R], and h [M, R]; empty where not needed."""
    call = (dy, t, down, image, up, tokens, visual, rank_one, need_x, need_u, need_h, options)
    dx, dt, dz, du, h = _new_gradients(*call)
    if dy.shape[0] == 0:
        return dx, dt, dz, du.zero_(), h
    pointers = dict(
        p_dx=dx, p_dt=dt, p_dz=dz, p_du=du, p_h=h, p_dy=dy, p_t=t, p_down=down,
        p_image=up if image is None else image, p_up=up,
    )  # fmt: skip

    def prepare(tile: Tile) -> Prepared:
        arguments = dict(
            **_call_arguments(image, up, tokens, visual, rank_one, options), write_dx=need_x, write_h=need_h,
            need_u=need_u,
        )  # fmt: skip
        return prepare_backward(dy, up.shape[1], up.shape[0], tile, arguments)

    key = "adapter_backward", dy.stride(0), visual, rank_one, need_x, need_u, need_h, tf32_matters(dy)
    kernel, relu = launch_adapter_backward, options.relu or options.act == GELU_NEW  # which takes registers too
    parts = launch_kernel(kernel, up.shape[1], key, options, pointers, prepare, rows=dy, relu=relu)
    return dx, dt, dz, image_gradient(parts, du, t, image, options.relu), h
