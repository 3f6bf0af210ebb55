"""Low-rank cross-attention, which bottlenecks are compared with: it has parameters of its own.

It stands where a routing function stands, and everything that asks one for its properties can ask it. It is no row of
the table, whose functions have no parameters: its weights are a layer's, and what is here computes the rest.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .routing import ABLATIONS, ROUTINGS, Routing, find_routing

NAME = "attention"


class _Attention(Routing):
    def __reduce__(self):
        return "ATTENTION"  # a copied or loaded module refers to this one


def _no_function(*_: Any) -> Any:
    raise TypeError("attention has weights, which a routing function does not get: see routingvl.kernels.attention")


_FORMULA = "z = softmax(q kᵀ / sqrt(c)) w, in heads"
ATTENTION = _Attention(NAME, None, _FORMULA, None, False, _no_function, _no_function, takes_padding=True)
FUNCTIONS = (*ROUTINGS, *ABLATIONS, NAME)  # the names that find_function knows


def find_function(name: str | Routing) -> Routing:
    """:data:`ATTENTION`, or the routing function called ``name``; ValueError names the known ones."""
    return ATTENTION if name == NAME else find_routing(name)


def attend(q: Tensor, k: Tensor, w: Tensor, heads: int, counted: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(c)) w in each of ``heads`` heads of width c = C / heads, side by side [B, T, C].

    Args:
        q: [B, T, C], of the text.
        k, w: [B, L, C], of the image.
        heads: how many; they divide C.
        counted: bool [B, L], False where k and w are padding; None: True everywhere. An entry without any token gets
            what its padding holds.
    """
    cut = [tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (q, k, w)]
    if counted is not None:
        counted = (counted | ~counted.any(1, keepdim=True))[:, None, None]
    return F.scaled_dot_product_attention(*cut, attn_mask=counted).transpose(1, 2).flatten(2)
