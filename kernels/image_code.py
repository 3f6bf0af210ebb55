"""What a bottleneck makes of the image before it meets any text; decoding needs it once for all steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import select_backend
from .inputs import cast_for_autocast, without_autocast
from .routing import Routing, find_routing, gram_of


class ImageCode(NamedTuple):
    """The image as one bottleneck reads it; made by :func:`project_lora_image` and :func:`project_adapter_image`.

    Attributes:
        u: v Aᵀ [B, L, G*R], for Adapters v Aᵀ + b_down [B, L, R].
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
) -> ImageCode | None:
    """Project the image for one LoRA bottleneck, differentiable in v, a and b.

    Args:
        v: visual tokens [B, L, K].
        a: down-projection [G*R, K].
        b: up-projection [G*n, R].
        routing, scaling, relu, groups, placement, backend: as in :func:`routingvl.kernels.routed_lora`.
        decoding: prepare for many calls with few rows of text each; needs no gradients then.

    Returns:
        None where there is nothing to prepare: the routing reads no image, or placement "output" needs activations as
        wide as the output.
    """
    row = find_routing(routing)
    if not row.uses_image or (placement == "output" and not row.moves_before_up(v.shape[1], relu)):
        return None
    device = v.device.type
    v, a, b = cast_for_autocast(device, v, a, b)
    name, _ = select_backend(device, backend, dtype=v.dtype, width=a.shape[0])
    options = {"scaling": scaling, "relu": relu, "groups": groups, "placement": placement, "decoding": decoding}
    with without_autocast(device):
        return lora_image(v, a, b, row, factors=not (relu and name == "triton"), **options)


def lora_image(
    v: Tensor,
    a: Tensor,
    b: Tensor,
    routing: Routing,
    *,
    scaling: float,
    relu: bool,
    groups: int,
    placement: str,
    factors: bool = True,
    decoding: bool = False,
) -> ImageCode:
    """:func:`project_lora_image` for checked arguments; without ``factors`` none are made."""
    if not (factors and routing.is_rank_one(v.shape[1])):
        return _with_gram(F.linear(v, a), routing, relu, decoding)
    u = F.linear(v.squeeze(1), a)  # matrices from here on: fewer operations and autograd nodes than for [B, 1, G*R]
    o = _up(u, b, groups)
    if placement == "output":
        # <x Aᵀ Bᵀ, p(o)> = x . (Aᵀ (Bᵀ p(o))): both projections of the text move to the image's side.
        p = torch.mm(_up_transposed(routing.probe(o), b, groups), a)
    elif relu:
        p = F.relu(routing.probe(u))
    else:
        p = torch.mm(routing.probe(u), a)
    return ImageCode(u.unsqueeze(1), (p, o if scaling == 1 else o * scaling))


def _cut(x: Tensor, groups: int, dimension: int) -> tuple[Tensor, ...]:
    return (x,) if groups == 1 else x.chunk(groups, dimension)


def lora_factors(
    v: Tensor, a: Tensor, b: Tensor, routing: Routing, scaling: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """u, p and o of :class:`ImageCode` from v [B, K], without ReLU and before the up-projection; not through autograd.

    Their gradients are :func:`lora_factor_gradients`: recording and differentiating products as small as these one by
    one takes longer than computing them (benchmarks/NOTES.md).
    """
    u = torch.mm(v, a.t())
    o = u.new_empty(u.shape[0], b.shape[0])
    for o_group, u_group, b_group in zip(_cut(o, groups, 1), _cut(u, groups, 1), _cut(b, groups, 0), strict=True):
        o_group.addmm_(u_group, b_group.t(), beta=0, alpha=scaling)
    return u, torch.mm(routing.probe(u), a), o


def lora_factor_gradients(
    v: Tensor, a: Tensor, b: Tensor, u: Tensor, dp: Tensor, do: Tensor, routing: Routing, scaling: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """du, dA and dB from dp and do of :func:`lora_factors`."""
    du, db = torch.empty_like(u), torch.empty_like(b, memory_format=torch.contiguous_format)
    cut = [_cut(x, groups, 1) for x in (du, u, do)] + [_cut(x, groups, 0) for x in (db, b)]
    for du_group, u_group, do_group, db_group, b_group in zip(*cut, strict=True):
        du_group.addmm_(do_group, b_group, beta=0, alpha=scaling)
        db_group.addmm_(do_group.t(), u_group, beta=0, alpha=scaling)
    through = routing.probe_backward(torch.mm(dp, a.t()), u)
    if through is not None:
        du += through
    return du, torch.mm(routing.probe(u).t(), dp).addmm_(du.t(), v), db


def project_adapter_image(
    v: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    *,
    routing: str | Routing,
    relu: bool = False,
    decoding: bool = False,
) -> ImageCode | None:
    """Project the image for one Adapter, differentiable in v and the weights.

    Args:
        v: visual tokens [B, L, K].
        down_weight: A [R, K].
        down_bias: b_down [R], or None.
        routing, relu: as in :func:`routingvl.kernels.routed_adapter`.
        decoding: as in :func:`project_lora_image`.

    Returns:
        None where the routing reads no image.
    """
    row = find_routing(routing)
    if not row.uses_image:
        return None
    device = v.device.type
    v, down_weight, down_bias = cast_for_autocast(device, v, down_weight, down_bias)
    with without_autocast(device):
        return adapter_image(v, down_weight, down_bias, row, relu, decoding)


def adapter_image(
    v: Tensor, down_weight: Tensor, down_bias: Tensor | None, routing: Routing, relu: bool, decoding: bool = False
) -> ImageCode:
    """:func:`project_adapter_image` for checked arguments."""
    if relu or not routing.is_rank_one(v.shape[1]):
        return _with_gram(F.linear(v, down_weight, down_bias), routing, relu, decoding)
    u = F.linear(v.squeeze(1), down_weight, down_bias)
    p = routing.probe(u)
    k = p.new_zeros(p.shape[0]) if down_bias is None else torch.mv(p, down_bias)
    return ImageCode(u.unsqueeze(1), (torch.mm(p, down_weight), k))


def _with_gram(u: Tensor, routing: Routing, relu: bool, decoding: bool) -> ImageCode:
    wanted = decoding and routing.inner_product and u.shape[1] > 1 and not u.requires_grad
    return ImageCode(u, None, gram_of(u, relu) if wanted else None)


def _up(u: Tensor, b: Tensor, groups: int) -> Tensor:
    """u [B, G*R], each group's components times its rows of b [G*n, R]: [B, G*n]."""
    if groups == 1:
        return F.linear(u, b)
    pairs = zip(u.chunk(groups, 1), b.chunk(groups, 0), strict=True)
    return torch.cat([F.linear(of_group, rows) for of_group, rows in pairs], 1)


def _up_transposed(o: Tensor, b: Tensor, groups: int) -> Tensor:
    """The transpose of :func:`_up`: o [B, G*n] gives [B, G*R]."""
    if groups == 1:
        return torch.mm(o, b)
    pairs = zip(o.chunk(groups, 1), b.chunk(groups, 0), strict=True)
    return torch.cat([torch.mm(of_group, rows) for of_group, rows in pairs], 1)
