"""Bottlenecks that go down in two steps, which the published code compares with: to R // 4, and from there up to R.

Text and image have a down-projection each. They meet in the width R, or in R // 4 before they go up together.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from routingvl.kernels.attention import ATTENTION, attend
from routingvl.kernels.by_index import check_index, each_token, of_each_token
from routingvl.kernels.inputs import check_text_and_image, fold_beams, without_autocast
from routingvl.kernels.routing import Routing


class TwoStep(nn.Module):
    """z [B, T, G*R] of text x [B, T, K] and image v [B, L, K_v]; C = G (R // 4).

    With t = x A_tᵀ and u = v A_vᵀ, A_t [C, K] and A_v [C, K_v], and P of shape [G*R, C]:

    - "before": z = route(t P_tᵀ, u P_vᵀ)
    - "after": z = route(t, u) Pᵀ
    - "residual": z = LayerNorm(route(t, u) + t) Pᵀ
    - attention: z = attend(t Qᵀ, u K_aᵀ, u V_aᵀ) Oᵀ Pᵀ, with Q, K_a, V_a and O [C, C]

    No projection has a bias. All start as nn.Linear does.

    Args:
        widths: (K, K_v).
        rank: R, at least 4.
        groups: G.
        form: "before", "after" or "residual"; None for attention.
        routing: the routing function, or ATTENTION.
        relu: see :class:`~routingvl.config.RoutingConfig`.
        heads: of attention.

    Raises:
        ValueError: the rank is too small, or heads do not divide C.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        rank: int,
        groups: int,
        *,
        form: str | None,
        routing: Routing,
        relu: bool,
        heads: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        narrow, wide = groups * (rank // 4), groups * rank
        if not narrow:
            raise ValueError(f"rank={rank}: two steps go down to a quarter of the rank, so it must be at least 4")
        self.widths, self.form, self.routing, self.relu, self.heads = widths, form, routing, relu, heads
        make = partial(nn.Linear, bias=False, device=device, dtype=dtype)
        self.text, self.image = make(widths[0], narrow), make(widths[1], narrow)
        if routing is ATTENTION:
            if narrow % heads:
                raise ValueError(
                    f"heads={heads} must divide the width of attention, {narrow} at rank={rank}: a quarter of the rank"
                    + (f" for each of {groups} projections" if groups > 1 else "")
                )
            self.query, self.key, self.value, self.out = (make(narrow, narrow) for _ in range(4))
        if form == "before":
            self.text_up, self.image_up = make(narrow, wide), make(narrow, wide)
        else:
            self.up = make(narrow, wide)
        if form == "residual":
            self.norm = nn.LayerNorm(narrow, eps=1e-5, device=device, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        v: torch.Tensor | None,
        counted: torch.Tensor | None = None,
        index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [B, T, K] or [B*beams, T, K], v [B, L, K_v] -> z [B, T, G*R].

        ``counted`` and ``index`` are those of :class:`~routingvl.bottlenecks.binding.Reading`. Weights are cast to the
        dtype of x.

        Raises:
            ValueError: shapes do not fit, v is missing, or the routing takes fewer visual tokens.
        """
        if index is None:
            check_text_and_image(x, v, self.routing, self.relu, self.widths[1])
        else:
            check_index(index, x, v, self.routing, self.relu, self.widths[1])
        t, u = _linear(x, self.text), _linear(v, self.image)
        if self.form == "before":
            t, u = _linear(t, self.text_up), _linear(u, self.image_up)
        if index is None:
            t = fold_beams(t, u)
        else:
            t, u = each_token(t), of_each_token(u, index)
        z = self._mixed(t, u, counted)
        z = z if self.form == "before" else _linear(z, self.up)
        return z.reshape(*x.shape[:2], z.shape[2])

    def _mixed(self, t: torch.Tensor, u: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
        if self.routing is ATTENTION:
            operands = _linear(t, self.query), _linear(u, self.key), _linear(u, self.value)
            return _linear(attend(*operands, self.heads, counted), self.out)
        with without_autocast(t.device.type):
            z = self.routing.route(t, u, self.relu)
            if self.form != "residual":
                return z
            norm = self.norm
            return F.layer_norm(z + t, norm.normalized_shape, norm.weight.to(t.dtype), norm.bias.to(t.dtype), norm.eps)


def _linear(x: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
    """x times the weight, in the dtype of x; under autocast in its own."""
    weight = linear.weight
    return F.linear(x, weight if torch.is_autocast_enabled(x.device.type) else weight.to(x.dtype))
