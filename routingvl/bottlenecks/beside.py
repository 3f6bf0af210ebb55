"""Routed LoRA over projections whose own forward has to be called: base layer, then bottleneck.

nn.Linear subclasses, layers quantised by bitsandbytes, torchao, torch.ao or GPTQ, and layers that another library
hooked. Nothing is known of such a layer but its widths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from routingvl.bottlenecks.layers import RoutedLoRA
from routingvl.bottlenecks.projections import callable_widths


class LoRAUpdate(RoutedLoRA):
    """The bottleneck alone, whose weights belong to somebody else: ``y = base_output + (alpha / R) route(...) Bᵀ``.

    It has no parameters: A [G*R, K] and B [G*n, R] (and the image's own A_v) are looked up in each call, and cast to
    the dtype of x there, so that they can be float32 beside a half-precision model. A module that is not registered
    anywhere does not follow ``model.train()``: set ``update.training`` before a call where it has dropout.

    Args:
        widths: (K, N), inputs and outputs of the projection.
        rank: R of each slice.
        weights: gives (A, B), or (A, B, A_v) with image_projection="own". A bound method, or ``functools.partial`` of
            one, follows copies of its object.
        **options: routing, alpha, dropout, relu, placement, slices, context, backend of :class:`RoutedLoRA`.
    """

    def __init__(
        self,
        widths: tuple[int, int],
        rank: int,
        weights: Callable[[], tuple[torch.Tensor, ...]],
        **options: Any,
    ) -> None:
        super().__init__(widths, rank, **options)
        self.weights = weights

    @property
    def projection(self) -> tuple[torch.Tensor, ...]:
        """A [G*R, K], B [G*n, R] and A_v [G*R, K_v] if there is one."""
        return self.weights()

    def forward(self, x: torch.Tensor, base_output: torch.Tensor, v: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] and the projection's output [..., N], with v [B, L, K] or the context's image -> y [..., N]."""
        return self.add_to(base_output, x, v)


class RoutedLoRABeside(RoutedLoRA):
    """A projection of any kind, called as it is, plus a routed low-rank update.

    ``base`` becomes the sub-module ``base_layer`` and stays as it is, its hooks too. At initialisation the output is
    that of ``base``, bit for bit.

    Args:
        base: a module with in_features and out_features, whose forward takes x [..., K] first and returns [..., N].
        rank, **options: as for :class:`RoutedLoRA`.
        dtype: of A and B; None: float32.

    Raises:
        TypeError: ``base`` has no widths.
    """

    def __init__(self, base: nn.Module, rank: int, *, dtype: torch.dtype | None = None, **options: Any) -> None:
        if (widths := callable_widths(base)) is None:
            raise TypeError(f"LoRA stands beside a projection with in_features and out_features, not {_name(base)}")
        super().__init__(widths, rank, **options)
        self.base_layer = base
        self._make_weights(_device(base), dtype or torch.float32)
        self.train(base.training)

    @property
    def weight(self) -> Any:
        """The base layer's, for code that looks at it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base layer's, for code that looks at it."""
        return self.base_layer.bias

    def forward(self, x: torch.Tensor, *args: Any, v: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """x [..., K] (three dimensions when an image is routed in), v [B, L, K] or the context's -> y [..., N]."""
        return self.add_to(self.base_layer(x, *args, **kwargs), x, v)

    def restore(self) -> nn.Module:
        """The base layer; the low-rank update is dropped."""
        return self.base_layer.train(self.training)


def _device(module: nn.Module) -> torch.device:
    """Where the module's weights are; the CPU where they are packed."""
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _name(module: nn.Module) -> str:
    return type(module).__name__
