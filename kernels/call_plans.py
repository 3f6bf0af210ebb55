"""What calls that are alike have in common is checked and decided once: equal keys, equal plan.

A plan follows from the shapes, dtypes and devices of the tensors of a call, from its other arguments, and from what the
process is set to at that moment: autocast, the backend asked for, TF32. All of it is in the key, and nothing of what
the tensors hold. Calls that are not made of plain tensors, and what a compiler traces, are planned anew each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .dispatch import BACKEND_VARIABLE
from .float32_precision import tf32_allowed
from .inputs import PLAIN
from .routing import Routing
from .tracing import transformed

MAX_PLANS = 4096  # more different calls than that, and all are planned anew
# Whose values cannot be changed after they were a key.
_VALUES = frozenset((str, float, int, bool, type(None), tuple, Routing))
_TENSORS = frozenset((*PLAIN, type(None)))

Plan = TypeVar("Plan")


def call_key(tensors: Sequence[Tensor | None], settings: Sequence[Any]) -> Hashable | None:
    """Key of a call with these tensors and other arguments; None: it gets no plan.

    The first tensor, whose dtype is that of the call, is not None. The last argument is the backend, if it was given.
    """
    if transformed() or not (_TENSORS.issuperset(map(type, tensors)) and _VALUES.issuperset(map(type, settings))):
        return None
    found = [None if tensor is None else (tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
    _, dtype, device = found[0]
    kind = _type_of(device)
    if kind == "meta":
        return None
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    asked = None if settings[-1] else os.environ.get(BACKEND_VARIABLE)
    tf32 = torch.float32 in (dtype, autocast) and tf32_allowed()
    return autocast, asked, tf32, settings, *found


@cache
def _type_of(device: torch.device) -> str:
    """``device.type``, which makes a new string each time."""
    return device.type


class Plans(Generic[Plan]):
    """The plans of one function. ``kept`` makes of the plan of a call that of all calls like it."""

    def __init__(self, kept: Callable[[Plan], Plan]) -> None:
        self._kept = kept
        self._known: dict[Hashable, Plan] = {}
        self.find = self._known.get  # the plan of this key; None for none, and for no key

    def keep(self, key: Hashable | None, plan: Plan) -> Plan:
        """Keep it, if there is a key; returns it."""
        if key is None:
            return plan
        if len(self._known) >= MAX_PLANS:
            self._known.clear()
        plan = self._known[key] = self._kept(plan)
        return plan
