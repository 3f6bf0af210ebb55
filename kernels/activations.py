"""Activations of the adapter's bottleneck, each with the gradient that the hand-written backward passes need."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """One elementwise activation h = f(z).

    Attributes:
        name: the string that chooses it (names as in transformers' configurations).
        code: small integer that chooses it inside a kernel.
        forward: ``forward(z) -> h``.
        backward: ``backward(dh, z) -> dz``.
    """

    name: str
    code: int
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _identity(z: Tensor) -> Tensor:
    return z


def _identity_backward(dh: Tensor, z: Tensor) -> Tensor:
    return dh


def _gelu_new(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _gelu_backward(dh: Tensor, z: Tensor) -> Tensor:
    return aten.gelu_backward(dh, z)


def _gelu_new_backward(dh: Tensor, z: Tensor) -> Tensor:
    return aten.gelu_backward(dh, z, approximate="tanh")


def _relu_backward(dh: Tensor, z: Tensor) -> Tensor:
    return aten.threshold_backward(dh, z, 0)


def _silu_backward(dh: Tensor, z: Tensor) -> Tensor:
    return aten.silu_backward(dh, z)


_ROWS = (
    Activation("identity", 0, _identity, _identity_backward),
    Activation("relu", 1, F.relu, _relu_backward),
    Activation("gelu", 2, F.gelu, _gelu_backward),
    Activation("gelu_new", 3, _gelu_new, _gelu_new_backward),
    Activation("silu", 4, F.silu, _silu_backward),
)
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({row.name: row for row in _ROWS})


def find_activation(name: str) -> Activation:
    """The row called ``name``; ``ValueError`` names the known ones and the nearest when there is none."""
    row = ACTIVATIONS.get(name)
    if row is None:
        close = difflib.get_close_matches(str(name), list(ACTIVATIONS), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown activation {name!r}: known are {', '.join(map(repr, ACTIVATIONS))}{hint}")
    return row
