"""Model surgery: put routed bottlenecks into a language model, freeze the rest, report what trains, undo."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from routingvl.config import RoutingConfig
from routingvl.context import VisualContext
from routingvl.families import FAMILIES, Family, Projection
from routingvl.kernels.launch import select_backend
from routingvl.kernels.routing import find_routing
from routingvl.layers import (
    AdaptedDropout,
    AdaptedLayerNorm,
    RoutedAdapter,
    RoutedLoRALinear,
    is_projection,
    projection_widths,
)

# Names of activation functions in transformers' configs, and ours.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class SurgeryError(ValueError):
    """The bottlenecks cannot be put into (or taken out of) this model; the message says what was looked for."""


@dataclass(frozen=True)
class LayerReport:
    """One routed bottleneck: its module name, kind, routing, rank, and which backend runs it, and why."""

    name: str
    kind: str
    routing: str
    rank: int
    backend: str
    reason: str


@dataclass(frozen=True)
class TrainableReport:
    """What trains after surgery.

    Attributes:
        trainable: number of trainable parameters.
        total: number of all parameters of the model given (a tied weight counts once).
        names: names of the trainable parameters.
        layers: the routed bottlenecks, in the model's order.
    """

    trainable: int
    total: int
    names: tuple[str, ...]
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        head = f"trainable {self.trainable:,} of {self.total:,} parameters ({100 * self.trainable / self.total:.2f} %)"
        width = max((len(layer.name) for layer in self.layers), default=0)
        rows = [
            f"  {layer.name:<{width}}  {layer.kind:<7}  {layer.routing:<6}  r={layer.rank:<4} "
            f"{layer.backend}: {layer.reason}"
            for layer in self.layers
        ]
        return "\n".join([head, *rows])


def inject(
    model: nn.Module, config: RoutingConfig, context: VisualContext | None = None, backend: str | None = None
) -> TrainableReport:
    """Freeze ``model`` and give it routed bottlenecks, in place.

    Afterwards these train, and nothing else: the bottlenecks, the bias of each projection that LoRA adapts
    (``train_bias``) and the LayerNorms inside the transformer layers (``train_layer_norm``).

    Args:
        model: a language model of transformers (or one that contains it). A family listed in ``routingvl.families``
            knows its own places; any other model needs ``config.targets`` and method "lora".
        config: what to build, and where.
        context: where the bottlenecks read the image from; None makes a new one. Bind it around the model's call.
        backend: None, "eager" or "triton" for every bottleneck, see :func:`routingvl.kernels.routed_lora`.

    Returns:
        What trains, and which backend runs each bottleneck.

    Raises:
        SurgeryError: no module matches (the nearest names are listed), a layer index does not exist, or the model
            has bottlenecks already.
    """
    if any(isinstance(module, RoutedLoRALinear | RoutedAdapter) for module in model.modules()):
        raise SurgeryError("the model has routed bottlenecks already: call routingvl.surgery.remove(model) first")
    context = VisualContext() if context is None else context
    family = FAMILIES.get(_model_type(model))
    _check_layers(model, family, config)
    if config.method == "lora":
        changes = _plan_lora(model, family, config, context, backend)
    else:
        changes = _plan_adapters(model, family, config, context, backend)
    # Everything was built before anything is touched, so an error leaves the model as it was.
    freeze(model)
    for name, module in changes:
        _replace(model, name, module)
        if isinstance(module, RoutedLoRALinear | RoutedAdapter):
            module.register()
    _unfreeze(model, family, config)
    return trainable_report(model)


def remove(model: nn.Module) -> None:
    """Take every routed bottleneck out again, in place; trained norms and biases stay as they are.

    Raises:
        SurgeryError: the model has none.
    """
    routed = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, RoutedLoRALinear | AdaptedDropout | AdaptedLayerNorm)
    ]
    if not routed:
        raise SurgeryError("the model has no routed bottlenecks to remove")
    for _, module in model.named_modules():
        if isinstance(module, RoutedLoRALinear | RoutedAdapter) and module.context is not None:
            module.context.forget(module)
    for name, module in routed:
        _replace(model, name, module.restore())
    for name, _ in [(n, m) for n, m in model.named_modules() if isinstance(m, RoutedAdapter)]:
        home, _, attribute = name.rpartition(".")
        delattr(model.get_submodule(home), attribute)


def freeze(model: nn.Module) -> None:
    """Stop training every parameter of ``model``."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def trainable_report(model: nn.Module, exclude: str | None = None) -> TrainableReport:
    """Count what trains in ``model``; parameters whose name starts with ``exclude`` do not count."""
    parameters = [(n, p) for n, p in model.named_parameters() if exclude is None or not n.startswith(exclude)]
    trainable = [(name, p.numel()) for name, p in parameters if p.requires_grad]
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, RoutedLoRALinear | RoutedAdapter):
            kind = "lora" if isinstance(module, RoutedLoRALinear) else "adapter"
            down = module.lora_A if kind == "lora" else module.down_sampler.weight  # [width of the code, K]
            dense = kind == "adapter" or find_routing(module.routing).probe is None
            try:
                backend, reason = select_backend(
                    down.device.type, module.backend, dtype=down.dtype, width=down.shape[0], dense=dense
                )
            except RuntimeError as error:  # a model is often built on the CPU and moved to its GPU afterwards
                backend, reason = "triton", str(error)
            layers.append(LayerReport(name, kind, module.routing, module.rank, backend, reason))
    return TrainableReport(
        trainable=sum(size for _, size in trainable),
        total=sum(p.numel() for _, p in parameters),
        names=tuple(name for name, _ in trainable),
        layers=tuple(layers),
    )


def _model_type(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


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
    if config.layers is None:
        return
    if family is not None:
        known = set(_layers_of(model, family))
    else:
        known = {_layer_index(name) for name, _ in model.named_modules()} - {None}
    absent = [index for index in config.layers if index not in known]
    if absent:
        raise SurgeryError(f"layers={list(config.layers)}: the model has no layer {absent}; it has {sorted(known)}")


def _plan_lora(model, family, config, context, backend) -> list[tuple[str, nn.Module]]:
    """(module name, replacement) for each projection to adapt."""
    changes = []
    for name, projection in _projections(model, family, config):
        base = model.get_submodule(name)
        if not is_projection(base):
            raise SurgeryError(f"{name} is a {type(base).__name__}; LoRA stands beside nn.Linear or Conv1D")
        replacement = RoutedLoRALinear(
            base,
            config.rank,
            routing=config.routing,
            alpha=config.alpha,
            dropout=config.dropout,
            relu=config.relu,
            placement=config.placement,
            slices=_slices(base, projection),
            context=context,
            backend=backend,
        )
        changes.append((name, replacement))
    if not changes:
        raise SurgeryError(_no_match(model, config))
    return changes


def _projections(model, family, config) -> Iterator[tuple[str, Projection]]:
    """Names of the projections to adapt, with what the family knows of each."""
    known = family.projections if family is not None else ()
    if config.targets is None:
        if family is None:
            raise SurgeryError(
                f"model type {_model_type(model)!r} is not in routingvl.families ({', '.join(FAMILIES)}): "
                "name the projections to adapt with targets=[...]"
            )
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
    targets = config.targets or ()
    near = [hit for target in targets for hit in difflib.get_close_matches(target, _endings(names), n=3, cutoff=0.3)]
    listed = ", ".join(dict.fromkeys(near)) or ", ".join(names[:6]) or "none: the model has no nn.Linear or Conv1D"
    return f"targets={list(targets)} match no projection of {type(model).__name__}; nearest: {listed}"


def _endings(names: list[str]) -> list[str]:
    """Every name and its last one and two parts: what a target could have been meant to be."""
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(".".join(p[-depth:]) for depth in (1, 2, 99) for p in parts))


def _plan_adapters(model, family, config, context, backend) -> list[tuple[str, nn.Module]]:
    """(module name, replacement) for each adapter and for each module it is hung on."""
    if family is None:
        raise SurgeryError(
            f"model type {_model_type(model)!r} is not in routingvl.families ({', '.join(FAMILIES)}), so the places "
            "of its adapters are not known: add an entry there, or use method='lora' with targets=[...]"
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
                    config.rank,
                    routing=config.routing,
                    activation=ACTIVATIONS[activation_name],
                    residual=residual,
                    dropout=config.dropout,
                    relu=config.relu,
                    context=context,
                    backend=backend,
                    device=norm.weight.device,
                    dtype=norm.weight.dtype,
                ).train(norm.training)
            if config.position == "post_module":
                output = model.get_submodule(f"{layer}.{sublayer.output}")
                changes[f"{layer}.{sublayer.output}"] = AdaptedDropout(output, changes[home])
            else:
                changes[f"{layer}.{sublayer.norm}"] = AdaptedLayerNorm(norm, changes[home], config.position)
    if not changes:
        raise SurgeryError(f"{type(model).__name__} has no layers called {family.layer.format('*')}")
    return list(changes.items())


def _unfreeze(model: nn.Module, family: Family | None, config: RoutingConfig) -> None:
    for module in model.modules():
        if isinstance(module, RoutedLoRALinear):
            module.lora_A.requires_grad_(True)
            module.lora_B.requires_grad_(True)
            if config.train_bias and module.bias is not None:
                module.bias.requires_grad_(True)
        elif isinstance(module, RoutedAdapter):
            module.requires_grad_(True)
    if config.train_layer_norm:
        inside = tuple(f"{name}." for name in _layers_of(model, family).values()) if family is not None else None
        for name, module in model.named_modules():
            within = name.startswith(inside) if inside is not None else _layer_index(name) is not None
            if isinstance(module, nn.LayerNorm) and within:
                module.requires_grad_(True)


def replace_modules(root: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put ``replacement(module)`` in the place of every module below ``root`` for which it is not None."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if (new := replacement(child)) is not None:
                setattr(parent, name, new)
