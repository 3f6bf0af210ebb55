"""The registered ops of the routed Adapter's Triton backend: each checks nothing, allocates results, launches a kernel.

Tensors are matrices of rows, x [M, K], with the last dimension contiguous; every weight and the image are contiguous.
``tokens`` is T, rows an image; ``visual`` the form of the image as in ``triton_lora``; with ``rank_one`` the down
weight is the probe w [B, K], its bias the offset k [B] and the saved code c [M] in float32, else t [M, R].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .compiled import CachedKernel
from .launch import define_op, launch, on_device
from .tiles import Tile, column_splits, padded_rank
from .triton_adapter import adapter_backward_kernel, adapter_forward_kernel
from .triton_ops import BLOCK_L, FORMS, added, blocks_of, fitting_tiles, image_tile, processors, product_precision

ONE_IMAGE_FORMS = (FORMS["tokens"], FORMS["gram"])

launch_adapter_forward = CachedKernel(adapter_forward_kernel)
launch_adapter_backward = CachedKernel(adapter_backward_kernel)


def _new_code(rows: Tensor, count: int, rank: int, rank_one: bool) -> Tensor:
    """Memory for what the forward pass saves and for its gradient."""
    return rows.new_empty(count, dtype=torch.float32) if rank_one else rows.new_empty(count, rank)


def _adapter_forward(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    image: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    tokens: int,
    visual: int,
    routing: int,
    activation: int,
    relu: bool,
    residual: bool,
    rank_one: bool,
    save_code: bool,
) -> Tensor:
    (rows, width), rank = x.shape, up.shape[1]
    code = _new_code(x, rows if save_code else 0, rank, rank_one)
    if rows == 0:
        return code
    one_image = visual in ONE_IMAGE_FORMS
    span = tokens if one_image else rows

    def attempt(tile: Tile) -> None:
        tile = image_tile(tile, tokens, one_image)
        splits = column_splits(tile, rows, width, processors(x.device))
        launch_adapter_forward(
            (blocks_of(rows, span, tile.block_m), splits),
            y, code, x, down, x if down_bias is None else down_bias, x if image is None else image, up,
            x if up_bias is None else up_bias,
            rows, span, tokens, 1 if image is None else image.shape[1], width, rank, x.stride(0),
            ROUTING=routing, RELU=relu, VISUAL=visual, ACT=activation, RANK_ONE=rank_one, RESIDUAL=residual,
            DOWN_BIAS=down_bias is not None, UP_BIAS=up_bias is not None, SAVE_CODE=save_code,
            PRECISION=product_precision(x), CODE=padded_rank(rank),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_L=BLOCK_L,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    with on_device(x):
        launch("adapter_forward", fitting_tiles("adapter_forward", rank, x), attempt)
    return code


def _adapter_backward(
    dy: Tensor,
    code: Tensor,
    down: Tensor,
    image: Tensor | None,
    up: Tensor,
    tokens: int,
    visual: int,
    routing: int,
    activation: int,
    relu: bool,
    residual: bool,
    rank_one: bool,
    need_x: bool,
    need_u: bool,
    need_h: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, width), rank = dy.shape, up.shape[1]
    one_image = visual in ONE_IMAGE_FORMS
    write_du, write_dz = need_u and visual == FORMS["token"], need_u and one_image
    dx = dy.new_empty(rows if need_x else 0, width)
    dcode = _new_code(dy, rows, rank, rank_one)
    dz = dy.new_empty(rows if write_dz else 0, rank)
    h = dy.new_empty(rows if need_h else 0, rank)
    if rows == 0:
        return dx, dcode, dz, dy.new_empty(0, rank), h
    images = rows // tokens

    def attempt(tile: Tile) -> Tensor:
        tile = image_tile(tile, tokens, one_image)
        span = tokens if one_image else max(1, tile.block_m // tokens) * tokens
        partial = dy.new_empty(images if write_du else 0, -(-span // tile.block_m), rank, dtype=torch.float32)
        launch_adapter_backward(
            (blocks_of(rows, span, tile.block_m),),
            dx, dcode, dz, partial, h, dy, code, down, dy if image is None else image, up,
            rows, span, tokens, 1 if image is None else image.shape[1], images, width, rank, dy.stride(0),
            ROUTING=routing, RELU=relu, VISUAL=visual, ACT=activation, RANK_ONE=rank_one, RESIDUAL=residual,
            WRITE_DX=need_x, WRITE_DU=write_du, WRITE_DZ=write_dz, WRITE_H=need_h,
            PRECISION=product_precision(dy), CODE=padded_rank(rank),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_L=BLOCK_L,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return partial

    with on_device(dy):
        partial = launch("adapter_backward", fitting_tiles("adapter_backward", rank, dy, relu=relu), attempt)
    return dx, dcode, dz, added(partial, dy.dtype), h


def _fake_adapter_forward(y, x, down, down_bias, image, up, up_bias, tokens, *options):
    *_, rank_one, save_code = options
    return _new_code(x, x.shape[0] if save_code else 0, up.shape[1], rank_one)


def _fake_adapter_backward(dy, code, down, image, up, tokens, visual, *options):
    *_, rank_one, need_x, need_u, need_h = options
    (rows, width), rank = dy.shape, up.shape[1]
    return (
        dy.new_empty(rows if need_x else 0, width),
        _new_code(dy, rows, rank, rank_one),
        dy.new_empty(rows if need_u and visual in ONE_IMAGE_FORMS else 0, rank),
        dy.new_empty(rows // tokens if need_u and visual == FORMS["token"] else 0, rank),
        dy.new_empty(rows if need_h else 0, rank),
    )


adapter_forward_ = define_op(
    "adapter_forward_(Tensor(a!) y, Tensor x, Tensor down, Tensor? down_bias, Tensor? image, Tensor up,"
    " Tensor? up_bias, SymInt tokens, int visual, int routing, int activation, bool relu, bool residual, bool rank_one,"
    " bool save_code) -> Tensor",
    _adapter_forward,
    _fake_adapter_forward,
)
adapter_backward = define_op(
    "adapter_backward(Tensor dy, Tensor code, Tensor down, Tensor? image, Tensor up, SymInt tokens, int visual,"
    " int routing, int activation, bool relu, bool residual, bool rank_one, bool need_x, bool need_u, bool need_h)"
    " -> (Tensor dx, Tensor dcode, Tensor dz, Tensor du, Tensor h)",
    _adapter_backward,
    _fake_adapter_backward,
)
