"""Triton backend of the routed LoRA: autograd functions around the ops of :mod:`.ops`.

The frozen product stays torch's; one kernel then adds the bottleneck to it in place. In the backward pass one kernel
adds to dx and leaves the small gradients. Which function runs follows the eager backend: rank one where the routing is,
else dense, which receives the image as u; autograd differentiates that one product outside.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd_function import applied, backward_of, keeping, need_gradients
from ..image_code import ImageCode, can_project_jointly, lora_factor_gradients, lora_factors, lora_image
from ..linear import accumulates, frozen_projection, frozen_projection_gradients
from ..routing import inner_product_image_gradient
from ..triton_common.launch import contiguous_rows, is_planned
from ..triton_common.visual_tokens import Visual, image_operand
from . import ops
from .options import LoRAOptions, Weights


class FusedDenseLoRA(torch.autograd.Function):
    """y = start + scaling route(t, u) Bᵀ for every routing function, with t = dropout(x) Aᵀ.

    u is given, or made of v [B, L, K]: u = v Aᵀ. start as for :func:`~routingvl.kernels.linear.frozen_projection`;
    ``seed`` [1] draws the dropout, None for none. Saved: x, v, u and weights, and t (R / K of x), because computing it
    again would read x once more; nothing of the mask.
    """

    cast = 8  # x to base have the dtype of the call

    @staticmethod
    def forward(
        x: Tensor,
        v: Tensor | None,
        u: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        gram: Tensor | None,
        options: LoRAOptions,
        save_t: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        made = None
        if v is not None:
            u = made = F.linear(v, a)
        plain = is_planned(options)
        y = frozen_projection(x, weight, bias, base, options.weight_layout, b.shape[0], plain=plain)
        if plain and u is not None and u.shape[1] == 1 and seed is None and weight is not None and x.is_contiguous():
            t = ops.lora_forward_again(y, x, a, u, b, save_t, options)
            if t is not None:
                return y, t, made
        tokens = rows_of_an_image(x, u)
        visual, image = image_operand(u, tokens, options.relu, gram)
        t = ops.lora_forward_(
            y.view(-1, y.shape[2]), contiguous_rows(x), a.contiguous(), image, b.contiguous(), seed, tokens, visual,
            accumulates(weight, base), save_t, options,
        )  # fmt: skip
        return y, t, made

    @staticmethod
    @keeping
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        x, v, u, a, b, weight, _, _, seed, _, ctx.options, _ = inputs
        _, t, made = output
        ctx.save_for_backward(x, v, u if made is None else made, a, b, weight, seed, t)

    @staticmethod
    @backward_of
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, u, a, b, weight, seed, t = ctx.saved_tensors
        options = ctx.options
        need_x, need_v, need_u, need_a, need_b, need_weight, need_bias, need_base = ctx.needs_input_grad[:8]
        need_u = need_u if v is None else need_v or need_a
        rows, tokens = dy.view(-1, dy.shape[2]), rows_of_an_image(x, u)
        needs, dbase = (need_x, need_weight, need_bias), dy if need_base else None
        dx, dweight, dbias = frozen_projection_gradients(rows, x, weight, options.weight_layout, needs)
        # With one visual token and ReLU the kernel would spill registers.
        need_z = need_b and u is not None and not (options.relu and u.shape[1] == 1)
        z = None if need_z or not need_b else _routed(t, u, tokens, options)
        if not (need_x or need_u or need_a or need_z):
            db = _up_gradient(rows, z, b, options) if need_b else None
            return None, None, None, None, db, dweight, dbias, dbase
        accumulate = dx is not None
        if need_x and dx is None:
            dx = rows.new_empty(rows.shape[0], x.shape[2])
        visual, found = Visual.ONE_TOKEN, None
        if accumulate and is_planned(options) and u is not None and u.shape[1] == 1 and seed is None:
            found = ops.lora_backward_again(dx, rows, t, a, u, b, need_u, need_z, options)
        if found is not None:
            dt, du, made = found
        else:
            visual, image = image_operand(u, tokens, options.relu)
            dt, dz, du, made = ops.lora_backward_(
                dx, rows, t, a.contiguous(), image, b.contiguous(), seed, tokens, visual, accumulate, need_u, need_z,
                options,
            )  # fmt: skip
        if not need_u:
            du = None
        elif visual == Visual.GRAM:
            du = inner_product_image_gradient(_of_images(dz, u, tokens), _of_images(t, u, tokens), u, options.relu)
        db = _up_gradient(rows, made if need_z else z, b, options) if need_b else None
        da = dv = None
        if need_a:
            text = contiguous_rows(x)
            da = torch.mm(dt.t(), text) if seed is None else ops.dropped_gradient(dt, text, seed, options)
        if v is not None and du is not None:
            du = du.view(-1, a.shape[0])
            if need_a:
                da.addmm_(du.t(), v.reshape(-1, v.shape[2]))
            dv, du = torch.mm(du, a).view(v.shape) if need_v else None, None
        du = None if du is None else du.view_as(u)
        return None if dx is None else dx.view_as(x), dv, du, da, db, dweight, dbias, dbase


def rows_of_an_image(x: Tensor, image: Tensor | None) -> int:
    """How many rows of x [B*beams, T, K] belong to each entry of ``image`` [B, ...], or to each of x without one."""
    entries, tokens = x.shape[0], x.shape[1]
    return tokens if image is None or image.shape[0] == entries else entries * tokens // image.shape[0]


def _of_images(t: Tensor, u: Tensor, tokens: int) -> Tensor:
    """t [M, R] as [B, rows of an image, R]."""
    return t.view(u.shape[0], tokens, t.shape[1])


def _routed(t: Tensor, u: Tensor | None, tokens: int, options: LoRAOptions) -> Tensor:
    """z [M, R] of t [M, R], and of u [B, L, R] or None."""
    rows = t.unsqueeze(0) if u is None else _of_images(t, u, tokens)
    return options.routing.route(rows, u, options.relu).flatten(0, 1)


def _up_gradient(dy: Tensor, z: Tensor, b: Tensor, options: LoRAOptions) -> Tensor:
    """dB [G*n, R] from dy [M, N] and z [M, G*R]."""
    if len(options.columns) == 1 and dy.shape[1] == b.shape[0]:
        return torch.addmm(b, dy.t(), z, beta=0, alpha=options.scaling)  # with beta 0 nothing of b is read
    db = torch.empty_like(b, memory_format=torch.contiguous_format)
    groups = zip(db.chunk(options.groups), z.chunk(options.groups, 1), options.columns, strict=True)
    for db_group, z_group, column in groups:
        dy_group = dy[:, column : column + db_group.shape[0]]
        db_group.addmm_(dy_group.t(), z_group, beta=0, alpha=options.scaling)
    return db


class FusedRankOneLoRA(torch.autograd.Function):
    """y_b = start_b + c_b o_b for each image b, with c = dropout(x_b) . p_b; p [B, K], o [B, G*n] (scaling included).

    p and o are given, or made of v [B, 1, K], a and b. Saved: x, p, o and c [M] in float32, and what p and o are of.
    """

    cast = 9  # x to base have the dtype of the call

    @staticmethod
    def forward(
        x: Tensor,
        v: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        p: Tensor | None,
        o: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        options: LoRAOptions,
    ) -> tuple[Tensor | None, ...]:
        made = (None, None, None)
        if v is not None:
            _, p, o = made = lora_factors(v.squeeze(1), a, b, options)
        plain = is_planned(options)
        y = frozen_projection(x, weight, bias, base, options.weight_layout, o.shape[1], plain=plain)
        if plain and seed is None and weight is not None and x.is_contiguous():
            c = ops.rank_one_forward_again(y, x, p, o, options)
            if c is not None:
                return y, c, *made
        c = ops.rank_one_forward_(
            y.view(-1, y.shape[2]), contiguous_rows(x), p.contiguous(), o.contiguous(), seed, rows_of_an_image(x, p),
            accumulates(weight, base), options,
        )  # fmt: skip
        return y, c, *made

    @staticmethod
    @keeping
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        x, v, a, b, p, o, weight, _, _, seed, ctx.options = inputs
        _, c, u, *made = output
        p, o = (p, o) if u is None else made
        ctx.save_for_backward(x, v, a, b, u, p, o, weight, seed, c)

    @staticmethod
    @backward_of
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, v, a, b, u, p, o, weight, seed, c = ctx.saved_tensors
        need_x, need_v, need_a, need_b, need_p, need_o, need_weight, need_bias, need_base = ctx.needs_input_grad[:9]
        if u is not None:
            need_p = need_o = need_v or need_a or need_b
        rows, dbase, needs = dy.view(-1, dy.shape[2]), dy if need_base else None, (need_x, need_weight, need_bias)
        dx, dweight, dbias = frozen_projection_gradients(rows, x, weight, ctx.options.weight_layout, needs)
        if not (need_x or need_p or need_o):
            return *(None,) * 6, dweight, dbias, dbase
        accumulate = dx is not None
        if need_x and dx is None:
            dx = rows.new_empty(rows.shape[0], x.shape[2])
        found = None
        if accumulate and need_p and need_o and seed is None and is_planned(ctx.options):
            found = ops.rank_one_backward_again(dx, rows, x, p, o, c, ctx.options)
        dp, do = found or ops.rank_one_backward_(
            dx, rows, contiguous_rows(x), p.contiguous(), o.contiguous(), c, seed, rows_of_an_image(x, p), accumulate,
            need_p, need_o, ctx.options,
        )  # fmt: skip
        dp, do, dv, da, db = dp if need_p else None, do if need_o else None, None, None, None
        if u is not None and need_p:
            du, da, db = lora_factor_gradients(v.squeeze(1), a, b, u, None, dp, do, ctx.options)
            dv = torch.mm(du, a).unsqueeze(1) if need_v else None
            dp = do = None
        return None if dx is None else dx.view_as(x), dv, da, db, dp, do, dweight, dbias, dbase


def fused_lora(
    x: Tensor,
    v: Tensor | None,
    image: ImageCode | None,
    weights: Weights,
    options: LoRAOptions,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The routed LoRA in one kernel each way; tensors as in :func:`routingvl.kernels.routed_lora_linear`.

    For what :meth:`~routingvl.kernels.routing.Routing.kernel_obstacle` allows, and equally spaced columns. ``v`` is
    None where the routing takes no image, ``image`` where v has not been projected yet. The text's mask is drawn in the
    kernel from a seed of torch's generator, so recomputing under a restored generator repeats it. ``dtype`` is that of
    the call, None where all tensors have it.
    """
    routing, relu, (a, b, *start), factors = options.routing, options.relu, weights, None
    seed = torch.randint(2**62, (1,), device=x.device) if options.dropout > 0 else None
    plain = is_planned(options)
    if image is None:
        if v is not None and can_project_jointly(routing, v.shape[1], relu, options.placement):
            return applied(
                FusedRankOneLoRA, x, v, a, b, None, None, *start, seed, options, dtype=dtype, plain=is_planned(options)
            )
        if v is not None and not relu and routing.is_rank_one(v.shape[1]):
            given = [tensor if dtype is None else tensor.to(dtype) for tensor in (v, a, b)]
            image = lora_image(*given, options)  # by autograd: this function's part in it is not known
    if image is not None:
        v, factors = None, image.factors
    if factors is not None and not relu:
        return applied(
            FusedRankOneLoRA,
            x,
            None,
            None,
            None,
            *factors,
            *start,
            seed,
            options,
            dtype=dtype,
            plain=is_planned(options),
        )
    u, gram = (None, None) if image is None else (image.u, image.gram)
    save_t = recording = False
    if torch.is_grad_enabled():
        save_t = need_gradients(x, v, u, a, b)
        recording = save_t or need_gradients(*start)
    inputs = (x, v, u, *weights, seed, gram, options, save_t)
    return applied(FusedDenseLoRA, *inputs, recording=recording, dtype=dtype, plain=plain)
