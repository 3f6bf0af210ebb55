"""The definition of every op: a plain composition of torch operations, differentiated by autograd.

Nothing here is fast. The backends are tested against these functions in float64. Letters: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import find_activation
from .routing import Routing, find_routing


def grouped_linear(t: Tensor, b: Tensor, groups: int) -> Tensor:
    """Project each group's components of t up: [..., G*R] with b [G*n, R] gives [..., G*n]."""
    pairs = zip(t.chunk(groups, -1), b.chunk(groups, 0), strict=True)
    return torch.cat([F.linear(of_group, rows) for of_group, rows in pairs], -1)


def reference_lora(
    x: Tensor,
    v: Tensor | None,
    a: Tensor,
    b: Tensor,
    *,
    routing: str | Routing,
    scaling: float = 1.0,
    base: Tensor | None = None,
    relu: bool = False,
    groups: int = 1,
    columns: Sequence[int] | None = None,
    placement: str = "bottleneck",
    image_weight: Tensor | None = None,
) -> Tensor:
    """y = base + scaling route(x Aᵀ, v Aᵀ) Bᵀ; arguments as in :func:`routingvl.kernels.routed_lora`."""
    row = find_routing(routing)
    t = F.linear(x, a)
    u = F.linear(v, a if image_weight is None else image_weight) if row.uses_image else None
    if placement == "output":
        t = grouped_linear(t, b, groups)
        u = grouped_linear(u, b, groups) if u is not None else None
        delta = row.route(t, u, relu)
    else:
        delta = grouped_linear(row.route(t, u, relu), b, groups)
    delta = scaling * delta
    if base is None:
        return delta
    if columns is not None:
        width = b.shape[0] // groups
        padded = torch.zeros_like(base)
        for of_group, start in zip(delta.chunk(groups, -1), columns, strict=True):
            padded[..., start : start + width] = of_group
        delta = padded
    return base + delta


def reference_adapter(
    x: Tensor,
    v: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    routing: str,
    activation: str = "gelu",
    residual: bool = True,
    relu: bool = False,
    image_weight: Tensor | None = None,
    image_bias: Tensor | None = None,
) -> Tensor:
    """y = [x +] act(route(x Aᵀ + b_down, v Aᵀ + b_down)) Bᵀ + b_up; see :func:`routingvl.kernels.routed_adapter`."""
    row = find_routing(routing)
    t = F.linear(x, down_weight, down_bias)
    own = (down_weight, down_bias) if image_weight is None else (image_weight, image_bias)
    u = F.linear(v, *own) if row.uses_image else None
    h = find_activation(activation).forward(row.route(t, u, relu))
    y = F.linear(h, up_weight, up_bias)
    return x + y if residual else y
