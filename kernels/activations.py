"""Activations of the adapter's bottleneck, each with the gradient that the hand-written backward passes need.

Every activation stands here twice: as torch operations in the table, and, chosen by its code at compile time, in the
device functions :func:`act_fwd` and :func:`act_bwd` that Triton kernels inline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from .find_by_name import find_by_name
from .optional_triton import constexpr, jit, tl

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


_ROWS = (
    Activation("identity", 0, lambda z: z, lambda dh, z: dh),
    Activation("relu", 1, F.relu, lambda dh, z: aten.threshold_backward(dh, z, 0)),
    Activation("gelu", 2, F.gelu, aten.gelu_backward),
    Activation("gelu_new", 3, partial(F.gelu, approximate="tanh"), partial(aten.gelu_backward, approximate="tanh")),
    Activation("silu", 4, F.silu, aten.silu_backward),
)
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType({row.name: row for row in _ROWS})


def find_activation(name: str) -> Activation:
    """The row called ``name``; ``ValueError`` names the known ones and the nearest when there is none."""
    return find_by_name(ACTIVATIONS, name, "activation")


@jit
def logistic(z):
    """1 / (1 + exp(-z)) in float32, without overflow at either end."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@jit
def gelu_new_gate(z):
    """The argument at which gelu_new(z) = z logistic(gate): (1 + tanh(g)) / 2 = logistic(2 g)."""
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)  # 2 sqrt(2 / pi)


@jit
def rectified(z):
    """max(z, 0), NaN where z is NaN."""
    return tl.where(z < 0, 0.0, z)


@jit
def act_fwd(z, ACT: constexpr):
    """h = f(z), elementwise in float32; ACT is the code of a row of ``ACTIVATIONS``."""
    if ACT == 1:
        h = rectified(z)
    elif ACT == 2:
        h = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))  # 1 / sqrt(2)
    elif ACT == 3:
        h = z * logistic(gelu_new_gate(z))
    elif ACT == 4:
        h = z * logistic(z)
    else:
        h = z
        tl.static_assert(ACT == 0, "act_fwd has no branch for this code of an activation")
    return h


@jit
def act_bwd(dh, z, ACT: constexpr):
    """dz = dh f'(z), elementwise in float32."""
    if ACT == 1:
        dz = tl.where(z <= 0, 0.0, dh)
    elif ACT == 2:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)  # 1 / sqrt(2 pi)
        dz = dh * (0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density)
    elif ACT == 3:
        s = logistic(gelu_new_gate(z))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)
        dz = dh * (s + z * s * (1.0 - s) * slope)
    elif ACT == 4:
        s = logistic(z)
        dz = dh * (s + z * s * (1.0 - s))
    else:
        dz = dh
        tl.static_assert(ACT == 0, "act_bwd has no branch for this code of an activation")
    return dz
