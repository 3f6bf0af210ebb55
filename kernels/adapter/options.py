"""The options of one call of the routed Adapter, checked once and handed on as they are."""

from __future__ import annotations

from typing import NamedTuple

from ..activations import Activation
from ..routing import Routing


class AdapterOptions(NamedTuple):
    """Everything about a call that is no tensor. A field is an argument of the kernels that name it.

    Attributes:
        routing: row of the table.
        relu: as in :func:`routingvl.kernels.routed_adapter`.
        act: row of the activations.
        residual: whether x is added to the result here.
    """

    routing: Routing
    relu: bool
    act: Activation
    residual: bool
