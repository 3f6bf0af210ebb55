"""Where bottlenecks stand in a model: its transformer layers, and the projections, sublayers and norms inside them.

Nothing here changes a model; ``inject.py`` puts the bottlenecks at the places found. What is known of each kind of
language model is data, in ``families.py``. A model may hold its language model inside, as vision-language models do:
then that is where bottlenecks go, and what is outside of it is left alone unless a target spells its name.
"""

from __future__ import annotations

import difflib
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from routingvl.backbones.loading import model_type
from routingvl.bottlenecks.beside import callable_widths
from routingvl.bottlenecks.families import ACTIVATIONS, FAMILIES, Family, Projection
from routingvl.bottlenecks.layers import RoutedLayer
from routingvl.bottlenecks.projections import is_projection, projection_widths
from routingvl.config import RoutingConfig
from routingvl.config.routing import ALL_LINEAR, named


class SurgeryError(ValueError):
    """The bottlenecks cannot be put into (or taken out of) this model; the message says what was looked for."""


@dataclass(frozen=True)
class LoRAPlace:
    """A projection to adapt.

    Attributes:
        name: of the module in the model.
        slices: (start, stop) of the output columns to adapt, equally wide; None for all, or where ``parts`` says.
        parts: the output columns of each adapted part, where they are not equally wide or lie scattered.
        unrouted: it is also called with another batch than the text's, so that its LoRA must leave the image out.
    """

    name: str
    slices: tuple[tuple[int, int], ...] | None = None
    parts: tuple[tuple[int, ...], ...] | None = None
    unrouted: bool = False


@dataclass(frozen=True)
class AdapterPlace:
    """A module to hang an adapter on.

    Attributes:
        home: name under which the model registers the adapter; places with the same home share one.
        at: name of the module that it hangs on: the sublayer's last, or its norm.
        layer: name of the transformer layer.
        width: of the adapter's input and output.
        activation: a name of ``routingvl.kernels.ACTIVATIONS``.
        residual: whether the adapter adds its own input.
    """

    home: str
    at: str
    layer: str
    width: int
    activation: str
    residual: bool


@dataclass(frozen=True)
class _Layer:
    """A transformer layer: its index in its stack, its name in the model, and what is known of it."""

    index: int
    name: str
    module: nn.Module
    family: Family
    config: Any  # the text model's

    def has(self, name: str | None, optional: bool) -> bool:
        """Whether the layer has a sub-module; an error where one that is not optional is missing."""
        try:
            self.module.get_submodule(name or "")
        except AttributeError:
            if optional:
                return False
            raise SurgeryError(
                f"{self.name} has no {name}, which models of type {self.family.model_type!r} have by "
                "routingvl.bottlenecks.families: correct that row, or use method='lora' with targets=[...]"
            ) from None
        return True

    @property
    def reads_encoder(self) -> bool:
        """Whether the layer has cross-attention beside its self-attention."""
        return any(self.has(projection.name, True) for projection in self.family.projections if projection.cross)

    def takes(self, attention: str, wanted: str) -> bool:
        """Whether bottlenecks of "self" or "cross" attention, or "" neither, are ``wanted`` in this layer."""
        return wanted == "both" or attention in ("", wanted) or not self.reads_encoder


def text_models(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of ``model`` whose kind has a row in ``FAMILIES``, by name; "" is ``model`` itself."""
    if model_type(model) in FAMILIES:
        return {"": model}
    children = ((name, text_models(child)) for name, child in model.named_children())
    return {_join(name, inner): text for name, found in children for inner, text in found.items()}


def parts_outside(model: nn.Module) -> list[str]:
    """Names of the outermost parts of ``model`` that stay as they are unless a target spells the part's own name.

    Around text models of known kinds that is everything; elsewhere what reads images alone or is called vision.
    """
    texts = text_models(model)
    parts = []

    def visit(prefix: str, parent: nn.Module) -> None:
        for child_name, child in parent.named_children():
            name = _join(prefix, child_name)
            if texts:
                apart = not any(text == name or text.startswith(f"{name}.") for text in texts)
            else:
                apart = child_name.startswith(("vision", "visual")) or _reads_images_alone(child)
            if apart:
                parts.append(name)
            elif name not in texts:
                visit(name, child)

    if "" not in texts:
        visit("", model)
    return parts


def lora_places(
    model: nn.Module, config: RoutingConfig, skipped: list[tuple[str, str]] | None = None
) -> list[LoRAPlace]:
    """The projections of ``model`` to adapt: those that ``config.targets`` names, else the family's.

    "all-linear" is every projection inside the transformer layers; other targets are read by
    :func:`routingvl.config.routing.named`, and so is ``config.exclude``. A projection may have a bottleneck already.

    Args:
        skipped: is given the name of each module that a target names and LoRA cannot stand beside, and why.

    Raises:
        SurgeryError: none matches (the nearest names are listed), a layer index does not exist, or the family is not
            known and no targets are named.
    """
    _check_layers(model, config)
    places = []
    for name, projection, text_config in _projections(model, config, skipped):
        base = model.get_submodule(name)
        if _widths(base) is None:
            raise SurgeryError(f"{name} is a {type(base).__name__}; LoRA stands beside nn.Linear or Conv1D")
        unrouted = projection.unrouted
        if isinstance(unrouted, str):
            unrouted = bool(getattr(text_config, unrouted, False))
        places.append(LoRAPlace(name, *_columns(base, projection, text_config), unrouted))
    if not places:
        raise SurgeryError(_no_match(model, config))
    if config.targets is not None and (apart := [place.name for place in places if place.unrouted]):
        warnings.warn(
            f"LoRA on {_listed(apart)} leaves the image out (routing 'none'): this model also calls it with another "
            "batch than the text's",
            stacklevel=3,
        )
    return places


def adapter_places(model: nn.Module, config: RoutingConfig) -> list[AdapterPlace]:
    """The modules of ``model`` to hang adapters on, in the order in which they run within a layer's sublayers.

    Raises:
        SurgeryError: the family is not known, has no place for adapters at ``config.position``; a layer index does not
            exist; or the model has no layers of the family's name.
    """
    _check_layers(model, config)
    if not (texts := text_models(model)):
        raise SurgeryError(
            f"{_unknown_family(model)}, so the places of its adapters are not known: add an entry there, "
            "or use method='lora' with targets=[...]"
        )
    behind, places = config.position == "post_module", {}
    for layer in _layers(model, config.layers):
        family = layer.family
        if behind and any(sublayer.output is None for sublayer in family.sublayers):
            raise SurgeryError(
                f"not every sublayer of {family.model_type!r} ends in a module, where an adapter can stand: "
                "use position='pre_norm' or 'post_norm'"
            )
        residual = config.adapter_residual
        if residual is None:
            residual = family.adapter_residual or not behind
        activation = ACTIVATIONS.get(getattr(layer.config, family.activation_key, None), "gelu")
        for sublayer in family.sublayers:
            inside = sublayer.output if behind else sublayer.norm
            wanted = layer.takes(sublayer.attention, config.decoder_attention)
            if wanted and layer.has(inside, sublayer.optional):
                home, at = _join(layer.name, sublayer.adapter_home, "adapter"), _join(layer.name, inside)
                place = AdapterPlace(home, at, layer.name, layer.config.hidden_size, activation, residual)
                places.setdefault(at, place)
    if not places:
        names = {family.layer.format("*") for family in map(_family, texts.values())}
        raise SurgeryError(f"{type(model).__name__} has no layers called {' or '.join(names)}")
    return list(places.values())


def layer_norms(model: nn.Module) -> Iterator[nn.Module]:
    """The LayerNorms and RMSNorms inside the transformer layers of ``model``, those of vision towers left out."""
    inside = _inside_layers(model)
    for name, module in model.named_modules():
        if inside(name) and is_norm(module):
            yield module


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a LayerNorm or RMSNorm with weights, by class or by its class's name."""
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return (named or isinstance(module, nn.LayerNorm)) and isinstance(getattr(module, "weight", None), nn.Parameter)


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _family(model: nn.Module) -> Family:
    return FAMILIES[model_type(model)]


def _unknown_family(model: nn.Module) -> str:
    return f"model type {model_type(model)!r} is not in routingvl.bottlenecks.families ({', '.join(FAMILIES)})"


def _layers(model: nn.Module, indices: tuple[int, ...] | None = None) -> Iterator[_Layer]:
    """The transformer layers of every stack of every text model, or those of these indices."""
    for prefix, text in text_models(model).items():
        family = _family(text)
        pattern = re.compile(r"(?:.*\.)?" + re.escape(family.layer).replace(r"\{\}", r"(\d+)"))
        for name, module in text.named_modules():
            match = pattern.fullmatch(name)
            if match and (indices is None or int(match.group(1)) in indices):
                yield _Layer(int(match.group(1)), _join(prefix, name), module, family, text.config)


def _layer_index(name: str) -> int | None:
    """The first number among the parts of a module's name: its layer, in a model of no known kind."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _inside_layers(model: nn.Module) -> Callable[[str], bool]:
    """Whether a module of this name stands inside a transformer layer."""
    if text_models(model):
        layers = tuple(f"{layer.name}." for layer in _layers(model))
        return lambda name: name.startswith(layers)
    outside = tuple(f"{part}." for part in parts_outside(model))
    return lambda name: _layer_index(name) is not None and not name.startswith(outside)


def _check_layers(model: nn.Module, config: RoutingConfig) -> None:
    if config.decoder_attention != "both" and not any(layer.reads_encoder for layer in _layers(model)):
        raise SurgeryError(
            f"decoder_attention={config.decoder_attention!r} is for decoders with cross-attention, as BART's and T5's, "
            f"and {type(model).__name__} has none that routingvl.bottlenecks.families knows"
        )
    if config.layers is None:
        return
    known = {layer.index for layer in _layers(model)}
    if not text_models(model):
        known = {_layer_index(name) for name, _ in model.named_modules()} - {None}
    if absent := [index for index in config.layers if index not in known]:
        raise SurgeryError(f"layers={list(config.layers)}: the model has no layer {absent}; it has {sorted(known)}")


def _reads_images_alone(module: nn.Module) -> bool:
    """Whether a model of transformers says so."""
    modalities = getattr(type(module), "input_modalities", ())
    modalities = {modalities} if isinstance(modalities, str) else set(modalities)
    return bool(modalities) and modalities <= {"image", "video"}


def _projections(
    model: nn.Module, config: RoutingConfig, skipped: list[tuple[str, str]] | None
) -> Iterator[tuple[str, Projection, Any]]:
    """Names of the projections to adapt, with what the family knows of each and the text model's config."""
    exclude = config.exclude or ()
    layers = list(_layers(model, config.layers))
    if config.targets is None:
        if not text_models(model):
            raise SurgeryError(f"{_unknown_family(model)}: name the projections to adapt with targets=[...]")
        for layer in layers:
            for projection in (p for p in layer.family.projections if p.default):
                name = _join(layer.name, projection.name)
                wanted = layer.takes("cross" if projection.cross else "self", config.decoder_attention)
                if wanted and layer.has(projection.name, projection.optional) and not named(exclude, name):
                    yield name, projection, layer.config
        return
    known = {_join(layer.name, p.name): (p, layer.config) for layer in layers for p in layer.family.projections}
    for name, module in _named_modules(model, config):
        if named(exclude, name):
            continue
        if _widths(module) is not None:
            yield name, *known.get(name, (Projection(name), None))
        elif skipped is not None and not any(module.children()):
            skipped.append((name, f"LoRA stands beside linear projections, not a {type(module).__name__}"))


def _named_modules(model: nn.Module, config: RoutingConfig) -> Iterator[tuple[str, nn.Module]]:
    """The modules that ``config.targets`` names in the layers that are asked for, but what is inside of bottlenecks."""
    targets, layers = config.targets, config.layers
    parts = parts_outside(model)
    alone = [part for part in parts if not any(part.rpartition(".")[2] in target for target in targets)]
    alone += [name for name, module in model.named_modules() if isinstance(module, RoutedLayer)]
    left_alone = tuple(f"{part}." for part in alone)
    inside, chosen = _inside_layers(model), tuple(f"{layer.name}." for layer in _layers(model, layers))
    for name, module in model.named_modules():
        if name.startswith(left_alone) or (name in alone and not isinstance(module, RoutedLayer)):
            continue
        if not (named(targets, name) or (ALL_LINEAR in targets and inside(name) and _widths(module) is not None)):
            continue
        known = chosen and inside(name)  # a layer of a family; elsewhere the first number in the name counts
        if layers is None or (name.startswith(chosen) if known else _layer_index(name) in layers):
            yield name, module


def _widths(module: nn.Module) -> tuple[int, int] | None:
    """(K, N) of a projection that LoRA can stand beside, or that has a bottleneck already; None for other modules."""
    return projection_widths(module) if is_projection(module) else callable_widths(module)


def _columns(base: nn.Module, projection: Projection, config: Any) -> tuple[tuple | None, tuple | None]:
    """(slices, parts) of :class:`LoRAPlace` for a projection that gives several results at once; None for all."""
    if projection.parts == 1:
        return None, None
    outputs = _widths(base)[1]
    repeats = getattr(config, projection.repeats) if projection.repeats else 1
    if isinstance(projection.parts, int):
        widths = (outputs // projection.parts // repeats,) * projection.parts
    else:
        widths = projection.parts(config)
    if repeats * sum(widths) != outputs:
        raise SurgeryError(f"{projection.name} has {outputs} outputs, not {repeats} x {widths}: its row is wrong")
    stops = list(itertools.accumulate(widths))
    slices = tuple((stops[part] - widths[part], stops[part]) for part in projection.adapted)
    if repeats == 1 and len({widths[part] for part in projection.adapted}) == 1:
        return slices, None
    period = sum(widths)
    columns = (
        tuple(n * period + column for n in range(repeats) for column in range(start, stop)) for start, stop in slices
    )
    return None, tuple(columns)


def _no_match(model: nn.Module, config: RoutingConfig) -> str:
    names = [name for name, module in model.named_modules() if is_projection(module)]
    # A target may have been meant to be a whole name or its last one or two parts.
    endings = list(dict.fromkeys(".".join(name.split(".")[-depth:]) for depth in (1, 2, 99) for name in names))
    targets = config.targets or ()
    near = [hit for target in targets for hit in difflib.get_close_matches(target, endings, n=3, cutoff=0.3)]
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(names[:6]) or "none: the model has no nn.Linear or Conv1D"
    return f"targets={list(targets)} match no projection of {type(model).__name__}; nearest: {listed}"
