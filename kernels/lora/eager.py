"""Eager backend of the routed LoRA: torch operations ordered so that nothing is computed or stored twice.

Two autograd functions share the frozen product y = x Wᵀ + bias, into which they accumulate in place (they made y, so
nobody else holds it): :class:`DenseLoRA` for any routing function, and :class:`RankOneLoRA` for what is rank one in
each image, where a row of text no longer costs a factor R. Both receive the image through small tensors (u, or p and o)
that autograd differentiates outside.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd_function import applied, backward_of, keeping
from ..float32_precision import exact_on_cpu
from ..image_code import ImageCode
from ..linear import (
    accumulates,
    add_product_,
    frozen_projection,
    frozen_projection_gradients,
    inner_products,
    linear,
    product,
)
from ..reference import reference_lora
from ..routing import route_by_gram
from .options import LoRAOptions, Weights


def _projection_gradients(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None) -> list[Tensor | None]:
    """dx [B, T, K] of the projection alone, dweight, dbias and dbase; the places of these inputs are alike in both."""
    need_x, *needs, need_base = (ctx.needs_input_grad[place] for place in (0, 5, 6, 7))
    layout = ctx.options.weight_layout
    dx, *others = frozen_projection_gradients(dy.flatten(0, 1), x, weight, layout, (need_x, *needs))
    return [None if dx is None else dx.view_as(x), *others, dy if need_base else None]


def merging_pays(x: Tensor, width: int) -> bool:
    """Whether x (W + s B A)ᵀ takes far fewer products than x Wᵀ + s (x Aᵀ) Bᵀ, and loses nothing to rounding.

    W + s B A costs width K R products for each group; the up-projection of M rows and its dx, M (width + K) R.
    The sum has to be written and kept for the backward pass, which is worth it from about half the products on.
    """
    # In half precision, or with float32 products in TF32 or bfloat16, a small update would drown in the rounding of W.
    exact = x.dtype == torch.float64 or (x.dtype == torch.float32 and exact_on_cpu())
    rows, inputs = x.shape[0] * x.shape[1], x.shape[2]
    return exact and x.device.type == "cpu" and rows * (width + inputs) > 2 * width * inputs


def _merged(weight: Tensor, a: Tensor, b: Tensor, options: LoRAOptions) -> Tensor:
    """W + scaling B A in new memory and in W's layout; rows for outputs that no group writes to stay as they are."""
    merged = weight.clone(memory_format=torch.contiguous_format)
    rows = merged if options.weight_layout == "nk" else merged.t()
    groups = options.groups
    for column, up, down in zip(options.columns, b.chunk(groups, 0), a.chunk(groups, 0), strict=True):
        add_product_(rows[column : column + up.shape[0]], up, down, alpha=options.scaling)
    return merged


class DenseLoRA(torch.autograd.Function):
    """y = start + scaling route(t, u) Bᵀ for every routing function, with t = dropped Aᵀ.

    start is x Wᵀ + bias, or base, or nothing. ``dropped`` is the input of the bottleneck where dropout makes it differ
    from x, else None. ``gram`` as in :class:`~routingvl.kernels.image_code.ImageCode`. Saved: x, t, u and the weights.

    With ``merge`` (z = t + c u, W given, ``dropped`` None) the same y is x (W + scaling B A)ᵀ + bias + scaling c u Bᵀ.
    Saved: x, u, A, B and that sum, which makes dx one product; t is first computed in the backward pass.
    """

    @staticmethod
    def forward(
        x: Tensor,
        dropped: Tensor | None,
        u: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        gram: Tensor | None,
        options: LoRAOptions,
        merge: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        routing, relu, scaling, columns, layout = *options[:4], options.weight_layout
        rank, width = b.shape[1], b.shape[0] // len(columns)
        if merge:
            weight = _merged(weight, a, b, options)
        y = frozen_projection(x, weight, bias, base, layout, b.shape[0])
        t = None if merge else linear(x if dropped is None else dropped, a)  # [B, T, G*R]
        if merge:
            z, scaling = u, scaling * routing.image_factor
        else:
            z = routing.route(t, u, relu) if gram is None else route_by_gram(t, gram, relu)
        for group, column in enumerate(columns if z is not None else ()):
            z_group = z[:, :, group * rank : (group + 1) * rank].flatten(0, 1)
            up = b[group * width : (group + 1) * width].t()
            y_group = y[:, :, column : column + width]
            if merge:
                y_group.add_(product(z_group, up).unsqueeze(1), alpha=scaling)
            else:
                beta = int(accumulates(weight, base))
                add_product_(y_group.flatten(0, 1), z_group, up, alpha=scaling, beta=beta)
        return y, t, weight if merge else None

    @staticmethod
    @keeping
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        x, dropped, u, a, b, weight, _, _, _, ctx.options, ctx.merge = inputs
        _, t, merged = output
        ctx.save_for_backward(x, dropped, u, a, b, weight if merged is None else merged, t)

    @staticmethod
    @backward_of
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, u, a, b, weight, t = ctx.saved_tensors
        routing, relu, scaling, columns = ctx.options[:4]
        need_x, need_dropped, need_u, need_a, need_b = ctx.needs_input_grad[:5]
        dx, dweight, dbias, dbase = _projection_gradients(ctx, dy, x, weight)
        rank, width = b.shape[1], b.shape[0] // len(columns)
        left = x if dropped is None else dropped
        t = linear(left, a) if t is None else t
        z = routing.route(t, u, relu).flatten(0, 1) if need_b else None
        dz = torch.empty_like(t)
        db = torch.empty_like(b) if need_b else None
        for group, column in enumerate(columns):
            dy_group = dy.flatten(0, 1)[:, column : column + width]
            up, parts = slice(group * width, (group + 1) * width), slice(group * rank, (group + 1) * rank)
            add_product_(dz.flatten(0, 1)[:, parts], dy_group, b[up], alpha=scaling, beta=0)
            if need_b:
                add_product_(db[up], dy_group.t(), z[:, parts], alpha=scaling, beta=0)
        dt, du = routing.route_backward(dz, t, u, relu)
        dt = dt.flatten(0, 1)
        da = product(dt.t(), left.flatten(0, 1)) if need_a else None
        ddropped = product(dt, a).view_as(dropped) if need_dropped else None
        if need_x and dropped is None and not ctx.merge:  # merged, dx is complete
            dx = (product(dt, a) if dx is None else add_product_(dx.flatten(0, 1), dt, a)).view_as(x)
        return dx, ddropped, du if need_u else None, da, db, dweight, dbias, dbase


class RankOneLoRA(torch.autograd.Function):
    """y_b = start_b + c_b o_b for each image b, with c = dropped_b . p_b; start as in :class:`DenseLoRA`.

    p [B, K] and o [B, G*n] (scaling included) are the image's. With ``a`` given, for ReLU only, the inner product is
    taken in the bottleneck: c = relu(dropped_b Aᵀ) . p_b with p [B, G*R]. Saved: x, c [B, T, 1], p and o, and that
    activation if there is one.
    """

    @staticmethod
    def forward(
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor | None,
        p: Tensor,
        o: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        options: LoRAOptions,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        width = o.shape[1] // options.groups
        y = frozen_projection(x, weight, bias, base, options.weight_layout, o.shape[1])
        left = x if dropped is None else dropped
        t = None if a is None else F.relu(linear(left, a))
        c = inner_products(left if t is None else t, p)  # [B, T, 1]
        for group, column in enumerate(options.columns):
            o_group = o[:, None, group * width : (group + 1) * width]
            y_group = y[:, :, column : column + width]
            if accumulates(weight, base):
                y_group.addcmul_(c, o_group)
            else:
                torch.mul(c, o_group, out=y_group)
        return y, c, t

    @staticmethod
    @keeping
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        x, dropped, a, p, o, weight, _, _, ctx.options = inputs
        _, c, t = output
        ctx.save_for_backward(x, dropped, a, p, o, weight, c, t)

    @staticmethod
    @backward_of
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, dropped, a, p, o, weight, c, t = ctx.saved_tensors
        need_x, need_dropped, need_a, need_p, need_o = ctx.needs_input_grad[:5]
        dx, dweight, dbias, dbase = _projection_gradients(ctx, dy, x, weight)
        width = o.shape[1] // ctx.options.groups
        do = torch.empty_like(o) if need_o else None
        dc = 0
        for group, column in enumerate(ctx.options.columns):
            dy_group = dy[:, :, column : column + width]
            up = slice(group * width, (group + 1) * width)
            dc = dc + inner_products(dy_group, o[:, up])
            if need_o:
                do[:, up] = torch.bmm(c.mT, dy_group).squeeze(1)
        left = x if dropped is None else dropped
        dp = torch.bmm(dc.mT, left if t is None else t).squeeze(1) if need_p else None
        ddropped = da = None
        if t is not None:
            dt = ((dc * p.unsqueeze(1)) * (t > 0)).flatten(0, 1)
            if need_a:
                da = product(dt.t(), left.flatten(0, 1))
        if need_dropped or (need_x and dropped is None):
            grad = dx if dropped is None else None
            if t is None:
                p_rows = p.unsqueeze(1)
                grad = dc * p_rows if grad is None else grad.addcmul_(dc, p_rows)
            else:
                grad = (product(dt, a) if grad is None else add_product_(grad.flatten(0, 1), dt, a)).view_as(left)
            dx, ddropped = (grad, None) if dropped is None else (dx, grad)
        return dx, ddropped, da, dp, do, dweight, dbias, dbase


def eager_lora(
    x: Tensor,
    dropped: Tensor,
    v: Tensor | None,
    image: ImageCode | None,
    weights: Weights,
    options: LoRAOptions,
    own: Tensor | None = None,
) -> Tensor:
    """The routed LoRA by the cheapest way there is; tensors as in :func:`routingvl.kernels.routed_lora_linear`.

    ``dropped`` is the bottleneck's input, x itself without dropout. ``image`` is None where the routing takes none, or
    where it has to be routed after the up-projection: that runs as the definition does, from v (``own`` is the
    down-projection that is the image's alone).
    """
    routing, relu = options.routing, options.relu
    a, b, weight, bias, base = weights
    if options.placement == "output" and not routing.moves_before_up(0 if v is None else v.shape[1], relu):
        if weight is not None:
            base = F.linear(x, weight if options.weight_layout == "nk" else weight.t(), bias)
        return reference_lora(
            dropped, v, a, b, routing=routing, scaling=options.scaling, base=base, relu=relu,
            groups=options.groups, columns=options.columns, placement="output", image_weight=own,
        )  # fmt: skip
    dropped = None if dropped is x else dropped
    if image is not None and image.factors is not None:
        return applied(RankOneLoRA, x, dropped, a if relu else None, *image.factors, *weights[2:], options)
    u, gram = (None, None) if image is None else (image.u, image.gram)
    merge = (
        routing.image_factor is not None
        and weight is not None
        and dropped is None
        and merging_pays(x, b.shape[0] // options.groups)
    )
    return applied(DenseLoRA, x, dropped, u, *weights, gram, options, merge)
