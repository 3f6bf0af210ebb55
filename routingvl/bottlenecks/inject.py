"""Put routed bottlenecks into a language model and freeze the rest; take them out again."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from routingvl.bottlenecks.beside import RoutedLoRABeside
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.float32 import HALF, hold_in_float32, release
from routingvl.bottlenecks.layers import RoutedAdapter, RoutedLayer, RoutedLoRALinear
from routingvl.bottlenecks.places import SurgeryError, adapter_places, layer_norms, lora_places
from routingvl.bottlenecks.projections import is_dense, is_projection, projection_widths
from routingvl.bottlenecks.report import TrainableReport, trainable_report
from routingvl.bottlenecks.sharding import is_sharded
from routingvl.bottlenecks.sources import Sources, take_off
from routingvl.config import RoutingConfig
from routingvl.config.routing import by_pattern, named
from routingvl.tensor_files import listed

SHARED = ("routing", "dropout", "relu", "two_step", "heads")  # settings that every bottleneck has from the config
PROJECTIONS = "image_projections"  # nn.ModuleDict of the model: {input width: nn.Linear from the image's}


@dataclass
class Injection:
    """One call of :func:`inject`, kept as ``model.routed_injections`` on the model that it was called with.

    Attributes:
        config: what was built.
        image_width: d of the features that it reads.
        originals: what the trained parameters of the model itself (norms, biases, heads) held before.
    """

    config: RoutingConfig
    image_width: int
    originals: dict[str, torch.Tensor] = field(default_factory=dict)


def inject(
    model: nn.Module,
    config: RoutingConfig,
    context: VisualContext | None = None,
    backend: str | None = None,
    *,
    image_width: int | None = None,
) -> TrainableReport:
    """Freeze ``model`` and give it routed bottlenecks, in place.

    Afterwards these train, and nothing else: the bottlenecks, the bias of each projection that LoRA adapts
    (``train_bias``), the norms inside the transformer layers (``train_layer_norm``), ``train_modules`` and the
    projections of the image (``image_projection``). What trains is held in float32, and cast to the model's type where
    it is used (``bottleneck_dtype``).

    A model can be injected several times, into places apart from each other: what earlier calls left training goes on.

    Args:
        model: a language model of transformers (or one that contains it). A family of ``bottlenecks/families.py`` knows
            its own places; any other model needs ``config.targets`` and method "lora". Vision towers are left out.
        config: what to build, and where.
        context: where the bottlenecks read the image from; None takes that of an earlier injection, or makes a new
            one. Bind it around the model's call.
        backend: None, "eager" or "triton" for every bottleneck, see :func:`routingvl.kernels.lora.api`.
        image_width: d of the image's features; None: that of an earlier injection, else the width of all targets, or
            of the text model where they differ.

    Returns:
        What trains, which backend runs each bottleneck, and which targets were skipped.

    Raises:
        SurgeryError: no module matches (the nearest names are listed), a layer index does not exist, a place has a
            bottleneck already, an input width is not the image's, or weights are not in memory.
    """
    check_in_memory(model)
    earlier = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    context = _shared_context(earlier) if context is None else context
    plan = _plan_lora if config.method == "lora" else _plan_adapters
    shared = {"backend": backend} | {key: getattr(config, key) for key in SHARED}
    skipped: list[str] = []
    sources = Sources(model, config.routed_by, config.routing, context, config.has_own_projection)
    if sources.has_own:
        sources.image_width = image_width = _image_width(model, _input_widths(model, config), image_width)
    changes = plan(model, config, shared, sources, skipped)
    sources.check()
    _check_patterns(config, changes)
    heads = _modules_to_train(model, config)
    width, projections = _image_projections(model, config, changes, image_width)
    # Everything was built before anything is touched, so an error leaves the model as it was.
    context.follow(model)
    sources.connect()
    if not earlier:
        model.requires_grad_(False)
    trained_before = {id(p) for p in model.parameters() if p.requires_grad}
    for name, module in changes.items():
        _replace(model, name, module)
    if config.method == "adapter":
        for place in adapter_places(model, config):
            changes[place.home].hang_on(model.get_submodule(place.at), before=config.position == "pre_norm")
    if projections:
        model.add_module(PROJECTIONS, nn.ModuleDict({**getattr(model, PROJECTIONS, {}), **projections}))
    _unfreeze(model, config, changes, heads, skipped)
    ours = {id(p) for module in (*changes.values(), *projections.values()) for p in _own_parameters(module)}
    record = Injection(config, width)
    ours |= trained_before
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            record.originals[name] = parameter.detach().clone()
    model.routed_injections = [*getattr(model, "routed_injections", ()), record]
    if config.bottleneck_dtype == "float32":
        train_in_float32(model)
    return dataclasses.replace(trainable_report(model), skipped=tuple(skipped))


def check_in_memory(model: nn.Module) -> None:
    """Raise :class:`SurgeryError` for a model whose weights accelerate keeps on the disk or the CPU until they run."""
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False)):
            raise SurgeryError(
                f"the weights of {name} are offloaded (device_map with disk or cpu), so nothing can be built beside "
                "them: add the bottlenecks first, then call accelerate.dispatch_model or cpu_offload"
            )


def remove(model: nn.Module) -> None:
    """Take every routed bottleneck out again, in place; trained norms, biases and heads stay as they are.

    Parameters held in float32 are rounded to the model's type.

    Raises:
        SurgeryError: the model has none.
    """
    modules = list(model.named_modules())
    if not any(isinstance(module, RoutedLayer) for _, module in modules):
        raise SurgeryError("the model has no routed bottlenecks to remove")
    for _, module in modules:
        release(module)
        take_off(module)
    for name, module in modules:
        if isinstance(module, RoutedLoRALinear | RoutedLoRABeside):
            _replace(model, name, module.restore())
        elif isinstance(module, RoutedAdapter):
            module.take_off()
            home, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(home), attribute)
        if hasattr(module, "routed_injections"):
            del module.routed_injections
            if hasattr(module, PROJECTIONS):
                delattr(module, PROJECTIONS)


@contextlib.contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Inside the ``with`` block ``model`` is the model that it was before :func:`inject`, bit for bit.

    Trained norms, biases and heads hold what they held then, and no image needs to be bound. It is so for all threads.

    Raises:
        SurgeryError: the model has no routed bottlenecks, or FSDP2 shards it.
    """
    routed = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    if not routed:
        raise SurgeryError("the model has no routed bottlenecks to disable")
    if any(map(is_sharded, model.parameters())):
        raise SurgeryError("a model that FSDP2 shards cannot be had without its bottlenecks: use an unsharded copy")
    undo = contextlib.ExitStack()
    with torch.no_grad(), undo:
        for holder in model.modules():
            own = dict(holder.named_parameters()) if hasattr(holder, "routed_injections") else {}
            for injection in getattr(holder, "routed_injections", ()):
                for name, value in injection.originals.items():
                    undo.callback(setattr, own[name], "data", own[name].data)
                    own[name].data = value.to(own[name].device)
        for layer in routed:
            undo.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
        undo = undo.pop_all()
    with undo:
        yield


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the sub-module called ``name``, which need not exist yet."""
    home, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(home), attribute, module)


def _plan_lora(
    model: nn.Module, config: RoutingConfig, shared: dict[str, Any], sources: Sources, skipped: list[str]
) -> dict[str, nn.Module]:
    """Module name -> replacement for each projection to adapt."""
    changes = {}
    passed: list[tuple[str, str]] = []
    for place in lora_places(model, config, passed):
        base = model.get_submodule(place.name)
        _check_free(place.name, base)
        options = {
            "rank": by_pattern(config.rank_pattern, place.name, config.rank),
            "alpha": by_pattern(config.alpha_pattern, place.name, config.alpha),
            "placement": config.placement,
            "slices": place.slices,
            "parts": place.parts,
        }
        unrouted = {"context": sources.context, "routing": "none", "relu": False, "two_step": None}
        routed = shared | (unrouted if place.unrouted else sources.of(place.name, projection_widths(base)[0]))
        make = partial(RoutedLoRALinear if is_dense(base) else RoutedLoRABeside, base)
        changes[place.name] = _made(make, place.name, dtype=_bottleneck_dtype(base, config), **options, **routed)
    skipped += [f"{name}: {why}" for name, why in passed]
    if config.layers is None:
        skipped += _left_out(model, config, changes)
    return changes


def _left_out(model: nn.Module, config: RoutingConfig, changes: Mapping[str, nn.Module]) -> list[str]:
    """Projections that the targets fit, in parts of the model that stay as they are."""
    names = [
        name
        for name, module in model.named_modules()
        if named(config.targets or (), name) and is_projection(module) and name not in changes
    ]
    names = [name for name in names if not named(config.exclude or (), name)]
    return [f"{listed(names)}: outside of the language model; a target that names the part reaches it"] if names else []


def _plan_adapters(
    model: nn.Module, config: RoutingConfig, shared: dict[str, Any], sources: Sources, skipped: list[str]
) -> dict[str, nn.Module]:
    """Module name -> each adapter to register there."""
    changes: dict[str, nn.Module] = {}
    for place in adapter_places(model, config):
        home, _, attribute = place.home.rpartition(".")
        _check_free(place.home, getattr(model.get_submodule(home), attribute, None))
        if place.home not in changes:
            layer = model.get_submodule(place.layer)
            like = next(parameter for parameter in layer.parameters() if parameter.is_floating_point())
            changes[place.home] = _made(
                RoutedAdapter,
                place.home,
                width=place.width,
                activation=place.activation,
                residual=place.residual,
                rank=by_pattern(config.rank_pattern, place.home, config.rank),
                device=like.device,
                dtype=_bottleneck_dtype(layer, config),
                **shared,
                **sources.of(place.home, place.width),
            ).train(layer.training)
    return changes


def _made(make: Callable[..., nn.Module], name: str, **options: Any) -> nn.Module:
    """The bottleneck at the module called ``name``; SurgeryError where it cannot have these options."""
    try:
        return make(**options)
    except ValueError as error:
        raise SurgeryError(f"{name}: {error}") from error


def _check_free(name: str, module: nn.Module) -> None:
    if isinstance(module, RoutedLayer):
        raise SurgeryError(
            f"{name} has a routed bottleneck already: inject into other places (targets=, exclude=, layers=), or call "
            "routingvl.bottlenecks.inject.remove(model) first"
        )


def _shared_context(routed: list[RoutedLayer]) -> VisualContext:
    """The context of the bottlenecks that are there; a new one where there are none."""
    known = (layer.context for layer in routed if layer.context is not None and layer.context.source == "image")
    contexts = list({id(context): context for context in known}.values())
    if len(contexts) > 1:
        raise SurgeryError("earlier injections read the image from several contexts: pass context= to say which")
    return contexts[0] if contexts else VisualContext()


def _bottleneck_dtype(like: nn.Module, config: RoutingConfig) -> torch.dtype:
    """Of the bottleneck at a module: float32 beside half precision and quantised weights, unless the config says so."""
    found = [t.dtype for t in (*like.parameters(), *like.buffers()) if t.dtype in (torch.float64, torch.float32, *HALF)]
    if not found or (found[0] in HALF and config.bottleneck_dtype == "float32"):
        return torch.float32
    return found[0]


def _check_patterns(config: RoutingConfig, changes: Mapping[str, nn.Module]) -> None:
    names = [name for name, module in changes.items() if isinstance(module, RoutedLayer)]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, key) or ():
            if not any(named([pattern], name) for name in names):
                raise SurgeryError(f"{key}: {pattern!r} fits none of the bottlenecks, which are {listed(names)}")


def _modules_to_train(model: nn.Module, config: RoutingConfig) -> list[nn.Module]:
    found = []
    for pattern in config.train_modules or ():
        modules = [module for name, module in model.named_modules() if name and named([pattern], name)]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        if not parameters:
            near = difflib.get_close_matches(pattern, [name for name, _ in model.named_modules()], n=3, cutoff=0.3)
            raise SurgeryError(f"train_modules: {pattern!r} fits no module with weights; nearest: {listed(near)}")
        if not all(parameter.is_floating_point() for parameter in parameters):
            raise SurgeryError(f"train_modules: {pattern!r} is quantised, and such weights cannot be trained")
        found += modules
    return found


def _image_projections(
    model: nn.Module, config: RoutingConfig, changes: Mapping[str, nn.Module], image_width: int | None
) -> tuple[int, dict[str, nn.Module]]:
    """The image's width, and the new projections to other widths, which the layers of ``changes`` already know."""
    layers = {name: module for name, module in changes.items() if isinstance(module, RoutedLayer)}
    widths = {layer.image_width: name for name, layer in layers.items()}
    image_width = _image_width(model, widths, image_width)
    reading = {name: layer for name, layer in layers.items() if layer.reads_image}
    known, made = dict(getattr(model, PROJECTIONS, {})), {}
    for name, layer in reading.items():
        width = layer.image_width
        if width == image_width:
            continue
        if config.image_projection is None:
            raise SurgeryError(
                f"{name} takes {width} features; one image reaches all, so name one width, the image's "
                f"({image_width}), or set image_projection='linear' or 'own'"
            )
        if (key := str(width)) not in known:
            device, dtype = layer.projection[0].device, layer.projection[0].dtype
            known[key] = made[key] = nn.Linear(image_width, width, device=device, dtype=dtype)
        layer.project_image_by(known[key])
    return image_width, made


def _input_widths(model: nn.Module, config: RoutingConfig) -> set[int]:
    """K of every place that gets a bottleneck."""
    if config.method == "adapter":
        return {place.width for place in adapter_places(model, config)}
    return {projection_widths(model.get_submodule(place.name))[0] for place in lora_places(model, config)}


def _image_width(model: nn.Module, widths: Collection[int], given: int | None) -> int:
    earlier = {injection.image_width for injection in getattr(model, "routed_injections", ())}
    if earlier and given is not None and given not in earlier:
        raise SurgeryError(f"image_width={given}: an earlier injection reads features of width {min(earlier)}")
    if given is not None or earlier:
        return given or min(earlier)
    return default_image_width(model, widths)


def default_image_width(model: nn.Module, widths: Collection[int]) -> int:
    """How wide the image is when nobody says so: as the inputs of all targets, or as the text where those differ."""
    if len(widths) == 1:
        return next(iter(widths))
    return text_width(model) or min(widths)


def text_width(model: nn.Module) -> int | None:
    """How wide the states of the text model are, by its config; None where that does not say."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "hidden_size", None)


def _own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """Those that came with an injection: the bottleneck's, or all of an adapter and of a projection of the image."""
    if isinstance(module, RoutedLoRALinear | RoutedLoRABeside):
        yield from module.projection
    else:
        yield from module.parameters()


def _unfreeze(
    model: nn.Module,
    config: RoutingConfig,
    changes: Mapping[str, nn.Module],
    heads: Sequence[nn.Module],
    skipped: list[str],
) -> None:
    for name, module in changes.items():
        for parameter in _own_parameters(module):
            parameter.requires_grad_(True)
        bias = module.bias if config.train_bias and config.method == "lora" else None
        if bias is not None and isinstance(module, RoutedLoRABeside) and not _trains(module.base_layer):
            skipped.append(f"{name}: its bias stays frozen, since the layer is quantised")
        elif bias is not None:
            bias.requires_grad_(True)
    for module in (*(layer_norms(model) if config.train_layer_norm else ()), *heads):
        module.requires_grad_(True)


def _trains(base: nn.Module) -> bool:
    """Whether the bias of a called layer can train: its weights are plain numbers, and its own."""
    return all(type(p) is nn.Parameter and p.is_floating_point() for p in (base.weight, base.bias))


def train_in_float32(model: nn.Module) -> None:
    """Hold everything that trains in float32; modules see their own parameters in the type that these had.

    Of ``model``'s own: what is in float32 already, or held so, stays as it is.
    """
    owners = []
    for module in model.modules():
        half = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad and p.dtype in HALF}
        if half:
            owners.append((module, half, {name: parameter.dtype for name, parameter in half.items()}))
    for module, half, seen in owners:  # all found before the first changes: they may share a parameter
        if isinstance(module, RoutedLayer):  # casts in each call
            for parameter in half.values():
                parameter.data = parameter.data.float()
        else:
            hold_in_float32(module, seen)
