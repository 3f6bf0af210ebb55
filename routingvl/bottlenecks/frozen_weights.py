"""Frozen weights held in the type that autocast would cast them to at every use."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.bottlenecks.projections import is_conv1d

# What belongs to bottlenecks, ours and PEFT's, and to what trains beside them: frozen or not, its type is its own.
OWNED = re.compile(
    r"\.(?:lora_\w+|modules_to_save|trainable_tokens_\w+|image_projections?|(?:image_)?down_sampler|up_sampler|two_step)\."
)


def lower_frozen_weights(model: nn.Module, dtype: torch.dtype, keep: bool = True) -> Callable[[], None]:
    """Hold the frozen weights of the matrix products in ``model`` in ``dtype``, for use under autocast to that type::

        inject(model, config)                       # or get_peft_model(model, RoutedLoraConfig(...))
        model.to(device)
        restore = routingvl.lower_frozen_weights(model, torch.bfloat16)
        Trainer(model, TrainingArguments(bf16=True, ...)).train()
        restore()

    Autocast casts a frozen float32 weight anew at every use; this casts it once. The results are the same to the bit,
    because these products ran in ``dtype`` before. Trained parameters, norms and embeddings stay as they are; a head
    that shares its weight with the embedding gets a cast copy. Outside of autocast torch refuses the mixture of types.

    Args:
        model: on its device, with projections as nn.Linear, transformers' Conv1D or RoutedLoRALinear; after ``inject``
            or ``get_peft_model``.
        dtype: bfloat16 or float16, autocast's.
        keep: keep the float32 weights, so that they can be put back; False frees their memory.

    Returns:
        A function that puts the float32 weights back; with ``keep=False`` it does so for shared weights only. A weight
        that was changed meanwhile keeps the change, rounded; so merge adapters when it is back.

    Raises:
        ValueError: ``dtype`` is another.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype!r} must be torch.bfloat16 or torch.float16, the type that autocast runs in")
    modules = [module for name, module in model.named_modules() if not OWNED.search(f".{name}.")]
    elsewhere = {id(p) for of in model.modules() if not _is_product(of) for p in of.parameters(recurse=False)}
    undo, lowered = ExitStack(), set()
    for module in filter(_is_product, modules):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if (
                name not in ("weight", "bias")
                or parameter.requires_grad
                or parameter.dtype != torch.float32
                or id(parameter) in lowered
            ):
                continue
            if id(parameter) in elsewhere:
                delattr(module, name)  # a plain tensor in its place, which is no parameter of the model
                setattr(module, name, parameter.detach().to(dtype))
                undo.callback(module.register_parameter, name, parameter)
                undo.callback(delattr, module, name)
                continue
            if keep:
                undo.callback(_put_back, parameter, parameter.data, dtype)
            parameter.data = parameter.data.to(dtype)
            lowered.add(id(parameter))
    return undo.close


def _put_back(parameter: nn.Parameter, exact: torch.Tensor, dtype: torch.dtype) -> None:
    exact = exact.to(parameter.device)
    now, lowered = parameter.data, exact.to(dtype).to(parameter.dtype)
    same = now.shape == exact.shape and torch.allclose(now, lowered, rtol=0, atol=0, equal_nan=True)
    parameter.data = exact if same else now.to(exact.dtype)


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, RoutedLoRALinear)) or is_conv1d(module)
