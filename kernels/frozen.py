"""What a LoRA bottleneck is added to: a frozen product made here, or a given base, and its share of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .products import column_sums, fresh_linear, product


def start_from(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, layout: str, width: int
) -> Tensor:
    """x W' + bias, or a copy of base, or memory that is not initialised (:func:`adds` is False): [B, T, N], contiguous.

    It is nobody else's, so the bottleneck may be accumulated into it.
    """
    if weight is None:
        empty = x.new_empty(*x.shape[:-1], width)
        return empty if base is None else base.clone(memory_format=torch.contiguous_format)
    # Exact: while b is 0, a layer's output is that of the layer without bottleneck to the bit.
    return fresh_linear(x, weight if layout == "nk" else weight.t(), bias, exact=True)


def adds(weight: Tensor | None, base: Tensor | None) -> bool:
    """Whether the bottleneck is added to anything."""
    return weight is not None or base is not None


def frozen_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, layout: str, needs: Sequence[bool]
) -> list[Tensor | None]:
    """dx (of the frozen product alone), dweight, dbias and dbase; ``needs`` says which, None for the others."""
    dx = dweight = dbias = None
    if weight is not None:
        rows = dy.flatten(0, 1)
        if needs[0]:
            dx = product(rows, weight if layout == "nk" else weight.t()).view_as(x)
        if needs[1]:
            left, right = (rows, x.flatten(0, 1)) if layout == "nk" else (x.flatten(0, 1), rows)
            dweight = product(left.t(), right)
        if needs[2]:
            dbias = column_sums(rows)
    return [dx, dweight, dbias, dy if needs[3] else None]
