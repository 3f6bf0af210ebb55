"""What a bottleneck makes of the image before it meets any text.

None of it depends on the text, so one product can serve many layers, and one result every step of decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import cast_for_autocast, without_autocast
from .launch import select_backend
from .routing import Routing, find_routing


class ImageCode(NamedTuple):
    """The image as one bottleneck reads it; made by :func:`project_lora_images` and :func:`project_adapter_images`.

    Attributes:
        u: code of the visual tokens, v a' (Adapters: v D' + d) [B, L, C]; C = G*R, for Adapters R.
        factors: where the routing is rank one in each image, what that leaves of the weights, else None. LoRA: p [B, K]
            (with ReLU: [B, C]) and o [B, G*n], so that y_b += (x_b . p_b) o_b, scaling included. Adapters: w [B, K] and
            k [B], so that z_b = (x_b . w_b + k_b) u_b.
        gram: u' u [B, C, C] in float32 (the first u through ReLU where that is asked for), where it was made for
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


def is_rank_one(row: Routing, visual_tokens: int) -> bool:
    """Whether the update is rank one in each image."""
    return row.probe is not None and visual_tokens == 1


def has_closed_form(row: Routing, visual_tokens: int, relu: bool, placement: str) -> bool:
    """Whether the update can be had without codes as wide as the output.

    In the output space plain LoRA and add are what they are in the bottleneck, because the up-projection is linear,
    and what is rank one stays so; mul, ReLU and many visual tokens have no such form.
    """
    if placement == "bottleneck" or row.name in ("none", "add"):
        return True
    return is_rank_one(row, visual_tokens) and not relu


def gram_of(u: Tensor, relu: bool) -> Tensor:
    """relu(u)' u [B, C, C] of a code u [B, L, C], the ReLU if asked for.

    In float32 at least: a sum over many tokens loses too much in half precision.
    """
    wide = u if u.dtype == torch.float64 else u.float()
    return (F.relu(wide) if relu else wide).mT @ wide


def project_lora_images(
    v: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    *,
    routing: str,
    scaling: float = 1.0,
    relu: bool = False,
    groups: int = 1,
    placement: str = "bottleneck",
    backend: str | None = None,
    decoding: bool = False,
) -> list[ImageCode] | None:
    """Project the image for several LoRA bottlenecks of one shape, by one product for all of them.

    Args:
        v: visual tokens [B, L, K].
        a: down-projections [G*R, K], one a bottleneck.
        b: up-projections [G*n, R] likewise.
        routing, scaling, relu, groups, placement, backend: as in :func:`routingvl.kernels.routed_lora`.
        decoding: prepare for many calls with few rows of text each; needs no gradients then.

    Returns:
        An :class:`ImageCode` a bottleneck, differentiable in v, a and b; None where there is nothing to prepare (the
        routing reads no image, or has no closed form in the output space).
    """
    row = find_routing(routing)
    if not row.uses_image or not has_closed_form(row, v.shape[1], relu, placement):
        return None
    device = v.device.type
    v, down = cast_for_autocast(device, v, _joined(a))
    rank_one = is_rank_one(row, v.shape[1])
    name, _ = select_backend(device, backend, dtype=v.dtype, width=a[0].shape[0], dense=relu or not rank_one)
    factored = rank_one and not (relu and name == "triton")
    up = cast_for_autocast(device, _stacked(b))[0] if factored else None
    with without_autocast(device):
        code = F.linear(v, down)
        factors = None
        if factored:
            width, inputs = a[0].shape
            u = code.view(v.shape[0], len(a), width).transpose(0, 1)
            factors = _lora_factors(
                u,
                down.view(len(a), width, inputs),
                up,
                row,
                scaling=scaling,
                relu=relu,
                groups=groups,
                placement=placement,
            )
        return _codes(code, len(a), factors, decoding and row.max_visual_tokens is None, relu)


def project_adapter_images(
    v: Tensor,
    down_weight: Sequence[Tensor],
    down_bias: Sequence[Tensor] | None,
    *,
    routing: str,
    relu: bool = False,
    decoding: bool = False,
) -> list[ImageCode] | None:
    """Project the image for several Adapters of one shape, by one product for all of them.

    Args:
        v: visual tokens [B, L, K].
        down_weight: D [R, K], one an Adapter.
        down_bias: d [R] likewise; None: without.
        routing, relu: as in :func:`routingvl.kernels.routed_adapter`.
        decoding: as in :func:`project_lora_images`.

    Returns:
        An :class:`ImageCode` an Adapter, differentiable in v, D and d; None where the routing reads no image.
    """
    row = find_routing(routing)
    if not row.uses_image:
        return None
    bias = None if down_bias is None else _joined(down_bias)
    v, down, bias = cast_for_autocast(v.device.type, v, _joined(down_weight), bias)
    count, (rank, inputs) = len(down_weight), down_weight[0].shape
    with without_autocast(v.device.type):
        code = F.linear(v, down, bias)
        factors = None
        if is_rank_one(row, v.shape[1]) and not relu:
            probe = row.probe(code.view(v.shape[0], count, rank).transpose(0, 1))  # [n, B, R]
            offset = probe.new_zeros(probe.shape[:2])
            if bias is not None:
                offset = torch.matmul(probe, bias.view(count, rank, 1)).squeeze(-1)
            factors = torch.matmul(probe, down.view(count, rank, inputs)), offset
        return _codes(code, count, factors, decoding and row.max_visual_tokens is None, relu)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(list(weights))


def _codes(
    code: Tensor, count: int, factors: tuple[Tensor, Tensor] | None, decoding: bool, relu: bool
) -> list[ImageCode]:
    """Cut what was computed for all into the share of each; code [B, L, n*C], factors [n, ...]."""
    parts = code.chunk(count, -1) if count > 1 else (code,)
    pairs = [None] * count if factors is None else list(zip(*(factor.unbind(0) for factor in factors), strict=True))
    grams = decoding and code.shape[1] > 1 and not code.requires_grad
    return [
        ImageCode(u, pair, gram_of(u, relu) if grams else None) for u, pair in zip(parts, pairs, strict=True)
    ]  # fmt: skip


def _expanded(code: Tensor, b: Tensor, groups: int) -> Tensor:
    """Expand each group's share of codes [n, B, G*R] by b [n, G*w, R]: [n, B, G*w]."""
    if groups == 1:
        return torch.matmul(code, b.mT)
    pairs = zip(code.chunk(groups, 2), b.chunk(groups, 1), strict=True)
    return torch.cat([torch.matmul(part, rows.mT) for part, rows in pairs], 2)


def _lora_factors(
    u: Tensor, a: Tensor, b: Tensor, row: Routing, *, scaling: float, relu: bool, groups: int, placement: str
) -> tuple[Tensor, Tensor]:
    """p [n, B, K] and o [n, B, G*w] of :class:`ImageCode` from codes u [n, B, C], a [n, C, K] and b [n, G*w, R]."""
    code = _expanded(u, b, groups)
    if placement == "output":
        probe = row.probe(code)
        # <x a' b', probe> = x . (a' (b' probe)): both expansions move to the image's side.
        parts = zip(probe.chunk(groups, 2), b.chunk(groups, 1), strict=True)
        back = torch.cat([torch.matmul(part, rows) for part, rows in parts], 2)
        return torch.matmul(back, a), code * scaling
    probe = row.probe(u)
    return (F.relu(probe) if relu else torch.matmul(probe, a)), code * scaling
