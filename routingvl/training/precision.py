"""Mixed precision: the frozen weights held in the type that autocast would cast them to at every use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from routingvl.bottlenecks.layers import RoutedLoRALinear, is_conv1d
from routingvl.config.schema import MIXED_PRECISION
from routingvl.models import RoutedVLModel


@contextmanager
def frozen_weights_lowered(model: RoutedVLModel, accelerator: Accelerator, keep: bool) -> Iterator[None]:
    """With mixed precision, the language model's frozen weights in that precision; ``keep`` puts float32 back after."""
    with ExitStack() as undo:
        if (name := MIXED_PRECISION[accelerator.mixed_precision]) is not None:
            # On its device first: a cast copy of a shared weight is no parameter and would not move with the model.
            model.to(accelerator.device)
            undo.callback(lower_frozen_weights(model.language_model, getattr(torch, name), keep=keep))
        yield


def lower_frozen_weights(model: nn.Module, dtype: torch.dtype, keep: bool = True) -> Callable[[], None]:
    """Hold the frozen weights of the matrix products in ``model`` in ``dtype``, for use under autocast to that type.

    Autocast casts a frozen float32 weight anew at every use; this casts it once. The results are the same to the bit,
    because these products ran in ``dtype`` before. Trained parameters, norms and embeddings stay as they are; a head
    that shares its weight with the embedding gets a cast copy.

    Args:
        model: with projections as nn.Linear, transformers' Conv1D or RoutedLoRALinear.
        dtype: bfloat16 or float16.
        keep: keep the float32 weights, so that they can be put back; False frees their memory.

    Returns:
        A function that puts the float32 weights back; with ``keep=False`` it does so for shared weights only.
    """
    modules = list(model.modules())
    elsewhere = {id(p) for module in modules if not _is_product(module) for p in module.parameters(recurse=False)}
    undo, lowered = ExitStack(), set()
    for module in filter(_is_product, modules):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad or parameter.dtype != torch.float32 or id(parameter) in lowered:
                continue
            if id(parameter) in elsewhere:
                delattr(module, name)  # a plain tensor in its place, which is no parameter of the model
                setattr(module, name, parameter.detach().to(dtype))
                undo.callback(module.register_parameter, name, parameter)
                undo.callback(delattr, module, name)
                continue
            if keep:
                undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = parameter.data.to(dtype)
            lowered.add(id(parameter))
    return undo.close


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, RoutedLoRALinear)) or is_conv1d(module)
