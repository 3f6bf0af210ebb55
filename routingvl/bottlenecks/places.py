"""Where bottlenecks stand in a model: its transformer layers, and the projections, sublayers and norms inside them.

Nothing here changes a model; ``inject.py`` puts the bottlenecks at the places found. What is known of each kind of
language model is data, in ``families.py``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from routingvl.backbones.loading import model_type
from routingvl.bottlenecks.families import ACTIVATIONS, FAMILIES, Family, Projection
from routingvl.bottlenecks.layers import is_projection, projection_widths
from routingvl.config import RoutingConfig


class SurgeryError(ValueError):
    """The bottlenecks cannot be put into (or taken out of) this model; the message says what was looked for."""


@dataclass(frozen=True)
class LoRAPlace:
    """A projection to adapt.

    Attributes:
        name: of the module in the model.
        slices: (start, stop) of the output columns to adapt, see
            :class:`~routingvl.bottlenecks.layers.RoutedLoRALinear`; None for all.
    """

    name: str
    slices: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class AdapterPlace:
    """A module to hang an adapter on.

    Attributes:
        home: name under which the model registers the adapter; places with the same home share one.
        at: name of the module that it hangs on: the sublayer's last, or its norm.
        norm: name of the sublayer's norm, as wide as the adapter.
        activation: a name of ``routingvl.kernels.ACTIVATIONS``.
        residual: whether the adapter adds its own input.
    """

    home: str
    at: str
    norm: str
    activation: str
    residual: bool


def lora_places(model: nn.Module, config: RoutingConfig) -> list[LoRAPlace]:
    """The projections of ``model`` to adapt: those that ``config.targets`` names, else the family's.

    Raises:
        SurgeryError: none matches (the nearest names are listed), a layer index does not exist, or the family is not
            known and no targets are named.
    """
    family = _family(model)
    _check_layers(model, family, config)
    places = []
    for name, projection in _projections(model, family, config):
        base = model.get_submodule(name)
        if not is_projection(base):
            raise SurgeryError(f"{name} is a {type(base).__name__}; LoRA stands beside nn.Linear or Conv1D")
        places.append(LoRAPlace(name, _slices(base, projection)))
    if not places:
        raise SurgeryError(_no_match(model, config))
    return places


def adapter_places(model: nn.Module, config: RoutingConfig) -> list[AdapterPlace]:
    """The modules of ``model`` to hang adapters on.

    Raises:
        SurgeryError: the family is not known, has no place for adapters at ``config.position``, or uses an activation
            that adapters lack; a layer index does not exist; or the model has no layers of the family's name.
    """
    family = _family(model)
    _check_layers(model, family, config)
    if family is None:
        raise SurgeryError(
            f"{_unknown_family(model)}, so the places of its adapters are not known: add an entry there, "
            "or use method='lora' with targets=[...]"
        )
    behind = config.position == "post_module"
    if behind and any(sublayer.output is None for sublayer in family.sublayers):
        raise SurgeryError(
            f"not every sublayer of {family.model_type!r} ends in a dropout module, where an adapter can stand: "
            "use position='pre_norm' or 'post_norm'"
        )
    activation = getattr(model.config, family.activation_key)
    if activation not in ACTIVATIONS:
        raise SurgeryError(f"activation {activation!r} has no routed adapter; known: {', '.join(ACTIVATIONS)}")
    residual = config.adapter_residual
    if residual is None:
        residual = family.adapter_residual or not behind
    places = []
    for index, layer in _layers_of(model, family).items():
        if config.layers is not None and index not in config.layers:
            continue
        for sublayer in family.sublayers:
            home = ".".join(part for part in (layer, sublayer.adapter_home, "adapter") if part)
            norm = f"{layer}.{sublayer.norm}"
            at = f"{layer}.{sublayer.output}" if behind else norm
            places.append(AdapterPlace(home, at, norm, ACTIVATIONS[activation], residual))
    if not places:
        raise SurgeryError(f"{type(model).__name__} has no layers called {family.layer.format('*')}")
    return places


def layer_norms(model: nn.Module) -> Iterator[nn.LayerNorm]:
    """The LayerNorms inside the transformer layers of ``model``."""
    family = _family(model)
    inside = tuple(f"{name}." for name in _layers_of(model, family).values()) if family is not None else None
    for name, module in model.named_modules():
        within = name.startswith(inside) if inside is not None else _layer_index(name) is not None
        if isinstance(module, nn.LayerNorm) and within:
            yield module


def _family(model: nn.Module) -> Family | None:
    return FAMILIES.get(model_type(model))


def _unknown_family(model: nn.Module) -> str:
    return f"model type {model_type(model)!r} is not in routingvl.bottlenecks.families ({', '.join(FAMILIES)})"


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


def _slices(base: nn.Module, projection: Projection) -> tuple[tuple[int, int], ...] | None:
    """The adapted column ranges of a projection that gives several results at once; None for all columns."""
    if projection.parts == 1:
        return None
    width = projection_widths(base)[1] // projection.parts
    return tuple((part * width, (part + 1) * width) for part in projection.adapted)


def _no_match(model: nn.Module, config: RoutingConfig) -> str:
    names = [name for name, module in model.named_modules() if is_projection(module)]
    # A target may have been meant to be a whole name or its last one or two parts.
    endings = list(dict.fromkeys(".".join(name.split(".")[-depth:]) for depth in (1, 2, 99) for name in names))
    targets = config.targets or ()
    near = [hit for target in targets for hit in difflib.get_close_matches(target, endings, n=3, cutoff=0.3)]
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(names[:6]) or "none: the model has no nn.Linear or Conv1D"
    return f"targets={list(targets)} match no projection of {type(model).__name__}; nearest: {listed}"
