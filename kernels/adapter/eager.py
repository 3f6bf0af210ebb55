"""Eager backend of the routed Adapter: torch operations ordered so that nothing is computed or stored twice.

:class:`DenseAdapter` serves any routing function. :class:`RankOneAdapter` serves what is rank one in each image, where
the down-projection of the text collapses to one inner product per row: z_b = (x_b . w_b + k_b) u_b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd_function import applied, backward_of, keeping
from ..image_code import ImageCode
from ..linear import add_product_, column_sums, fresh_linear, inner_products, linear, plus_product, product
from ..routing import route_by_gram
from .options import AdapterOptions, Weights


def _up(h: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: bool) -> Tensor:
    """[x +] h weightᵀ + bias with h [B, T, R], weight [K, R]; the residual costs no pass of its own."""
    if not residual:
        return fresh_linear(h, weight, bias)
    # Not (x + bias).contiguous(): where that returns its operand, torch.compile of torch 2.11 loses all gradients.
    y = x.clone(memory_format=torch.contiguous_format) if bias is None else x.contiguous() + bias
    add_product_(y.view(-1, y.shape[-1]), h.flatten(0, 1), weight.t())
    return y


def _up_gradients(
    dy: Tensor, h: Tensor, weight: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dh [B, T, R], and the gradients of the up-projection's weight and bias where needed."""
    rows = dy.flatten(0, 1)
    dh = product(rows, weight).view_as(h)
    dweight = product(rows.t(), h.flatten(0, 1)) if needs[0] else None
    return dh, dweight, dy.sum((0, 1)) if needs[1] else None


class DenseAdapter(torch.autograd.Function):
    """y = [x +] act(route(t, u)) Bᵀ + b_up with t = x Aᵀ + b_down [B, T, R]; u and ``gram`` (uᵀ u) are the image's.

    Saved: x, t, u, the weights and h = act(...), because gelu through erf takes as long as a small matrix product.
    """

    @staticmethod
    def forward(
        x: Tensor,
        u: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        gram: Tensor | None,
        options: AdapterOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        routing, relu, act, residual = options
        t = linear(x, down_weight, down_bias)
        h = act.forward(routing.route(t, u, relu) if gram is None else route_by_gram(t, gram, relu))
        return _up(h, x, up_weight, up_bias, residual), t, h

    @staticmethod
    @keeping
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, u, down_weight, _, up_weight, _, _, ctx.options = inputs
        _, t, h = output
        ctx.save_for_backward(x, u, down_weight, up_weight, t, h)

    @staticmethod
    @backward_of
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, down_weight, up_weight, t, h = ctx.saved_tensors
        routing, relu, act, residual = ctx.options
        need_x, need_u, need_down, need_down_bias, need_up, need_up_bias = ctx.needs_input_grad[:6]
        z = routing.route(t, u, relu)
        dh, dup, dup_bias = _up_gradients(dy, h, up_weight, (need_up, need_up_bias))
        dt, du = routing.route_backward(act.backward(dh, z), t, u, relu)
        rows = dt.flatten(0, 1)
        dx = None
        if need_x:
            dx = plus_product(dy.flatten(0, 1), rows, down_weight) if residual else product(rows, down_weight)
            dx = dx.view_as(x)
        ddown = product(rows.t(), x.flatten(0, 1)) if need_down else None
        ddown_bias = column_sums(dt.flatten(0, 1)) if need_down_bias else None
        return dx, du if need_u else None, ddown, ddown_bias, dup, dup_bias


class RankOneAdapter(torch.autograd.Function):
    """y = [x +] act(c u) Bᵀ + b_up with c = x_b . w_b + k_b [B, T, 1]; w [B, K], k [B] and u [B, R] are the image's.

    Saved: x, c, h = act(c u), w, u and B.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w: Tensor,
        k: Tensor,
        u: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        options: AdapterOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = inner_products(x, w) + k[:, None, None]
        h = options.act.forward(c * u.unsqueeze(1))
        return _up(h, x, up_weight, up_bias, options.residual), c, h

    @staticmethod
    @keeping
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, w, _, u, up_weight, _, ctx.options = inputs
        _, c, h = output
        ctx.save_for_backward(x, w, u, up_weight, c, h)

    @staticmethod
    @backward_of
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w, u, up_weight, c, h = ctx.saved_tensors
        need_x, need_w, need_k, need_u, need_up, need_up_bias = ctx.needs_input_grad[:6]
        z = c * u.unsqueeze(1)
        dh, dup, dup_bias = _up_gradients(dy, h, up_weight, (need_up, need_up_bias))
        dz = ctx.options.act.backward(dh, z)
        dc = inner_products(dz, u)  # [B, T, 1]
        dx = None
        if need_x:
            dx = torch.addcmul(dy, dc, w.unsqueeze(1)) if ctx.options.residual else dc * w.unsqueeze(1)
        dw = torch.bmm(dc.mT, x).squeeze(1) if need_w else None
        dk = dc.sum((1, 2)) if need_k else None
        du = torch.bmm(c.mT, dz).squeeze(1) if need_u else None
        return dx, dw, dk, du, dup, dup_bias


def eager_adapter(x: Tensor, image: ImageCode | None, weights: Weights, options: AdapterOptions) -> Tensor:
    """The routed Adapter by the cheapest way there is; tensors as in :func:`routingvl.kernels.routed_adapter`.

    ``image`` is None where the routing takes none.
    """
    if image is not None and image.factors is not None and not options.relu:
        return applied(RankOneAdapter, x, *image.factors, image.u.squeeze(1), *weights[2:], options)
    u, gram = (None, None) if image is None else (image.u, image.gram)
    return applied(DenseAdapter, x, u, *weights, gram, options)
