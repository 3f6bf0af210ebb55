"""What a bottleneck makes of the image before it meets any text.

Decoding needs it once for all steps, and where it is many small products, all layers can have it from one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import select_backend
from .inputs import cast_for_autocast, without_autocast
from .lora.options import LoRAOptions
from .routing import Routing, find_routing, gram_of


class ImageCode(NamedTuple):
    """The image as one bottleneck reads it; made by :func:`project_lora_image` and :func:`project_adapter_image`.

    Attributes:
        u: v Aᵀ [B, L, G*R], for Adapters v Aᵀ + b_down [B, L, R]; with a down-projection of the image's own, that.
        factors: where the routing is rank one in each image, what that leaves of the weights, else None. LoRA: p [B, K]
            (with ReLU: [B, G*R]) and o [B, G*n], so that y_b += (x_b . p_b) o_b, scaling included. Adapters: w [B, K]
            and k [B], so that z_b = (x_b . w_b + k_b) u_b.
        gram: uᵀ u [B, G*R, G*R] in float32 (the first u through ReLU where that is asked for), where it was made for
            decoding, else None.
    """

    u: Tensor
    factors: tuple[Tensor, Tensor] | None = None
    gram: Tensor | None = None

    def to(self, dtype: torch.dtype) -> ImageCode:
        """The same in another dtype (``gram`` stays as it is)."""
        if self.u.dtype == dtype:
            return self
        factors = None if self.factors is None else tuple(factor.to(dtype) for factor in self.factors)
        return ImageCode(self.u.to(dtype), factors, self.gram)


def project_lora_image(
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    routing: str | Routing,
    scaling: float = 1.0,
    relu: bool = False,
    groups: int = 1,
    placement: str = "bottleneck",
    backend: str | None = None,
    decoding: bool = False,
    image_weight: Tensor | None = None,
) -> ImageCode | None:
    """Project the image for one LoRA bottleneck, differentiable in v and the weights.

    ``decoding`` prepares for many calls with few rows of text each, and needs no gradients; the rest is as in
    :func:`routingvl.kernels.routed_lora`. None where there is nothing to prepare: the routing reads no image, or
    placement "output" needs activations as wide as the output.
    """
    row = find_routing(routing)
    if not row.uses_image or (placement == "output" and not row.moves_before_up(v.shape[1], relu)):
        return None
    device = v.device.type
    v, a, b, own = cast_for_autocast(device, v, a, b, image_weight)
    name, _ = select_backend(device, backend, dtype=v.dtype, width=a.shape[0])
    options = LoRAOptions(row, relu, scaling, range(groups), placement)
    with without_autocast(device):
        return lora_image(v, a, b, options, own, factors=not (relu and name == "triton"), decoding=decoding)


def lora_image(
    v: Tensor,
    a: Tensor,
    b: Tensor,
    options: LoRAOptions,
    own: Tensor | None = None,
    *,
    factors: bool = True,
    decoding: bool = False,
) -> ImageCode:
    """:func:`project_lora_image` for checked arguments; ``own`` is image_weight. Without ``factors`` none are made."""
    routing, relu, scaling, groups = *options[:3], options.groups
    down = a if own is None else own
    if not (factors and routing.is_rank_one(v.shape[1])):
        return _with_gram(F.linear(v, down), routing, relu, decoding)
    u = F.linear(v.squeeze(1), down)  # matrices from here on: fewer operations and autograd nodes than for [B, 1, G*R]
    o = _up(u, b, groups)
    if options.placement == "output":
        # <x Aᵀ Bᵀ, p(o)> = x . (Aᵀ (Bᵀ p(o))): both projections of the text move to the image's side.
        p = torch.mm(_up(routing.probe(o), b, groups, transposed=True), a)
    elif relu:
        p = F.relu(routing.probe(u))
    else:
        p = torch.mm(routing.probe(u), a)
    return ImageCode(u.unsqueeze(1), (p, o if scaling == 1 else o * scaling))


def _up(u: Tensor, b: Tensor, groups: int, transposed: bool = False) -> Tensor:
    """u [B, G*R], each group's components times its rows of b [G*n, R]: [B, G*n]; or the transpose of that."""
    multiply = torch.mm if transposed else F.linear
    pairs = zip(_cut(u, groups, 1), _cut(b, groups, 0), strict=True)
    products = [multiply(of_group, rows) for of_group, rows in pairs]
    return products[0] if groups == 1 else torch.cat(products, 1)


def _cut(x: Tensor, groups: int, dimension: int) -> tuple[Tensor, ...]:
    return (x,) if groups == 1 else x.chunk(groups, dimension)


def lora_factors(
    v: Tensor, a: Tensor, b: Tensor, options: LoRAOptions, own: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """u, p and o of :class:`ImageCode` from v [B, K], without ReLU and before the up-projection; not through autograd.

    ``own`` is image_weight.

    Their gradients are :func:`lora_factor_gradients`: recording and differentiating products as small as these one by
    one takes longer than computing them (benchmarks/NOTES.md). All tensors may lead with a dimension of layers.
    """
    product = torch.mm if v.dim() == 2 else torch.bmm
    u = product(v, (a if own is None else own).mT)
    o, groups = u.new_empty(*u.shape[:-1], b.shape[-2]), options.groups
    for o_group, u_group, b_group in zip(_cut(o, groups, -1), _cut(u, groups, -1), _cut(b, groups, -2), strict=True):
        _product_into(o_group, u_group, b_group.mT, options.scaling)
    return u, product(_probe(options.routing, u), a), o


def lora_factor_gradients(
    v: Tensor,
    a: Tensor,
    b: Tensor,
    u: Tensor,
    du: None,
    dp: Tensor,
    do: Tensor,
    options: LoRAOptions,
    own: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """du, dA, dB (and that of ``own``) from dp and do of :func:`lora_factors`; u itself is given no gradient."""
    routing, scaling, groups = options.routing, options.scaling, options.groups
    product = torch.mm if u.dim() == 2 else torch.bmm
    through = _probe_backward(routing, product(dp, a.mT), u)
    du, beta = (torch.empty_like(u), 0) if through is None else (through, 1)
    if groups == 1:
        _product_into(du, do, b, scaling, beta)
        db = (torch.addmm if b.dim() == 2 else torch.baddbmm)(b, do.mT, u, beta=0, alpha=scaling)  # reads no b
    else:
        db = torch.empty_like(b, memory_format=torch.contiguous_format)
        cut = [_cut(x, groups, -1) for x in (du, u, do)] + [_cut(x, groups, -2) for x in (db, b)]
        for du_group, u_group, do_group, db_group, b_group in zip(*cut, strict=True):
            _product_into(du_group, do_group, b_group, scaling, beta)
            _product_into(db_group, do_group.mT, u_group, scaling)
    da = product(_probe(routing, u).mT, dp)
    if own is not None:
        return du, da, db, product(du.mT, v)
    return du, _product_into(da, du.mT, v, beta=1), db


def _probe(routing: Routing, u: Tensor) -> Tensor:
    """p(u), which is defined for u [B, R], of u with or without a leading dimension of layers."""
    return routing.probe(u) if u.dim() == 2 else routing.probe(u.flatten(0, 1)).reshape(u.shape)


def _probe_backward(routing: Routing, dp: Tensor, u: Tensor) -> Tensor | None:
    if u.dim() == 2:
        return routing.probe_backward(dp, u)
    du = routing.probe_backward(dp.flatten(0, 1), u.flatten(0, 1))
    return None if du is None else du.reshape(u.shape)


def _product_into(out: Tensor, left: Tensor, right: Tensor, scaling: float = 1, beta: float = 0) -> Tensor:
    """beta out + scaling left right, put into ``out``: matrices, or as many of them as there are layers."""
    return (out.addmm_ if out.dim() == 2 else out.baddbmm_)(left, right, beta=beta, alpha=scaling)


def _adapter_factors(
    v: Tensor, a: Tensor, bias: Tensor, routing: Routing, own: Tensor | None = None, own_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """u, w and k of several Adapters."""
    down, shift = (a, bias) if own is None else (own, own_bias)
    u = torch.baddbmm(shift.unsqueeze(1), v, down.mT)
    probe = _probe(routing, u)
    return u, torch.matmul(probe, a), torch.matmul(probe, bias.unsqueeze(2)).squeeze(2)


def _adapter_factor_gradients(
    v: Tensor, a: Tensor, bias: Tensor, u: Tensor, du: Tensor, dw: Tensor, dk: Tensor, routing: Routing, *own: Tensor
) -> tuple[Tensor, ...]:
    dk = dk.unsqueeze(2)
    probe = _probe(routing, u)
    through = _probe_backward(routing, torch.matmul(dw, a.mT) + dk * bias.unsqueeze(1), u)
    if through is not None:
        du = du + through
    da = torch.matmul(probe.mT, dw)
    if own:
        return du, da, (dk * probe).sum(1), torch.matmul(du.mT, v), du.sum(1)
    return du, _product_into(da, du.mT, v, beta=1), (dk * probe + du).sum(1)


class JointImage(torch.autograd.Function):
    """For n layers at once, what ``factors`` make of v [B, 1, K]: n times u, then n times each of the two factors.

    ``factors`` are a function, its backward pass, their argument behind the first two weights (LoRAOptions, or an
    Adapter's routing), and n. ``weights`` are the n down-projections A, then n of the other weight, and so on for the
    image's own down-projection and its bias. Several backward passes may go through it, one
    for each loss or recomputed segment of a model. So v and the stacked copies of the weights are kept on ``ctx``, and
    not by autograd, which would free them after the first pass and show them to its hooks.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, factors: tuple[Any, Any, Any], *weights: Tensor) -> tuple[Tensor, ...]:
        (make, ctx.gradients, ctx.given, n), device = factors, v.device.type
        stacks = [torch.stack(weights[i : i + n]) for i in range(0, len(weights), n)]
        narrow, a, other, *own = cast_for_autocast(device, v, *stacks)
        with without_autocast(device):
            outputs = make(narrow.squeeze(1).expand(n, -1, -1), a, other, ctx.given, *own)
        ctx.v, ctx.version, ctx.stacks = v, v._version, (a, other, outputs[0], *own)
        ctx.shapes = [output.shape[1:] for output in outputs]
        ctx.set_materialize_grads(False)
        shares = [output.unbind(0) for output in outputs]
        if isinstance(ctx.given, LoRAOptions):  # u is not read where the factors are
            ctx.mark_non_differentiable(*shares[0])
            ctx.shapes[0] = None
        return tuple(itertools.chain(*shares))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.stacks[0])
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        reached = [i for i in range(n) if any(grad is not None for grad in grads[i::n])]
        if not reached:
            return tuple(found)
        if ctx.v._version != ctx.version:
            raise RuntimeError(
                "the visual features were modified by an inplace operation between the forward and the backward pass"
            )
        chosen = ctx.stacks if len(reached) == n else (torch.stack([x[i] for i in reached]) for x in ctx.stacks)
        a, other, u, *own = chosen
        v = ctx.v.to(u.dtype).squeeze(1).expand(len(reached), -1, -1)
        with without_autocast(u.device.type):
            douts = (_stacked(grads[n * k :], reached, u, shape) for k, shape in enumerate(ctx.shapes))
            du, *dweights = ctx.gradients(v, a, other, u, *douts, ctx.given, *own)
            if ctx.needs_input_grad[0]:
                found[0] = torch.matmul(du, own[0] if own else a).sum(0).unsqueeze(1)
        for first, dweight in zip(range(2, len(found), n), dweights, strict=True):
            for i, share in zip(reached, dweight.unbind(0), strict=True):
                if ctx.needs_input_grad[first + i]:
                    found[first + i] = share
        return tuple(found)


def _stacked(
    grads: Sequence[Tensor | None], reached: Sequence[int], like: Tensor, shape: Sequence[int] | None
) -> Tensor | None:
    """The gradients of those layers, [layers, *shape]; zeros where there is none. None without a shape."""
    if shape is None:
        return None
    zeros = None if all(grads[i] is not None for i in reached) else like.new_zeros(shape)
    return torch.stack([zeros if grads[i] is None else grads[i] for i in reached])


def can_project_jointly(routing: Routing, visual_tokens: int, relu: bool, placement: str = "bottleneck") -> bool:
    """Whether :func:`project_lora_images` and :func:`project_adapter_images` compute this: what is rank one, where one
    call for all layers saves host time (benchmarks/NOTES.md).
    """
    rank_one = routing.is_rank_one(visual_tokens) and routing.probe_backward is not None
    return rank_one and not relu and placement == "bottleneck"


def project_lora_images(
    v: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    image_weight: Sequence[Tensor] = (),
    *,
    routing: Routing,
    scaling: float,
    groups: int,
) -> list[ImageCode]:
    """:func:`project_lora_image` for the weights of several layers of equal shapes, in one differentiable step.

    For what :func:`can_project_jointly` allows; gradients go through the factors, and none through u.
    """
    options = LoRAOptions(routing, False, scaling, range(groups), "bottleneck")
    factors = (lora_factors, lora_factor_gradients, options, len(a))
    return _codes(JointImage.apply(v, factors, *a, *b, *image_weight))


def project_adapter_images(
    v: Tensor,
    down_weight: Sequence[Tensor],
    down_bias: Sequence[Tensor],
    image_weight: Sequence[Tensor] = (),
    image_bias: Sequence[Tensor] = (),
    *,
    routing: Routing,
) -> list[ImageCode]:
    """:func:`project_adapter_image` likewise."""
    factors = (_adapter_factors, _adapter_factor_gradients, routing, len(down_weight))
    return _codes(JointImage.apply(v, factors, *down_weight, *down_bias, *image_weight, *image_bias))


def _codes(outputs: tuple[Tensor, ...]) -> list[ImageCode]:
    n = len(outputs) // 3
    return [ImageCode(outputs[i].unsqueeze(1), (outputs[n + i], outputs[2 * n + i])) for i in range(n)]


def project_adapter_image(
    v: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    routing: str | Routing,
    relu: bool = False,
    decoding: bool = False,
    image_weight: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> ImageCode | None:
    """Project the image for one Adapter, differentiable in v and the weights.

    ``decoding`` as in :func:`project_lora_image`, the rest as in :func:`routingvl.kernels.routed_adapter`. None where
    the routing reads no image.
    """
    row = find_routing(routing)
    if not row.uses_image:
        return None
    device = v.device.type
    v, down_weight, down_bias, *own = cast_for_autocast(device, v, down_weight, down_bias, image_weight, image_bias)
    with without_autocast(device):
        return adapter_image(v, down_weight, down_bias, row, relu, decoding, own)


def adapter_image(
    v: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    routing: Routing,
    relu: bool,
    decoding: bool = False,
    own: Sequence[Tensor | None] = (None, None),
) -> ImageCode:
    """:func:`project_adapter_image` for checked arguments; ``own`` are image_weight and image_bias."""
    down = own if own[0] is not None else (down_weight, down_bias)
    if relu or not routing.is_rank_one(v.shape[1]):
        return _with_gram(F.linear(v, *down), routing, relu, decoding)
    u = F.linear(v.squeeze(1), *down)
    p = routing.probe(u)
    k = p.new_zeros(p.shape[0]) if down_bias is None else torch.mv(p, down_bias)
    return ImageCode(u.unsqueeze(1), (torch.mm(p, down_weight), k))


def _with_gram(u: Tensor, routing: Routing, relu: bool, decoding: bool) -> ImageCode:
    wanted = decoding and routing.inner_product and u.shape[1] > 1 and not u.requires_grad
    return ImageCode(u, None, gram_of(u, relu) if wanted else None)
