"""What calls that are alike have in common is checked and decided once: equal keys, equal plan.

A plan follows from the shapes, dtypes and devices of the tensors of a call, from its other arguments, and from what the
process is set to at that moment: autocast, the backend asked for, TF32. All of it is in the key, and nothing of what
the tensors hold. Calls that are not made of plain tensors, and what a compiler traces, are planned anew each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .dispatch import BACKEND_VARIABLE
from .float32_precision import tf32_allowed
from .inputs import PLAIN, transformed
from .routing import Routing

MAX_PLANS = 4096  # more different calls than that, and all are planned anew
_VALUES = frozenset(
    (str, float, int, bool, type(None), tuple, Routing)
)  # which cannot be changed after they were a key


Plan = TypeVar("Plan")


def call_key(tensors: Sequence[Tensor | None], settings: Sequence[Any]) -> Hashable | None:
    """Key of a call with these tensors, the first of them not None, and other arguments; None: it gets no plan."""
    if transformed():
        return None
    found: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif type(tensor) in PLAIN:
            found += (tensor.shape, tensor.dtype, tensor.device)
        else:
            return None
    if not _VALUES.issuperset(map(type, settings)):
        return None
    device = tensors[0].device.type
    if device == "meta":
        return None
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, os.environ.get(BACKEND_VARIABLE), torch.float32 in found and tf32_allowed(), *settings, *found


class Plans(Generic[Plan]):
    """The plans of one function. ``kept`` makes of the plan of a call that of all calls like it."""

    def __init__(self, kept: Callable[[Plan], Plan]) -> None:
        self._kept = kept
        self._known: dict[Hashable, Plan] = {}

    def find(self, key: Hashable | None) -> Plan | None:
        """The plan of this key, or None."""
        return None if key is None else self._known.get(key)

    def keep(self, key: Hashable | None, plan: Plan) -> Plan:
        """Keep it, if there is a key; returns it."""
        if key is None:
            return plan
        if len(self._known) >= MAX_PLANS:
            self._known.clear()
        plan = self._known[key] = self._kept(plan)
        return plan
