"""Triton backend of the routed Adapter: one autograd function around the ops of :mod:`.ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd_function import applied, backward_of, keeping
from ..image_code import ImageCode
from ..linear import column_sums
from ..routing import inner_product_image_gradient
from ..triton_common.launch import contiguous_rows
from ..triton_common.visual_tokens import Visual, image_operand
from . import ops
from .options import AdapterOptions, Weights


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class FusedAdapter(torch.autograd.Function):
    """y = [x +] act(route(x Aᵀ + b_down, u)) Bᵀ + b_up, with u [B, L, R] the image's, or None.

    With ``rank_one``: y = [x +] act((x_b . w_b + k_b) u_b) Bᵀ + b_up, and in place of A and b_down stand w [B, K] and
    k [B]. Saved: x, A, u, B and t [M, R] or (rank one) the inner products [M]; what z and h were is computed again in
    the backward kernel.
    """

    @staticmethod
    def forward(
        x: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        u: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        gram: Tensor | None,
        options: AdapterOptions,
        rank_one: bool,
        save_t: bool,
    ) -> tuple[Tensor, Tensor]:
        y = x.new_empty(x.shape)  # made here: an autograd function must not return a view
        visual, image = image_operand(u, x.shape[1], options.relu, gram)
        t = ops.adapter_forward_(
            y.view(-1, y.shape[2]), contiguous_rows(x), down.contiguous(), _contiguous(down_bias), image,
            up.contiguous(), _contiguous(up_bias), x.shape[1], visual, rank_one, save_t, options,
        )  # fmt: skip
        return y, t

    @staticmethod
    @keeping
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, down, _, u, up, _, _, ctx.options, ctx.rank_one, _ = inputs
        ctx.save_for_backward(x, down, u, up, output[1])

    @staticmethod
    @backward_of
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, down, u, up, t = ctx.saved_tensors
        need_x, need_down, need_down_bias, need_u, need_up, need_up_bias = ctx.needs_input_grad[:6]
        batch, tokens, _ = x.shape
        rows = dy.flatten(0, 1)
        visual, image = image_operand(u, tokens, ctx.options.relu)
        dx, dt, dz, du, h = ops.adapter_backward(
            rows, t, down.contiguous(), image, up.contiguous(), tokens, visual, ctx.rank_one, need_x, need_u, need_up,
            ctx.options,
        )  # fmt: skip
        if need_u and visual == Visual.GRAM:
            shape = batch, tokens, u.shape[2]
            du = inner_product_image_gradient(dz.view(shape), t.view(shape), u, ctx.options.relu)
        ddown = ddown_bias = None
        if ctx.rank_one:
            dc = dt.view(batch, tokens, 1)
            if need_down:
                ddown = torch.bmm(dc.to(x.dtype).mT, x).squeeze(1)
            if need_down_bias:
                ddown_bias = dc.sum((1, 2)).to(x.dtype)
        else:
            ddown = torch.mm(dt.t(), contiguous_rows(x)) if need_down else None
            ddown_bias = column_sums(dt) if need_down_bias else None
        dup = torch.mm(rows.t(), h) if need_up else None
        dup_bias = column_sums(rows) if need_up_bias else None
        return dx.view(x.shape) if need_x else None, ddown, ddown_bias, du if need_u else None, dup, dup_bias


def fused_adapter(x: Tensor, image: ImageCode | None, weights: Weights, options: AdapterOptions) -> Tensor:
    """The routed Adapter by kernels; tensors as in :func:`routingvl.kernels.routed_adapter`.

    For what :meth:`~routingvl.kernels.routing.Routing.kernel_obstacle` allows. ``image`` is None where the routing
    takes none.
    """
    u, factors, gram = (None, None, None) if image is None else image
    rank_one = factors is not None and not options.relu
    inputs = (x, *(factors if rank_one else weights[:2]), u, *weights[2:])
    save_t = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in inputs)
    return applied(FusedAdapter, *inputs, gram, options, rank_one, save_t)
