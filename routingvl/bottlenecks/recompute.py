"""Layers that are checkpointed by transformers are recomputed with the image of their own forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn


class CarriesImage:
    """transformers' function that checkpoints a layer; what it runs, and runs again, reads the image of that call.

    Features that need gradients go through the checkpoint as an argument of the layer: a reentrant one has its
    gradients from its arguments alone.
    """

    def __init__(self, function: Callable[..., Any], context: Any) -> None:
        self.function, self.context = function, context

    def __call__(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(run, *args, **options)
        binding = self.context.bound()
        if binding is None:
            return self.function(run, *args, **options)
        tensors = [t for t in (binding.features, binding.pooled) if t is not None and t.requires_grad]
        if not tensors:
            return self.function(lambda *given: self._run(binding, run, given), *args, **options)

        def with_features(features: torch.Tensor, pooled: torch.Tensor, *given: Any) -> Any:
            if features is binding.features:
                return self._run(binding, run, given)
            return self._run(replace(binding, features=features, pooled=pooled, kept={}), run, given)

        return self.function(with_features, binding.features, binding.pooled, *args, **options)

    def _run(self, binding: Any, run: Callable[..., Any], given: tuple[Any, ...]) -> Any:
        with self.context.bound_again(binding):
            return run(*given)


def carry_along(context: Any, module: nn.Module) -> None:
    """Wrap the function that checkpoints ``module``, if there is one that is not wrapped."""
    function = module.__dict__.get("_gradient_checkpointing_func")
    if function is None or not module.gradient_checkpointing:
        return
    known = function
    while isinstance(known, CarriesImage):
        if known.context is context:
            return
        known = known.function
    module._gradient_checkpointing_func = CarriesImage(function, context)
