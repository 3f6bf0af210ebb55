"""The options of one call of the routed Adapter, checked once and handed on as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..activations import Activation
from ..routing import Routing

Weights = Sequence[Tensor | None]  # down_weight, down_bias, up_weight and up_bias


class AdapterOptions(NamedTuple):
    """Everything about a call that is no tensor. A field is an argument of the kernels that name it.

    Attributes:
        routing, relu: as in :func:`routingvl.kernels.routed_adapter`; the row, not its name.
        act: row of the activations.
        residual: whether x is added to the result here.
    """

    routing: Routing
    relu: bool
    act: Activation
    residual: bool
