"""Put routed bottlenecks into a language model and freeze the rest; take them out again."""

from __future__ import annotations

from typing import Any

from torch import nn

from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.layers import (
    RoutedAdapter,
    RoutedLayer,
    RoutedLoRALinear,
)
from routingvl.bottlenecks.places import SurgeryError, adapter_places, layer_norms, lora_places
from routingvl.bottlenecks.report import TrainableReport, trainable_report
from routingvl.config import RoutingConfig
from routingvl.kernels import ROUTINGS


def inject(
    model: nn.Module, config: RoutingConfig, context: VisualContext | None = None, backend: str | None = None
) -> TrainableReport:
    """Freeze ``model`` and give it routed bottlenecks, in place.

    Afterwards these train, and nothing else: the bottlenecks, the bias of each projection that LoRA adapts
    (``train_bias``) and the LayerNorms inside the transformer layers (``train_layer_norm``).

    Args:
        model: a language model of transformers (or one that contains it). A family of ``bottlenecks/families.py`` knows
            its own places; any other model needs ``config.targets`` and method "lora".
        config: what to build, and where.
        context: where the bottlenecks read the image from; None makes a new one. Bind it around the model's call.
        backend: None, "eager" or "triton" for every bottleneck, see :func:`routingvl.kernels.lora.api`.

    Returns:
        What trains, and which backend runs each bottleneck.

    Raises:
        SurgeryError: no module matches (the nearest names are listed), a layer index does not exist, or the model
            has bottlenecks already.
    """
    if any(isinstance(module, RoutedLayer) for module in model.modules()):
        raise SurgeryError(
            "the model has routed bottlenecks already: call routingvl.bottlenecks.inject.remove(model) first"
        )
    context = VisualContext() if context is None else context
    plan = _plan_lora if config.method == "lora" else _plan_adapters
    shared = {"context": context, "backend": backend}
    shared |= {key: getattr(config, key) for key in ("rank", "routing", "dropout", "relu")}
    changes = plan(model, config, shared)
    # Everything was built before anything is touched, so an error leaves the model as it was.
    context.follow(model)
    model.requires_grad_(False)
    for name, module in changes.items():
        _replace(model, name, module)
    if config.method == "adapter":
        for place in adapter_places(model, config):
            changes[place.home].hang_on(model.get_submodule(place.at), before=config.position == "pre_norm")
    _unfreeze(model, config)
    return trainable_report(model)


def remove(model: nn.Module) -> None:
    """Take every routed bottleneck out again, in place; trained norms and biases stay as they are.

    Raises:
        SurgeryError: the model has none.
    """
    modules = list(model.named_modules())
    if not any(isinstance(module, RoutedLayer) for _, module in modules):
        raise SurgeryError("the model has no routed bottlenecks to remove")
    for name, module in modules:
        if isinstance(module, RoutedLoRALinear):
            _replace(model, name, module.restore())
        elif isinstance(module, RoutedAdapter):
            module.take_off()
            home, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(home), attribute)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the sub-module called ``name``, which need not exist yet."""
    home, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(home), attribute, module)


def _plan_lora(model: nn.Module, config: RoutingConfig, shared: dict[str, Any]) -> dict[str, nn.Module]:
    """Module name -> replacement for each projection to adapt."""
    changes = {}
    for place in lora_places(model, config):
        base = model.get_submodule(place.name)
        options = {"alpha": config.alpha, "placement": config.placement, "slices": place.slices, "parts": place.parts}
        routed = shared | {"routing": "none", "relu": False} if place.unrouted else shared
        changes[place.name] = RoutedLoRALinear(base, **options, **routed)
    widths = {change.lora_A.shape[-1]: name for name, change in changes.items()}
    if len(widths) > 1 and ROUTINGS[config.routing].max_visual_tokens != 0:
        listed = ", ".join(f"{name} takes {width} features" for width, name in widths.items())
        raise SurgeryError(f"targets={list(config.targets or ())}: {listed}; one image reaches all, so name one width")
    return changes


def _plan_adapters(model: nn.Module, config: RoutingConfig, shared: dict[str, Any]) -> dict[str, nn.Module]:
    """Module name -> each adapter to register there."""
    changes: dict[str, nn.Module] = {}
    for place in adapter_places(model, config):
        if place.home not in changes:
            layer = model.get_submodule(place.layer)
            like = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
            changes[place.home] = RoutedAdapter(
                place.width,
                activation=place.activation,
                residual=place.residual,
                device=like.device,
                dtype=like.dtype,
                **shared,
            ).train(layer.training)
    return changes


def _unfreeze(model: nn.Module, config: RoutingConfig) -> None:
    for module in model.modules():
        if isinstance(module, RoutedAdapter):
            module.requires_grad_(True)
        elif isinstance(module, RoutedLoRALinear):
            for parameter in (module.lora_A, module.lora_B, module.bias if config.train_bias else None):
                if parameter is not None:
                    parameter.requires_grad_(True)
    if config.train_layer_norm:
        for norm in layer_norms(model):
            norm.requires_grad_(True)
