"""Checks of what a model is given, where looking at values costs no wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor


def check_tensor(name: str, value: object, dimensions: int | None = None, *, integers: bool = False) -> None:
    """Raise ValueError unless ``value`` is a tensor of so many dimensions, of integers (or booleans) where asked."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, not a {type(value).__name__}")
    if integers and (value.is_floating_point() or value.is_complex()):
        raise ValueError(f"{name} must hold integers, not {value.dtype}")
    if dimensions is not None and value.dim() != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimensions, not the shape {list(value.shape)}")


def _can_be_looked_at(values: Tensor) -> bool:
    return values.device.type == "cpu" and not torch.compiler.is_compiling() and values.numel() > 0


def check_values(
    name: str, values: Tensor, least: float, most: float, rest: str = "", ignored: int | None = None
) -> None:
    """Raise ValueError, with ``rest`` after its sentence, unless ``values`` lie between ``least`` and ``most``.

    NaN never does; those that are ``ignored`` may be what they are. Only values on the CPU are looked at, and none
    while torch.compile traces.
    """
    if not _can_be_looked_at(values):
        return
    if ignored is not None:
        values = values.masked_fill(values == ignored, least)
    low, high = (bound.item() for bound in values.detach().aminmax())
    if not (least <= low and high <= most):  # false for NaN, which aminmax hands on
        raise ValueError(f"{name} must be from {least} to {most}, not from {low} to {high}{rest}")


def check_finite(name: str, values: Tensor) -> None:
    """Raise ValueError when floating-point ``values`` on the CPU hold NaN or an infinity."""
    if not values.is_floating_point() or not _can_be_looked_at(values):
        return
    if not all(bound.isfinite() for bound in values.detach().aminmax()):
        raise ValueError(f"{name} must be finite; they hold NaN or an infinity")


def check_zeros_and_ones(name: str, values: Tensor) -> None:
    """Raise ValueError when ``values`` on the CPU hold anything but 0 and 1."""
    if values.dtype == torch.bool or not _can_be_looked_at(values):
        return
    if not ((values == 0) | (values == 1)).all():
        raise ValueError(f"{name} must hold nothing but 0 and 1")


def check_padding(mask: Tensor, look: bool = False) -> None:
    """Raise ValueError when rows of an attention mask [B, T] begin with padding; ``look`` at one on a device too."""
    if not (_can_be_looked_at(mask) or (look and mask.numel())):
        return
    mask = mask != 0
    if rows := (mask.any(1) & ~mask[:, 0]).nonzero().flatten().tolist():
        raise ValueError(
            f"attention_mask begins with 0 in rows {rows}: texts have to stand right behind the image, or at the "
            "beginning, and be padded behind (tokenizer.padding_side = 'right')"
        )
