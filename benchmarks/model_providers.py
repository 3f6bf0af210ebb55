"""Who computes a whole model with the same weights: the published chain, it compiled, PEFT, and our two backends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from routingvl.bottlenecks.inject import remove
from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.models.base import RoutedVLModel

from .published_models import PublishedLoRALinear, published_model
from .random_models import autocast

MODEL_PROVIDERS = ("reference", "compile", "peft", "eager", "triton")  # of benchmarks.layer_providers.PROVIDERS


@dataclass
class Side:
    """A model that is measured.

    Attributes:
        model: it has the weights, and their gradients afterwards.
        call: what computes it, the model itself or its compiled form.
    """

    model: RoutedVLModel
    call: Callable[..., Any]

    def loss(self, inputs: Mapping[str, Tensor], dtype: str) -> Tensor:
        """The loss of a forward pass, under autocast in half types."""
        with autocast(self.model.device, dtype):
            return self.call(**inputs).loss


def make_side(name: str, model: RoutedVLModel) -> Side:
    """The side ``name`` of MODEL_PROVIDERS, on a copy of ``model`` (LoRA)."""
    if name == "compile":
        return _compiled(published_model(model))
    if name == "peft":
        made = peft_model(model)
    elif name == "reference":
        made = published_model(model)
    else:
        made = use_backend(copy.deepcopy(model), name)
    return Side(made, made)


def use_backend(model: RoutedVLModel, backend: str) -> RoutedVLModel:
    """``model`` itself, its layers computed by a backend."""
    for module in model.modules():
        if isinstance(module, RoutedLoRALinear):
            module.backend = backend
    return model


def _compiled(model: RoutedVLModel) -> Side:
    for module in model.modules():
        if isinstance(module, PublishedLoRALinear) and module.columns is not None:
            module.options["mask"] = False  # the published mask would break the graph
    return Side(model, torch.compile(model, dynamic=False))


def peft_model(model: RoutedVLModel) -> RoutedVLModel:
    """A copy of ``model`` (plain LoRA beside nn.Linear) with PEFT's layers in place of ours, training the same weights.

    Names of parameters become PEFT's.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model = copy.deepcopy(model)
    routed = {name: part for name, part in model.language_model.named_modules() if isinstance(part, RoutedLoRALinear)}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    remove(model.language_model)
    first = next(iter(routed.values()))
    config = LoraConfig(r=first.rank, lora_alpha=first.scaling * first.rank, target_modules=list(routed))
    inject_adapter_in_model(config, model.language_model)  # stops training everything else
    for name, part in routed.items():
        layer = model.language_model.get_submodule(name)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = part.lora_A, part.lora_B
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model.train(model.training)
