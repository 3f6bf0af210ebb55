"""The options of one call of the routed LoRA, checked once and handed on as they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ..routing import Routing

PLACEMENTS = ("bottleneck", "output")
WEIGHT_LAYOUTS = ("nk", "kn")
Weights = Sequence[Tensor | None]  # a, b, and what the bottleneck is added to: weight and bias, or base, or nothing


class LoRAOptions(NamedTuple):
    """Everything about a call that is no tensor. A field is an argument of the kernels that name it.

    Attributes:
        routing: row of the table.
        relu, scaling, placement, weight_layout, dropout: as in :func:`routingvl.kernels.routed_lora_linear`.
        columns: for each group the column of y at which its outputs start.
    """

    routing: Routing
    relu: bool
    scaling: float
    columns: Sequence[int]
    placement: str
    weight_layout: str = "nk"
    dropout: float = 0.0

    @property
    def groups(self) -> int:
        """How many projections share the bottleneck."""
        return len(self.columns)

    @property
    def equally_spaced(self) -> bool:
        """Whether the start columns follow one another at one distance, as the kernels take them."""
        return len({right - left for left, right in pairwise(self.columns)}) <= 1
