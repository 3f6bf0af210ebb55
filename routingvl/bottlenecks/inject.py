"""Put routed bottlenecks into a language model and freeze the rest; take them out again."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from torch import nn

from routingvl.backbones.loading import model_type
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.families import ACTIVATIONS, FAMILIES, Family, Projection
from routingvl.bottlenecks.layers import (
    AdaptedDropout,
    AdaptedLayerNorm,
    RoutedAdapter,
    RoutedLayer,
    RoutedLoRALinear,
    is_projection,
    projection_widths,
)
from routingvl.bottlenecks.report import TrainableReport, trainable_report
from routingvl.config import RoutingConfig
from routingvl.kernels import ROUTINGS


class SurgeryError(ValueError):
    """The bottlenecks cannot be put into (or taken out of) this model; the message says what was looked for."""


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
    family = FAMILIES.get(model_type(model))
    _check_layers(model, family, config)
    plan = _plan_lora if config.method == "lora" else _plan_adapters
    shared = {"context": context, "backend": backend}
    shared |= {key: getattr(config, key) for key in ("rank", "routing", "dropout", "relu")}
    changes = plan(model, family, config, shared)
    # Everything was built before anything is touched, so an error leaves the model as it was.
    model.requires_grad_(False)
    for name, module in changes.items():
        _replace(model, name, module)
    _unfreeze(model, family, config)
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
        if isinstance(module, RoutedLoRALinear | AdaptedDropout | AdaptedLayerNorm):
            _replace(model, name, module.restore())
        elif isinstance(module, RoutedAdapter):
            home, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(home), attribute)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the sub-module called ``name``, which need not exist yet."""
    home, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(home), attribute, module)


def _layers_of(model: nn.Module, family: Family) -> dict[int, str]:
    """The name of each transformer layer of ``family`` in ``model``, by index."""
    pattern = re.compile(r"(?:.*\.)?" + re.escape(family.layer).replace(r"\{\}", r"(\d+)"))
    found = ((pattern.fullmatch(name), name) for name, _ in model.named_modules())
    return {int(match.group(1)): name for match, name in found if match}


def _layer_index(name: str) -> int | None:
    """The first number among the parts of a module's name: its layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _check_layers(model: nn.Module, family: Family | None, config: RoutingConfig) -> None:
    if family is not None:
        known = set(_layers_of(model, family))
    else:
        known = {_layer_index(name) for name, _ in model.named_modules()} - {None}
    if absent := [index for index in config.layers or () if index not in known]:
        raise SurgeryError(f"layers={list(config.layers)}: the model has no layer {absent}; it has {sorted(known)}")


def _unknown_family(model: nn.Module) -> str:
    return f"model type {model_type(model)!r} is not in routingvl.bottlenecks.families ({', '.join(FAMILIES)})"


def _plan_lora(model, family, config, shared) -> dict[str, nn.Module]:
    """Module name -> replacement for each projection to adapt."""
    changes = {}
    for name, projection in _projections(model, family, config):
        base = model.get_submodule(name)
        if not is_projection(base):
            raise SurgeryError(f"{name} is a {type(base).__name__}; LoRA stands beside nn.Linear or Conv1D")
        slices = _slices(base, projection)
        changes[name] = RoutedLoRALinear(base, alpha=config.alpha, placement=config.placement, slices=slices, **shared)
    if not changes:
        raise SurgeryError(_no_match(model, config))
    widths = {change.lora_A.shape[-1]: name for name, change in changes.items()}
    if len(widths) > 1 and ROUTINGS[config.routing].max_visual_tokens != 0:
        listed = ", ".join(f"{name} takes {width} features" for width, name in widths.items())
        raise SurgeryError(f"targets={list(config.targets or ())}: {listed}; one image reaches all, so name one width")
    return changes


def _projections(model, family, config) -> Iterator[tuple[str, Projection]]:
    """Names of the projections to adapt, with what the family knows of each."""
    known = family.projections if family is not None else ()
    if config.targets is None:
        if family is None:
            raise SurgeryError(f"{_unknown_family(model)}: name the projections to adapt with targets=[...]")
        for index, layer in _layers_of(model, family).items():
            if config.layers is None or index in config.layers:
                yield from ((f"{layer}.{projection.name}", projection) for projection in known)
        return
    for name, module in model.named_modules():
        wanted = any(name == target or name.endswith(f".{target}") for target in config.targets)
        if wanted and is_projection(module) and (config.layers is None or _layer_index(name) in config.layers):
            yield name, next((p for p in known if name.endswith(f".{p.name}")), Projection(name))


def _slices(base: nn.Module, projection: Projection) -> list[tuple[int, int]] | None:
    """The adapted column ranges of a projection that gives several results at once; None for all columns."""
    if projection.parts == 1:
        return None
    width = projection_widths(base)[1] // projection.parts
    return [(part * width, (part + 1) * width) for part in projection.adapted]


def _no_match(model: nn.Module, config: RoutingConfig) -> str:
    names = [name for name, module in model.named_modules() if is_projection(module)]
    # A target may have been meant to be a whole name or its last one or two parts.
    endings = list(dict.fromkeys(".".join(name.split(".")[-depth:]) for depth in (1, 2, 99) for name in names))
    targets = config.targets or ()
    near = [hit for target in targets for hit in difflib.get_close_matches(target, endings, n=3, cutoff=0.3)]
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(names[:6]) or "none: the model has no nn.Linear or Conv1D"
    return f"targets={list(targets)} match no projection of {type(model).__name__}; nearest: {listed}"


def _plan_adapters(model, family, config, shared) -> dict[str, nn.Module]:
    """Module name -> replacement for each adapter and for each module it is hung on."""
    if family is None:
        raise SurgeryError(
            f"{_unknown_family(model)}, so the places of its adapters are not known: add an entry there, "
            "or use method='lora' with targets=[...]"
        )
    if config.position == "post_module" and any(sublayer.output is None for sublayer in family.sublayers):
        raise SurgeryError(
            f"not every sublayer of {family.model_type!r} ends in a dropout module, where an adapter can stand: "
            "use position='pre_norm' or 'post_norm'"
        )
    activation_name = getattr(model.config, family.activation_key)
    if activation_name not in ACTIVATIONS:
        raise SurgeryError(f"activation {activation_name!r} has no routed adapter; known: {', '.join(ACTIVATIONS)}")
    residual = config.adapter_residual
    if residual is None:
        residual = family.adapter_residual or config.position != "post_module"
    changes: dict[str, nn.Module] = {}
    for index, layer in _layers_of(model, family).items():
        if config.layers is not None and index not in config.layers:
            continue
        for sublayer in family.sublayers:
            home = ".".join(part for part in (layer, sublayer.adapter_home, "adapter") if part)
            norm = model.get_submodule(f"{layer}.{sublayer.norm}")
            if home not in changes:
                changes[home] = RoutedAdapter(
                    norm.normalized_shape[0],
                    activation=ACTIVATIONS[activation_name],
                    residual=residual,
                    device=norm.weight.device,
                    dtype=norm.weight.dtype,
                    **shared,
                ).train(norm.training)
            if config.position == "post_module":
                output = model.get_submodule(f"{layer}.{sublayer.output}")
                changes[f"{layer}.{sublayer.output}"] = AdaptedDropout(output, changes[home])
            else:
                changes[f"{layer}.{sublayer.norm}"] = AdaptedLayerNorm(norm, changes[home], config.position)
    if not changes:
        raise SurgeryError(f"{type(model).__name__} has no layers called {family.layer.format('*')}")
    return changes


def _unfreeze(model: nn.Module, family: Family | None, config: RoutingConfig) -> None:
    for module in model.modules():
        if isinstance(module, RoutedAdapter):
            module.requires_grad_(True)
        elif isinstance(module, RoutedLoRALinear):
            for parameter in (module.lora_A, module.lora_B, module.bias if config.train_bias else None):
                if parameter is not None:
                    parameter.requires_grad_(True)
    if config.train_layer_norm:
        inside = tuple(f"{name}." for name in _layers_of(model, family).values()) if family is not None else None
        for name, module in model.named_modules():
            within = name.startswith(inside) if inside is not None else _layer_index(name) is not None
            if isinstance(module, nn.LayerNorm) and within:
                module.requires_grad_(True)
