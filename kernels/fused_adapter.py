"""Triton backend of the routed Adapter: one autograd function around the ops of :mod:`.triton_adapter_ops`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import find_activation
from .arguments import without_autocast
from .image import ImageCode, gram_of
from .launch import contiguous_rows
from .products import column_sums
from .routing import Routing, find_routing, gram_is_cheaper, vllora_image_gradient
from .triton_adapter_ops import adapter_backward, adapter_forward_
from .triton_ops import FORMS

MAX_GRAM_RANK = 64  # a larger u' u would need more than half of the shared memory of some GPUs


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _operand(u: Tensor | None, form: str, relu: bool, gram: Tensor | None = None) -> Tensor | None:
    """What a kernel takes in place of the image's code u [B, L, R]: for "gram" u' u [B, R, R], if it is there already
    ``gram``.
    """
    if form != "gram":
        return _contiguous(u)
    return gram_of(u, relu) if gram is None else gram


def _codes(form: str, routing: str, activation: str) -> tuple[int, int, int]:
    return FORMS[form], find_routing(routing).code, find_activation(activation).code


class FusedAdapter(torch.autograd.Function):
    """y = [x +] act(route(x D' + d, u)) U' + c, with u [B, L, R] the image's code, or None.

    With ``rank_one``: y = [x +] act((x_b . w_b + k_b) u_b) U' + c, and in place of D and d stand w [B, K] and k [B].
    Saved: x, D, u, U and one code, t [B*T, R] or (rank one) the inner products [B*T]; what z and h were is computed
    again in the backward kernel.
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
        form: str,
        routing: str,
        activation: str,
        relu: bool,
        residual: bool,
        rank_one: bool,
        save_code: bool,
    ) -> tuple[Tensor, Tensor]:
        y = x.new_empty(x.shape)  # made here: an autograd function must not return a view
        down_bias, up_bias = _contiguous(down_bias), _contiguous(up_bias)
        code = adapter_forward_(
            y.view(-1, y.shape[2]), contiguous_rows(x), down.contiguous(), down_bias, _operand(u, form, relu, gram),
            up.contiguous(), up_bias, x.shape[1], *_codes(form, routing, activation),
            relu, residual, rank_one, save_code,
        )  # fmt: skip
        return y, code

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, down, _, u, up, _, _, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, down, u, up, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(dy.device.type):
            return FusedAdapter._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, down, u, up, code = ctx.saved_tensors
        form, routing, activation, relu, residual, rank_one, _ = ctx.options
        need_x, need_down, need_down_bias, need_u, need_up, need_up_bias = ctx.needs_input_grad[:6]
        batch, tokens, _ = x.shape
        rows = contiguous_rows(dy)
        dx, dcode, dz, du, h = adapter_backward(
            rows, code, down.contiguous(), _operand(u, form, relu), up.contiguous(), tokens,
            *_codes(form, routing, activation), relu, residual, rank_one, need_x, need_u, need_up,
        )  # fmt: skip
        if not need_u:
            du = None
        elif not len(rows):
            du = torch.zeros_like(u)
        elif form in ("tokens", "gram"):
            du = vllora_image_gradient(dz.view(batch, tokens, -1), code.view(batch, tokens, -1), u, relu)
        else:
            du = du.view_as(u)
        ddown = ddown_bias = None
        if rank_one:
            dc = dcode.view(batch, tokens, 1)
            if need_down:
                ddown = torch.bmm(dc.to(x.dtype).mT, x).squeeze(1)
            if need_down_bias:
                ddown_bias = dc.sum((1, 2)).to(x.dtype)
        else:
            ddown = torch.mm(dcode.t(), contiguous_rows(x)) if need_down else None
            ddown_bias = column_sums(dcode) if need_down_bias else None
        dup = torch.mm(rows.t(), h) if need_up else None
        dup_bias = column_sums(rows) if need_up_bias else None
        return dx.view(x.shape) if need_x else None, ddown, ddown_bias, du, dup, dup_bias, *(None,) * 8


def fused_adapter(
    x: Tensor,
    image: ImageCode | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    row: Routing,
    activation: str,
    residual: bool,
    relu: bool,
) -> Tensor:
    """The routed Adapter by kernels; arguments as in :func:`routingvl.kernels.routed_adapter`.

    ``image`` is None where the routing reads none.
    """
    u, factors, gram = (None, None, None) if image is None else image
    form = "none"
    if u is not None:
        form = "token" if u.shape[1] == 1 else "tokens"
        cheaper = gram is not None or gram_is_cheaper(x.shape[1], u.shape[1], u.shape[2])
        if form == "tokens" and u.shape[2] <= MAX_GRAM_RANK and cheaper:
            form = "gram"
    rank_one = factors is not None and not relu
    down, bias = factors if rank_one else (down_weight, down_bias)
    inputs = (x, down, bias, u, up_weight, up_bias)
    saves = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in inputs)
    options = (form, row.name, activation, relu, residual, rank_one, saves)
    return FusedAdapter.apply(*inputs, gram if form == "gram" else None, *options)[0]
