"""The registered ops of the routed LoRA's Triton backend: each checks nothing, allocates results and launches a kernel.

Tensors are matrices of rows: x [M, K], y [M, N], with the last dimension contiguous. ``columns`` are the start columns
of the groups in y, equally spaced. ``tokens`` is T, rows an image. ``seed`` [1] int64 draws the dropout mask, None for
none. ``visual`` is the form of the image, see ``triton_lora``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from .compiled import CachedKernel
from .launch import define_op, launch, on_device
from .tiles import (
    DECODE_ROWS,
    Tile,
    arch_of,
    column_splits,
    padded_rank,
    precision_of,
    tiles_for_call,
)
from .triton_lora import (
    GRAM,
    NO_IMAGE,
    ONE_TOKEN,
    TOKENS,
    dropped_gradient_kernel,
    lora_backward_kernel,
    lora_forward_kernel,
)
from .triton_rank_one import rank_one_backward_kernel, rank_one_forward_kernel

FORMS = {"none": NO_IMAGE.value, "token": ONE_TOKEN.value, "tokens": TOKENS.value, "gram": GRAM.value}
BLOCK_L = 32
FEW_ROWS = 64  # for each processor: with less some have nothing to do, whatever the tile
SHARE_ROWS = 512  # least rows for which another share of dropped_gradient pays
MAX_SHARES = 32

launch_lora_forward = CachedKernel(lora_forward_kernel)
launch_lora_backward = CachedKernel(lora_backward_kernel)
launch_dropped_gradient = CachedKernel(dropped_gradient_kernel)
launch_rank_one_forward = CachedKernel(rank_one_forward_kernel)
launch_rank_one_backward = CachedKernel(rank_one_backward_kernel)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 where programs run one after another."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 64


def fitting_tiles(kind: str, width: int, x: Tensor, **call: bool) -> tuple[Tile, ...]:
    """Tiles for a kernel on x [M, K] with a code of this width, best first; ``call`` as for ``tiles_for_call``."""
    arch = arch_of(x.device)
    few = x.shape[0] < FEW_ROWS * processors(x.device)
    options = {"few": few, **call}
    return tiles_for_call(kind, width, precision_of(x.dtype, arch), x.shape[0] <= DECODE_ROWS, arch, **options)


def product_precision(x: Tensor) -> str:
    """How tl.dot multiplies float32."""
    precision = precision_of(x.dtype, arch_of(x.device))
    return "tf32" if precision == "half" else precision


def blocks_of(rows: int, span: int, block_m: int) -> int:
    """Programs that own ``rows`` when none crosses a multiple of ``span`` rows."""
    return -(-rows // span) * -(-span // block_m)


def image_tile(tile: Tile, tokens: int, one_image: bool) -> Tile:
    """A tile without more rows than an image has, if a program takes rows of one image only."""
    return replace(tile, block_m=min(tile.block_m, max(16, 1 << (tokens - 1).bit_length()))) if one_image else tile


def _spacing(columns: Sequence[int]) -> tuple[int, int]:
    return columns[0], columns[1] - columns[0] if len(columns) > 1 else 0


def _dropout(seed: Tensor | None, dropout: float) -> tuple[int, float]:
    """Threshold of a 31-bit integer and factor of what is kept."""
    return (0, 1.0) if seed is None else (round(dropout * 2**31), 1 / (1 - dropout) if dropout < 1 else 0.0)


def added(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """What the programs of each image wrote apart [B, parts, ...], added up."""
    return (parts.squeeze(1) if parts.shape[1] == 1 else parts.sum(1)).to(dtype)


def _lora_forward(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    image: Tensor | None,
    b: Tensor,
    seed: Tensor | None,
    tokens: int,
    visual: int,
    routing: int,
    relu: bool,
    columns: Sequence[int],
    scaling: float,
    dropout: float,
    accumulate: bool,
    save_t: bool,
) -> Tensor:
    rows, width_in = x.shape
    width, rank, groups = a.shape[0], b.shape[1], len(columns)
    t = x.new_empty(rows if save_t else 0, width)
    if rows == 0:
        return t
    one_image = visual in (FORMS["tokens"], FORMS["gram"])
    span = tokens if one_image else rows

    def attempt(tile: Tile) -> None:
        tile = image_tile(tile, tokens, one_image)
        splits = column_splits(tile, rows, b.shape[0] // groups, processors(x.device))
        launch_lora_forward(
            (blocks_of(rows, span, tile.block_m), splits),
            y, x, a, x if image is None else image, b, t, x if seed is None else seed,
            rows, span, tokens, 1 if image is None else image.shape[1], width_in, b.shape[0] // groups, rank,
            y.stride(0), x.stride(0), *_spacing(columns), scaling, *_dropout(seed, dropout),
            ROUTING=routing, RELU=relu, VISUAL=visual, GROUPS=groups, CODE=padded_rank(width),
            ACCUMULATE=accumulate, SAVE_T=save_t, DROPOUT=seed is not None, PRECISION=product_precision(x),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_L=BLOCK_L,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    with on_device(x):
        launch("lora_forward", fitting_tiles("lora_forward", width, x, dropout=seed is not None), attempt)
    return t


def _lora_backward(
    dx: Tensor | None,
    dy: Tensor,
    t: Tensor,
    a: Tensor,
    image: Tensor | None,
    b: Tensor,
    seed: Tensor | None,
    tokens: int,
    visual: int,
    routing: int,
    relu: bool,
    columns: Sequence[int],
    scaling: float,
    dropout: float,
    accumulate: bool,
    need_u: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = dy.shape[0]
    width, rank, groups = a.shape[0], b.shape[1], len(columns)
    one_image = visual in (FORMS["tokens"], FORMS["gram"])
    write_du, write_dz = need_u and visual == FORMS["token"], need_u and one_image
    images = 0 if image is None else image.shape[0]
    dt = torch.empty_like(t)
    dz = torch.empty_like(t) if write_dz else t.new_empty(0, width)
    if rows == 0:
        return dt, dz, t.new_zeros(images if write_du else 0, width)

    def attempt(tile: Tile) -> Tensor:
        tile = image_tile(tile, tokens, one_image)
        span = tokens if one_image else max(1, tile.block_m // tokens) * tokens
        partial = dy.new_empty(images if write_du else 0, -(-span // tile.block_m), width, dtype=torch.float32)
        target = t if dx is None else dx
        launch_lora_backward(
            (blocks_of(rows, span, tile.block_m),),
            target, dt, dz, partial, dy, t, a, t if image is None else image, b, t if seed is None else seed,
            rows, span, tokens, 1 if image is None else image.shape[1], images, a.shape[1], b.shape[0] // groups, rank,
            target.stride(0), dy.stride(0), *_spacing(columns), scaling, *_dropout(seed, dropout),
            ROUTING=routing, RELU=relu, VISUAL=visual, GROUPS=groups, CODE=padded_rank(width), ACCUMULATE=accumulate,
            WRITE_DX=dx is not None, WRITE_DU=write_du, WRITE_DZ=write_dz, DROPOUT=seed is not None,
            PRECISION=product_precision(dy),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_L=BLOCK_L,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return partial

    with on_device(dy):
        tiles = fitting_tiles("lora_backward", width, dy, dropout=seed is not None, relu=relu)
        partial = launch("lora_backward", tiles, attempt)
    return dt, dz, added(partial, t.dtype)


def _dropped_gradient(dt: Tensor, x: Tensor, seed: Tensor, dropout: float) -> Tensor:
    rows, width_in = x.shape
    width = dt.shape[1]
    if rows == 0:
        return dt.new_zeros(width, width_in)

    def attempt(tile: Tile) -> Tensor:
        # A function of the number of rows alone, so that equal calls add in the same order.
        split_rows = max(SHARE_ROWS, -(-rows // MAX_SHARES))
        shares = -(-rows // split_rows)
        partial = x.new_empty(shares, width, width_in, dtype=torch.float32)
        launch_dropped_gradient(
            (-(-width_in // tile.block_k), shares),
            partial, dt, x, seed, rows, split_rows, width_in, width, x.stride(0), *_dropout(seed, dropout),
            CODE=padded_rank(width), PRECISION=product_precision(x), BLOCK_M=tile.block_m, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return partial

    with on_device(x):
        partial = launch("dropped_gradient", fitting_tiles("lora_backward", width, x), attempt)
    return partial.sum(0).to(dt.dtype)


def _rank_one_forward(
    y: Tensor,
    x: Tensor,
    p: Tensor,
    o: Tensor,
    seed: Tensor | None,
    tokens: int,
    columns: Sequence[int],
    dropout: float,
    accumulate: bool,
) -> Tensor:
    rows, width_in = x.shape
    groups = len(columns)
    c = x.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return c

    def attempt(tile: Tile) -> None:
        splits = column_splits(tile, rows, o.shape[1] // groups, processors(x.device))
        launch_rank_one_forward(
            (rows // tokens, -(-tokens // tile.block_m), splits),
            y, x, p, o, c, x if seed is None else seed,
            tokens, width_in, o.shape[1] // groups, y.stride(0), x.stride(0), *_spacing(columns),
            *_dropout(seed, dropout),
            GROUPS=groups, ACCUMULATE=accumulate, DROPOUT=seed is not None,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    with on_device(x):
        launch("rank_one_forward", fitting_tiles("rank_one_forward", 1, x), attempt)
    return c


def _rank_one_backward(
    dx: Tensor | None,
    dy: Tensor,
    x: Tensor,
    p: Tensor,
    o: Tensor,
    c: Tensor,
    seed: Tensor | None,
    tokens: int,
    columns: Sequence[int],
    dropout: float,
    accumulate: bool,
    need_p: bool,
    need_o: bool,
) -> tuple[Tensor, Tensor]:
    rows, width_in = x.shape
    images, groups = p.shape[0], len(columns)
    if rows == 0:
        return torch.zeros_like(p[: images if need_p else 0]), torch.zeros_like(o[: images if need_o else 0])

    def attempt(tile: Tile) -> tuple[Tensor, Tensor]:
        blocks = -(-tokens // tile.block_m)
        dp = x.new_empty(images if need_p else 0, blocks, width_in, dtype=torch.float32)
        do = x.new_empty(images if need_o else 0, blocks, o.shape[1], dtype=torch.float32)
        target = x if dx is None else dx
        launch_rank_one_backward(
            (images, blocks),
            target, dp, do, dy, x, p, o, c, x if seed is None else seed,
            tokens, width_in, o.shape[1] // groups, target.stride(0), dy.stride(0), x.stride(0), *_spacing(columns),
            *_dropout(seed, dropout),
            GROUPS=groups, ACCUMULATE=accumulate, WRITE_DX=dx is not None, WRITE_DP=need_p, WRITE_DO=need_o,
            DROPOUT=seed is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        return dp, do

    with on_device(x):
        few, two_parts = images * -(-tokens // 32) <= 2 * processors(x.device), 16 < tokens <= 32
        tiles = fitting_tiles("rank_one_backward", 1, x, few=few, two_parts=two_parts)
        dp, do = launch("rank_one_backward", tiles, attempt)
    return added(dp, p.dtype), added(do, o.dtype)


def _fake_lora_forward(y, x, a, image, b, seed, tokens, visual, routing, relu, columns, scaling, dropout, add, save_t):
    return x.new_empty(x.shape[0] if save_t else 0, a.shape[0])


def _fake_lora_backward(dx, dy, t, a, image, b, seed, tokens, visual, *options):
    width, need_u = a.shape[0], options[-1]
    one_image = visual in (FORMS["tokens"], FORMS["gram"])
    dz = torch.empty_like(t) if need_u and one_image else t.new_empty(0, width)
    images = image.shape[0] if need_u and visual == FORMS["token"] else 0
    return torch.empty_like(t), dz, t.new_empty(images, width)


def _fake_rank_one_backward(dx, dy, x, p, o, c, seed, tokens, columns, dropout, accumulate, need_p, need_o):
    images = p.shape[0]
    return p.new_empty(images if need_p else 0, p.shape[1]), o.new_empty(images if need_o else 0, o.shape[1])


lora_forward_ = define_op(
    "lora_forward_(Tensor(a!) y, Tensor x, Tensor a, Tensor? image, Tensor b, Tensor? seed, SymInt tokens, int visual,"
    " int routing, bool relu, int[] columns, float scaling, float dropout, bool accumulate, bool save_t) -> Tensor",
    _lora_forward,
    _fake_lora_forward,
)
lora_backward_ = define_op(
    "lora_backward_(Tensor(a!)? dx, Tensor dy, Tensor t, Tensor a, Tensor? image, Tensor b, Tensor? seed,"
    " SymInt tokens, int visual, int routing, bool relu, int[] columns, float scaling, float dropout, bool accumulate,"
    " bool need_u) -> (Tensor dt, Tensor dz, Tensor du)",
    _lora_backward,
    _fake_lora_backward,
)
dropped_gradient = define_op(
    "dropped_gradient(Tensor dt, Tensor x, Tensor seed, float dropout) -> Tensor",
    _dropped_gradient,
    lambda dt, x, seed, dropout: dt.new_empty(dt.shape[1], x.shape[1]),
)
rank_one_forward_ = define_op(
    "rank_one_forward_(Tensor(a!) y, Tensor x, Tensor p, Tensor o, Tensor? seed, SymInt tokens, int[] columns,"
    " float dropout, bool accumulate) -> Tensor",
    _rank_one_forward,
    lambda y, x, p, o, seed, tokens, columns, dropout, accumulate: x.new_empty(x.shape[0], dtype=torch.float32),
)
rank_one_backward_ = define_op(
    "rank_one_backward_(Tensor(a!)? dx, Tensor dy, Tensor x, Tensor p, Tensor o, Tensor c, Tensor? seed,"
    " SymInt tokens, int[] columns, float dropout, bool accumulate, bool need_p, bool need_o)"
    " -> (Tensor dp, Tensor do)",
    _rank_one_backward,
    _fake_rank_one_backward,
)
