"""Checks of what a model is given, where looking at values costs no wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor


def check_values(
    name: str, values: Tensor, least: float, most: float, rest: str = "", ignored: int | None = None
) -> None:
    """Raise ValueError, with ``rest`` after its sentence, unless ``values`` lie between ``least`` and ``most``.

    NaN never does; those that are ``ignored`` may be what they are. Only values on the CPU are looked at, and none
    while torch.compile traces.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
        return
    if ignored is not None:
        values = values.masked_fill(values == ignored, least)
    low, high = (bound.item() for bound in values.detach().aminmax())
    if not (least <= low and high <= most):  # false for NaN, which aminmax hands on
        raise ValueError(f"{name} must be from {least} to {most}, not from {low} to {high}{rest}")


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError when floating-point ``values`` on the CPU hold NaN or an infinity."""
    if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.is_floating_point():
        return
    if values.numel() and not all(bound.isfinite() for bound in values.detach().aminmax()):
        raise ValueError(f"{name} must be finite; they hold NaN or an infinity")
