"""Triton backend of the routed LoRA: autograd functions around the ops of ``triton_ops``.

The frozen product stays torch's; one kernel then adds the bottleneck to it in place. In the backward pass one kernel
adds to dx and leaves the small gradients. Which function runs follows the eager backend: rank one where the routing is,
else dense. Both receive the image code through small tensors that autograd differentiates outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import with_signature, without_autocast
from ..dispatch import contiguous_rows
from ..frozen_projection import adds, frozen_gradients, start_from
from ..image_code import ImageCode, gram_of
from ..routing import Routing, find_routing, gram_is_cheaper, vllora_image_gradient
from . import ops

# A wider u' u would need more than half of the shared memory of some GPUs.
MAX_GRAM_WIDTH = 64


def _image_operand(u: Tensor | None, tokens: int, relu: bool, gram: Tensor | None = None) -> tuple[int, Tensor | None]:
    """The form in which the image's code u [B, L, C] goes into the dense kernels, and the operand; see ``triton_lora``.

    A matrix u' u saves work when there is much text, or where ``gram`` has it already.
    """
    if u is None:
        return ops.FORMS["none"], None
    if u.shape[1] == 1:
        return ops.FORMS["token"], u.contiguous()
    known = gram is not None
    if u.shape[2] <= MAX_GRAM_WIDTH and (known or gram_is_cheaper(tokens, u.shape[1], u.shape[2])):
        return ops.FORMS["gram"], gram if known else gram_of(u, relu)
    return ops.FORMS["tokens"], u.contiguous()


class FusedDenseLoRA(torch.autograd.Function):
    """y = start + scaling route(t, u) b' for every routing function, with t = dropout(x) a'.

    start as for :func:`~routingvl.kernels.frozen_projection.start_from`; ``seed`` [1] draws the dropout, None for none.
    Saved: x, u and weights, and t (R / K of x), because computing it again would read x once more; nothing of the mask.
    """

    @staticmethod
    @with_signature
    def forward(
        x: Tensor,
        u: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        gram: Tensor | None,
        layout: str,
        routing: str,
        relu: bool,
        scaling: float,
        columns: tuple[int, ...],
        dropout: float,
        save_t: bool,
    ) -> tuple[Tensor, Tensor]:
        y = start_from(x, weight, bias, base, layout, b.shape[0])
        visual, image = _image_operand(u, x.shape[1], relu, gram)
        t = ops.lora_forward_(
            y.view(-1, y.shape[2]), contiguous_rows(x), a.contiguous(), image, b.contiguous(), seed, x.shape[1], visual,
            find_routing(routing).code, relu, columns, scaling, dropout, adds(weight, base), save_t,
        )  # fmt: skip
        return y, t

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for the output that only exists to be saved
        x, u, a, b, weight, _, _, seed, _, *ctx.options, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, u, a, b, weight, seed, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(dy.device.type):
            return *FusedDenseLoRA._gradients(ctx, dy.contiguous()), *(None,) * 9

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, a, b, weight, seed, t = ctx.saved_tensors
        layout, routing, relu, scaling, columns, dropout = ctx.options
        need_x, need_u, need_a, need_b, *frozen = ctx.needs_input_grad[:7]
        row, rows, code_shape = find_routing(routing), dy.flatten(0, 1), (*x.shape[:2], a.shape[0])
        dx, dweight, dbias, dbase = frozen_gradients(dy, x, weight, layout, (need_x, *frozen))
        db = _up_gradient(rows, row.route(t.view(code_shape), u, relu), b, columns, scaling) if need_b else None
        if not (need_x or need_u or need_a):
            return None, None, None, db, dweight, dbias, dbase
        accumulate = dx is not None
        if need_x and dx is None:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        visual, image = _image_operand(u, x.shape[1], relu)
        dt, dz, du = ops.lora_backward_(
            None if dx is None else dx.view(-1, dx.shape[2]), rows, t, a.contiguous(), image, b.contiguous(), seed,
            x.shape[1], visual, row.code, relu, columns, scaling, dropout, accumulate, need_u,
        )  # fmt: skip
        if need_u:
            if u.shape[1] == 1:
                du = du.view_as(u)
            else:
                du = vllora_image_gradient(dz.view(code_shape), t.view(code_shape), u, relu)
        da = None
        if need_a:
            low = contiguous_rows(x)
            da = torch.mm(dt.t(), low) if seed is None else ops.dropped_gradient(dt, low, seed, dropout)
        return dx, du if need_u else None, da, db, dweight, dbias, dbase


def _up_gradient(dy: Tensor, z: Tensor, b: Tensor, columns: Sequence[int], scaling: float) -> Tensor:
    """db [G*n, R] from dy [M, N] and the routed code z [B, T, G*R]."""
    db = torch.empty_like(b, memory_format=torch.contiguous_format)
    codes = z.flatten(0, 1).chunk(len(columns), 1)
    for part, code, column in zip(db.chunk(len(columns)), codes, columns, strict=True):
        part.addmm_(dy[:, column : column + part.shape[0]].t(), code, beta=0, alpha=scaling)
    return db


class FusedRankOneLoRA(torch.autograd.Function):
    """y_b = start_b + c_b o_b for each image b, with c = dropout(x_b) . p_b; p [B, K], o [B, G*n] (scaling included).

    Saved: x, p, o and c [M] in float32.
    """

    @staticmethod
    @with_signature
    def forward(
        x: Tensor,
        p: Tensor,
        o: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        layout: str,
        columns: tuple[int, ...],
        dropout: float,
    ) -> tuple[Tensor, Tensor]:
        y = start_from(x, weight, bias, base, layout, o.shape[1])
        rows = y.view(-1, y.shape[2])
        low, accumulate = contiguous_rows(x), adds(weight, base)
        c = ops.rank_one_forward_(
            rows, low, p.contiguous(), o.contiguous(), seed, x.shape[1], columns, dropout, accumulate
        )
        return y, c

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        x, p, o, weight, _, _, seed, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, p, o, weight, seed, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(dy.device.type):
            return *FusedRankOneLoRA._gradients(ctx, dy.contiguous()), *(None,) * 4

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, p, o, weight, seed, c = ctx.saved_tensors
        layout, columns, dropout = ctx.options
        need_x, need_p, need_o, *frozen = ctx.needs_input_grad[:6]
        dx, dweight, dbias, dbase = frozen_gradients(dy, x, weight, layout, (need_x, *frozen))
        if not (need_x or need_p or need_o):
            return None, None, None, dweight, dbias, dbase
        accumulate = dx is not None
        if need_x and dx is None:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dp, do = ops.rank_one_backward_(
            None if dx is None else dx.view(-1, dx.shape[2]), dy.flatten(0, 1), contiguous_rows(x), p.contiguous(),
            o.contiguous(), c, seed, x.shape[1], columns, dropout, accumulate, need_p, need_o,
        )  # fmt: skip
        return dx, dp if need_p else None, do if need_o else None, dweight, dbias, dbase


def fused_lora(
    x: Tensor,
    image: ImageCode | None,
    a: Tensor,
    b: Tensor,
    *,
    row: Routing,
    scaling: float,
    relu: bool,
    columns: Sequence[int],
    dropout: float = 0.0,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    layout: str = "nk",
) -> Tensor:
    """The routed LoRA in one kernel each way; arguments as in :func:`routingvl.kernels.routed_lora_linear`.

    For what has a closed form (:func:`~routingvl.kernels.image_code.has_closed_form`) and equally spaced columns.
    ``image`` is None where the routing reads none.

    The text's mask is drawn in the kernel from a seed of torch's generator, so recomputing under a restored generator
    repeats it.
    """
    seed = torch.randint(2**62, (1,), device=x.device) if dropout > 0 else None
    frozen = (weight, bias, base, seed)
    if image is not None and image.factors is not None and not relu:
        return FusedRankOneLoRA.apply(x, *image.factors, *frozen, layout, tuple(columns), dropout)[0]
    u, gram = (None, None) if image is None else (image.u, image.gram)
    save_t = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, u, a, b))
    options = (layout, row.name, relu, scaling, tuple(columns), dropout, save_t)
    return FusedDenseLoRA.apply(x, u, a, b, *frozen, gram, *options)[0]
