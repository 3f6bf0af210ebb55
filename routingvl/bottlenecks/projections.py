"""Frozen projections of any kind: which modules are one, and how wide they are."""

from __future__ import annotations

import torch
from torch import nn

from routingvl.bottlenecks.float32 import HALF
from routingvl.bottlenecks.sharding import is_sharded


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D: a projection whose weight is stored [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_projection(module: nn.Module) -> bool:
    """Whether LoRA can stand beside ``module``: nn.Linear, transformers' Conv1D, or what says its widths as they do."""
    return is_conv1d(module) or callable_widths(module) is not None


def is_dense(module: nn.Module) -> bool:
    """Whether ``module`` is nn.Linear or Conv1D itself with a plain weight and nothing hooked onto it.

    Its output can then be computed from the weight, without a call of the module.
    """
    if not (type(module) is nn.Linear or is_conv1d(module)):
        return False
    weight = module.weight
    quantised = hasattr(weight, "__tensor_flatten__") and not is_sharded(weight)  # made of several tensors
    hooked = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return not (quantised or hooked) and weight.dtype in (torch.float64, torch.float32, *HALF)


def callable_widths(module: nn.Module) -> tuple[int, int] | None:
    """(K, N) of a module that says so, as nn.Linear and everything quantised from it does; None for others."""
    widths = tuple(getattr(module, name, None) for name in ("in_features", "out_features"))
    return widths if all(type(width) is int for width in widths) else None


def projection_widths(base: nn.Module) -> tuple[int, int]:
    """(K, N) of a projection."""
    return tuple(base.weight.shape) if is_conv1d(base) else callable_widths(base)
