"""A case with its providers side by side: what every level can do, to gate them, time them in turns, and say what they
take.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .ceilings import Limits
from .layer_providers import COMPILED
from .passes import Checked, Pass
from .suites import Plan
from .timing import Spent, Timer

TIME_LIMIT = "time limit"  # why something was left out


@dataclass(frozen=True)
class Setting:
    """How a case is measured.

    Attributes:
        plan: the pass of the suite.
        device: where.
        providers: those wanted beside the reference.
        is_late: whether a share of the time limit is spent.
        limits: the device's, measured when first asked for.
    """

    plan: Plan
    device: torch.device
    providers: tuple[str, ...]
    is_late: Callable[[float], bool]
    limits: Callable[[], Limits]

    def left_out(self, provider: str) -> str | None:
        """Why the suite does without a provider, or None when it does not."""
        if provider in COMPILED and not self.plan.compiled:
            return "not compiled in this pass of the suite"
        return TIME_LIMIT if self.is_late(0.5 if provider in COMPILED else 1.0) else None


class Comparison(ABC):
    """One case with one routing function in one setting.

    Attributes:
        sides: who can be timed, by name; filled by :meth:`gated`.
    """

    def __init__(self, case: Any, routing: str, setting: Setting) -> None:
        self.case, self.routing, self.setting = case, routing, setting
        self.sides: dict[str, Any] = {}

    @staticmethod
    def obstacle(plan: Plan) -> str | None:
        """Why nothing of this level can be measured in a pass, or None when it can."""
        return None

    @abstractmethod
    def gated(self) -> tuple[dict[str, str], dict[str, Checked]]:
        """Make the sides; why others are left out, and what the gate found."""

    @abstractmethod
    def seconds(self, names: Sequence[str], timer: Timer, repeats: int) -> dict[str, dict[str, list[Spent]]]:
        """What every repetition of the sides named takes, in turns, by provider and mode."""

    @abstractmethod
    def memory(self, provider: str) -> dict[str, float | None]:
        """saved_mib, what autograd keeps for the backward pass beside the inputs, and peak_mib, what a pass takes."""

    @abstractmethod
    def rates(self, provider: str, mode: str, seconds: float) -> dict[str, Any]:
        """Fields of a row that follow from its time."""

    def pass_of(self, provider: str) -> Pass | None:
        """A forward and backward pass on inputs that stay; None where the level has none to replay from a graph."""
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to clean up
        """Remove what was made outside of memory."""
