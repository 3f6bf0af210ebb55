"""Eager backend of the routed LoRA: torch operations ordered so that nothing is computed or stored twice.

Two autograd functions share the frozen product y = x W' + bias, into which they accumulate in place (they made y, so
nobody else holds it):

- :class:`DenseLoRA` for any routing function: y += s route(t, u) b', by ``addmm_`` with alpha = s. Where the text's
  path is linear (none, add) and there are rows enough, it multiplies x by W + s b a instead.
- :class:`RankOneLoRA` for expand and vllora with one visual token, which are rank one in each image:
  y_b += (x_b . w_b) o_b, with w_b = a' p(u_b) [K] and o_b = s b u_b [N]. A row of text no longer costs a factor R.

Both receive the image code through small tensors (u, or w and o) that autograd differentiates outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..arguments import with_signature, without_autocast
from ..frozen_projection import adds, frozen_gradients, start_from
from ..image_code import ImageCode, has_closed_form
from ..linear import add_product_, inner_products, linear, product
from ..reference import reference_lora
from ..routing import Routing, find_routing, route_image


def _frozen_needs(ctx: Any) -> list[bool]:
    return [ctx.needs_input_grad[slot] for slot in (0, 5, 6, 7)]  # x, weight, bias, base: alike in both functions


@torch.compiler.assume_constant_result
def _float32_is_exact() -> bool:
    return torch.get_float32_matmul_precision() == "highest"


def merging_pays(x: Tensor, width: int) -> bool:
    """Whether x (W + s b a)' takes far fewer products than x W' + s (x a') b', and loses nothing to rounding.

    W + s b a costs width K R products for each group; the expansion of M rows and their share of dx, M (width + K) R.
    The sum has to be written and kept for the backward pass, which is worth it from about half the products on.
    """
    # In half precision, or with float32 products in TF32 or bfloat16, a small update would drown in the rounding of W.
    exact = x.dtype == torch.float64 or (x.dtype == torch.float32 and _float32_is_exact())
    rows, inputs = x.shape[0] * x.shape[1], x.shape[2]
    return exact and x.device.type == "cpu" and rows * (width + inputs) > 2 * width * inputs


def _merged(weight: Tensor, a: Tensor, b: Tensor, layout: str, scaling: float, columns: Sequence[int]) -> Tensor:
    """W + scaling b a in new memory and in W's layout; rows for outputs that no group writes to stay as they are."""
    merged = weight.clone(memory_format=torch.contiguous_format)
    rows = merged if layout == "nk" else merged.t()
    groups = len(columns)
    for column, up, down in zip(columns, b.chunk(groups, 0), a.chunk(groups, 0), strict=True):
        add_product_(rows[column : column + up.shape[0]], up, down, alpha=scaling)
    return merged


class DenseLoRA(torch.autograd.Function):
    """y = start + scaling route(t, u) b' for every routing function, with t = low a'.

    start is x W' + bias, or base, or nothing. ``low`` is the input of the bottleneck where dropout makes it differ from
    x, else None. ``gram`` as in :class:`~routingvl.kernels.image_code.ImageCode`. Saved: x, t, u and the weights.

    With ``merge`` (additive routing, W given, low None) the same y is x (W + scaling b a)' + bias + scaling u b'.
    Saved: x, u, a, b and that sum, which makes dx one product; t is first computed in the backward pass.
    """

    @staticmethod
    @with_signature
    def forward(
        x: Tensor,
        low: Tensor | None,
        u: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        gram: Tensor | None,
        layout: str,
        routing: str,
        relu: bool,
        scaling: float,
        columns: Sequence[int],
        merge: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rank, width = b.shape[1], b.shape[0] // len(columns)
        if merge:
            weight = _merged(weight, a, b, layout, scaling, columns)
        y = start_from(x, weight, bias, base, layout, b.shape[0])
        t = None if merge else linear(x if low is None else low, a)  # [B, T, G*R]
        z = u if merge else route_image(find_routing(routing), t, u, relu, gram)
        for group, column in enumerate(columns if z is not None else ()):
            part = z[:, :, group * rank : (group + 1) * rank].flatten(0, 1)
            up = b[group * width : (group + 1) * width].t()
            columns_of_y = y[:, :, column : column + width]
            if merge:
                columns_of_y.add_(product(part, up).unsqueeze(1), alpha=scaling)
            else:
                add_product_(columns_of_y.flatten(0, 1), part, up, alpha=scaling, beta=int(adds(weight, base)))
        return y, t, weight if merge else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for the outputs that only exist to be saved
        x, low, u, a, b, weight, _, _, _, *ctx.options = inputs
        _, t, merged = output
        ctx.mark_non_differentiable(*(extra for extra in (t, merged) if extra is not None))
        ctx.save_for_backward(x, low, u, a, b, weight if merged is None else merged, t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(dy.device.type):
            return DenseLoRA._gradients(ctx, dy.contiguous())

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, u, a, b, weight, t = ctx.saved_tensors
        layout, routing, relu, scaling, columns, merge = ctx.options
        need_x, need_low, need_u, need_a, need_b = ctx.needs_input_grad[:5]
        dx, dweight, dbias, dbase = frozen_gradients(dy, x, weight, layout, _frozen_needs(ctx))
        row, rank, width = find_routing(routing), b.shape[1], b.shape[0] // len(columns)
        left = x if low is None else low
        t = linear(left, a) if t is None else t
        z = row.route(t, u, relu).flatten(0, 1) if need_b else None
        dz = torch.empty_like(t)
        db = torch.empty_like(b) if need_b else None
        for group, column in enumerate(columns):
            dy_part = dy.flatten(0, 1)[:, column : column + width]
            up, code = slice(group * width, (group + 1) * width), slice(group * rank, (group + 1) * rank)
            add_product_(dz.flatten(0, 1)[:, code], dy_part, b[up], alpha=scaling, beta=0)
            if need_b:
                add_product_(db[up], dy_part.t(), z[:, code], alpha=scaling, beta=0)
        dt, du = row.route_backward(dz, t, u, relu)
        dt = dt.flatten(0, 1)
        da = product(dt.t(), left.flatten(0, 1)) if need_a else None
        dlow = product(dt, a).view_as(low) if need_low else None
        if need_x and low is None and not merge:  # merged, dx is complete
            dx = (product(dt, a) if dx is None else add_product_(dx.flatten(0, 1), dt, a)).view_as(x)
        return dx, dlow, du if need_u else None, da, db, dweight, dbias, dbase, None, *(None,) * len(ctx.options)


class RankOneLoRA(torch.autograd.Function):
    """y_b = start_b + c_b o_b for each image b, with c = low_b . p_b; start as in :class:`DenseLoRA`.

    p [B, K] and o [B, G*n] (scaling included) are the image's. With ``a`` given, for ReLU only,
    the inner product is taken in the code: c = relu(low_b a') . p_b with p [B, G*R]. Saved: x, c [B, T, 1], p and o,
    and that code if there is one.
    """

    @staticmethod
    @with_signature
    def forward(
        x: Tensor,
        low: Tensor | None,
        a: Tensor | None,
        p: Tensor,
        o: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        layout: str,
        columns: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        width = o.shape[1] // len(columns)
        y = start_from(x, weight, bias, base, layout, o.shape[1])
        left = x if low is None else low
        code = None if a is None else F.relu(linear(left, a))
        c = inner_products(left if code is None else code, p)  # [B, T, 1]
        for group, column in enumerate(columns):
            row = o[:, None, group * width : (group + 1) * width]
            part = y[:, :, column : column + width]
            if adds(weight, base):
                part.addcmul_(c, row)
            else:
                torch.mul(c, row, out=part)
        return y, c, code

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        ctx.set_materialize_grads(False)  # no zeros for the outputs that only exist to be saved
        x, low, a, p, o, weight, _, _, ctx.layout, ctx.columns = inputs
        _, c, code = output
        ctx.mark_non_differentiable(c, *(() if code is None else (code,)))
        ctx.save_for_backward(x, low, a, p, o, weight, c, code)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(dy.device.type):
            return RankOneLoRA._gradients(ctx, dy.contiguous())

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, p, o, weight, c, code = ctx.saved_tensors
        need_x, need_low, need_a, need_p, need_o = ctx.needs_input_grad[:5]
        dx, dweight, dbias, dbase = frozen_gradients(dy, x, weight, ctx.layout, _frozen_needs(ctx))
        width = o.shape[1] // len(ctx.columns)
        do = torch.empty_like(o) if need_o else None
        dc = 0
        for group, column in enumerate(ctx.columns):
            dy_part = dy[:, :, column : column + width]
            up = slice(group * width, (group + 1) * width)
            dc = dc + inner_products(dy_part, o[:, up])
            if need_o:
                do[:, up] = torch.bmm(c.mT, dy_part).squeeze(1)
        left = x if low is None else low
        dp = torch.bmm(dc.mT, left if code is None else code).squeeze(1) if need_p else None
        dlow = da = None
        if code is not None:
            dt = ((dc * p.unsqueeze(1)) * (code > 0)).flatten(0, 1)
            if need_a:
                da = product(dt.t(), left.flatten(0, 1))
        if need_low or (need_x and low is None):
            grad = dx if low is None else None
            if code is None:
                row = p.unsqueeze(1)
                grad = dc * row if grad is None else grad.addcmul_(dc, row)
            else:
                grad = (product(dt, a) if grad is None else add_product_(grad.flatten(0, 1), dt, a)).view_as(left)
            dx, dlow = (grad, None) if low is None else (dx, grad)
        return dx, dlow, da, dp, do, dweight, dbias, dbase, None, None


def eager_lora(
    x: Tensor,
    low: Tensor | None,
    v: Tensor | None,
    image: ImageCode | None,
    a: Tensor,
    b: Tensor,
    *,
    row: Routing,
    scaling: float,
    relu: bool,
    groups: int,
    columns: Sequence[int],
    placement: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base: Tensor | None = None,
    layout: str = "nk",
) -> Tensor:
    """The routed LoRA by the cheapest form there is; arguments as in :func:`routingvl.kernels.routed_lora_linear`.

    What has no closed form runs as the definition does, from v; everything else from ``image``, which is None only
    where the routing reads none. ``low`` as for :class:`DenseLoRA`.
    """
    visual_tokens = v.shape[1] if row.uses_image else 0
    if not has_closed_form(row, visual_tokens, relu, placement):
        if weight is not None:
            base = F.linear(x, weight if layout == "nk" else weight.t(), bias)
        options = {"scaling": scaling, "relu": relu, "groups": groups, "columns": columns, "placement": placement}
        return reference_lora(x if low is None else low, v, a, b, routing=row.name, base=base, **options)
    if image is not None and image.factors is not None:
        code_weight = a if relu else None
        return RankOneLoRA.apply(x, low, code_weight, *image.factors, weight, bias, base, layout, tuple(columns))[0]
    u, gram = (None, None) if image is None else (image.u, image.gram)
    merge = row.additive and weight is not None and low is None and merging_pays(x, b.shape[0] // groups)
    options = (layout, row.name, relu, scaling, tuple(columns), merge)
    return DenseLoRA.apply(x, low, u, a, b, weight, bias, base, gram, *options)[0]
