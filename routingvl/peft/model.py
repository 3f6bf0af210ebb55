"""The tuner: where PEFT's LoRA model puts routed layers, what it refuses, and how the image is attached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft import mapping
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import PeftType, hotswap
from torch import nn

from routingvl.bottlenecks.attach import attach
from routingvl.bottlenecks.beside import callable_widths
from routingvl.bottlenecks.checkpoint import PEFT_TYPE as OWN_TYPE
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.inject import check_in_memory, default_image_width
from routingvl.bottlenecks.layers import RoutedLayer
from routingvl.bottlenecks.places import LoRAPlace, lora_places, parts_outside
from routingvl.bottlenecks.projections import is_projection, projection_widths
from routingvl.bottlenecks.sources import Sources, take_off
from routingvl.config import RoutingConfig
from routingvl.config.routing import source_of
from routingvl.kernels import find_routing
from routingvl.peft.config import OwnAdapterConfig, PeftMethodError, RoutedLoraConfig, RoutedType
from routingvl.peft.layer import RoutedLinear, check_linear

HANDLE = "_routingvl_image_from"  # attribute of a model: what attach() returned
SETTINGS = (
    "routing", "relu", "placement", "slices", "image_from", "image_pooling", "text_only",
    "joined_rank", "image_projection", "image_width", "routed_by",
)  # fmt: skip


def register() -> None:
    """Write the method into PEFT's tables: of configs, tuners and parameter prefixes, and of hot-swapping's checks."""
    name = RoutedType.ROUTED_LORA
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[name] = RoutedLoraConfig
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[OWN_TYPE] = OwnAdapterConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[name] = RoutedLoraModel
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[name] = RoutedLoraModel.prefix
    hotswap.CONFIG_KEYS_TO_CHECK[name] = [*hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA], *SETTINGS]


class RoutedLoraModel(LoraModel):
    """PEFT's LoraModel with :class:`RoutedLinear` as its only layer; all layers of a model share one VisualContext."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does, and connect its layers to the model's context.

        Raises:
            PeftMethodError: the model has adapters of another method, a target cannot take a routed LoRA or has another
                input width than the image's without ``image_projection``, or adapters disagree on where the image comes
                from or how wide it is. The model is left as it was.
            BindingError: ``image_from`` names no sub-module.
            SurgeryError: weights are offloaded to the disk or the CPU; a target cannot be routed by what ``routed_by``
                says.
        """
        config = self.peft_config[adapter_name]
        attached = hasattr(model, HANDLE)
        try:
            check_in_memory(model)
            _check_neighbours(model, self.peft_config)
            source = _image_source(self.peft_config)
            own = config.image_projection == "own"
            sources = Sources(model, config.routed_by, config.routing, VisualContext(), own)
            self._settle_targets(model, config, sources)
            if source is not None and not attached:
                handle = attach(model, source[0], image_pooling=source[1], text_only=source[2])
                setattr(model, HANDLE, handle)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError:
            self.peft_config.pop(adapter_name, None)  # PEFT entered it already; transformers would count it
            if not attached:
                detach(model)
            raise
        layers = list(routed_layers(model))
        _share_projections(layers, adapter_name)
        if any(layer.routed[adapter_name].is_joined for layer in layers if adapter_name in layer.routed):
            config.joined_rank = [config.r, dict(config.rank_pattern)]
        for layer in layers:
            layer.set_context(layers[0].context)
            layer.on_delete = _Farewell(model)
            if adapter_name in layer.routed and layer.routed[adapter_name].routed_by != "image":
                layer.routed[adapter_name].context = sources.own
                sources.own.add(layer.routed[adapter_name])
        sources.connect()
        if layers:
            layers[0].context.follow(model)

    def _settle_targets(self, model: nn.Module, config: RoutedLoraConfig, sources: Sources) -> None:
        """Decide which modules ``config`` means, write that into it, and check them."""
        named = config.target_modules
        self._unasked = _unasked(model, config)
        self._prepare_adapter_config(config, self.get_model_config(model))
        _maybe_include_all_linear_layers(config, model)
        if isinstance(named, str) and not isinstance(config.target_modules, str):  # it was "all-linear"
            config.target_modules = {
                name for name in config.target_modules if self._check_target_module_exists(config, name)
            }
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        targets = {
            name: module
            for name, module in model.named_modules()
            if name and not name.startswith(inside) and self._check_target_module_exists(config, name)
        }
        known = [name for name, module in targets.items() if is_projection(module) or callable_widths(module)]
        places = lora_places(model, RoutingConfig(targets=tuple(known))) if known else []
        config.places = {place.name: place for place in places}
        widths = _input_widths(targets)
        routed = {k: width for k, width in widths.items() if not (k in config.places and config.places[k].unrouted)}
        read = {name: sources.of(name, width) for name, width in routed.items()}
        config.elsewhere = {name: of.get("image_width") for name, of in read.items() if of["routed_by"] != "image"}
        sources.check()
        first: dict[int, str] = {}  # of each width
        for name in (name for name in routed if name not in config.elsewhere):
            first.setdefault(routed[name], name)
        _settle_image(model, first if find_routing(config.routing).uses_image else {}, config)
        if config.slices == "family":
            config.slices = _family_slices(places)

    def _check_target_module_exists(self, peft_config: RoutedLoraConfig, key: str) -> Any:
        """As PEFT's, but without the parts around the text model that nobody asked for."""
        if f"{key}.".startswith(tuple(f"{part}." for part in self._unasked)):
            return False
        return LoraModel._check_target_module_exists(peft_config, key)

    @staticmethod
    def _create_new_module(config: RoutedLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        return RoutedLinear(target, adapter_name, config=config, **kwargs)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        detach(model)
        for module in model.modules():
            take_off(module)
        return model

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's, for adapters of routing "none"; those of joined rank keep it only where weights are averaged."""
        how = kwargs.get("combination_type", args[2] if len(args) > 2 else "svd")
        joined = any(layer.routed[name].is_joined for layer in routed_layers(self.model) for name in layer.routed)
        if joined and ("svd" in how or how == "cat"):
            raise PeftMethodError(
                f"combination_type={how!r} makes a new A and B, which slices of a fused projection divide between "
                "them: use 'linear', 'ties' or another that averages adapters of one rank"
            )
        for name in adapters:
            if name in self.peft_config:
                check_linear(name, find_routing(self.peft_config[name].routing), "averaged with others")
        super().add_weighted_adapter(adapters, *args, **kwargs)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        raise PeftMethodError(
            "path_initial_model_for_weight_conversion is for adapters that started from a changed base weight; no "
            "routed LoRA does: save without it"
        )


def routed_layers(model: nn.Module) -> Iterator[RoutedLinear]:
    """The layers of ``model`` with routed adapters."""
    return (module for module in model.modules() if isinstance(module, RoutedLinear))


def detach(model: nn.Module) -> None:
    """End the binding of ``image_from`` to the calls of ``model``, if there is one."""
    if hasattr(model, HANDLE):
        getattr(model, HANDLE).remove()
        delattr(model, HANDLE)


class _Farewell:
    """Ends the binding of ``image_from`` when the last adapter that has one is deleted, by whichever program.

    The layers hold it; a copy of a layer alone, or a pickled one, forgets the model.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model

    def __call__(self, adapter: str) -> None:
        model = self.model
        if not hasattr(model, HANDLE) or any(adapter in layer.routed for layer in routed_layers(model)):
            return
        if _image_source({name: config for name, config in model.peft_config.items() if name != adapter}) is None:
            detach(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Farewell:
        return _Farewell(memo.get(id(self.model)))

    def __reduce__(self):
        return _Farewell, ()


def _check_neighbours(model: nn.Module, configs: dict[str, Any]) -> None:
    """Raise if the model has adapters of another method than ours."""
    for name, config in configs.items():
        if not isinstance(config, RoutedLoraConfig):
            raise PeftMethodError(
                f"adapter {name!r} of the model is a {type(config).__name__}, and PEFT keeps one method a model: "
                "delete it, or make it a RoutedLoraConfig(routing='none'), which is the plain LoRA"
            )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, RoutedLinear):
            raise PeftMethodError(f"{name} is PEFT's {type(module).__name__} already: unload that adapter first")


def _image_source(configs: dict[str, RoutedLoraConfig]) -> tuple[Any, str, str | None] | None:
    """image_from, image_pooling and text_only of the adapters, which must agree; None: all are bound by hand."""
    routed = [config for config in configs.values() if find_routing(config.routing).uses_image]
    routed = [config for config in routed if source_of(config.routed_by) != "text"]
    sources = {(c.image_from, c.image_pooling, c.text_only) for c in routed if c.image_from is not None}
    if len(sources) > 1:
        raise PeftMethodError(
            f"the adapters {', '.join(configs)} differ in image_from, image_pooling or text_only: one image reaches "
            "all adapters of a model"
        )
    return next(iter(sources), None)


def _unasked(model: nn.Module, config: RoutedLoraConfig) -> tuple[str, ...]:
    """Parts of the model that stay as they are: around the text model, unless ``target_modules`` spells their name."""
    parts = parts_outside(model)
    if isinstance(config.image_from, str):
        parts.append(config.image_from)
    named = config.target_modules or ()
    named = [named] if isinstance(named, str) else named
    return tuple(part for part in parts if not any(part.rpartition(".")[2] in target for target in named))


def _input_widths(targets: dict[str, nn.Module]) -> dict[str, int]:
    """How many features each target takes; modules without LoRA raise."""
    widths = {}
    for name, module in targets.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, RoutedLayer):
            raise PeftMethodError(f"{name} has a bottleneck of routingvl.inject already: remove(model) takes them out")
        if (width := _input_width(base)) is None:
            raise PeftMethodError(
                f"{name} is a {type(base).__name__}: a routed LoRA stands beside projections with in_features and "
                "out_features; leave it out of target_modules, or add it to exclude_modules"
            )
        widths[name] = width
    return widths


def _settle_image(model: nn.Module, widths: dict[int, str], config: RoutedLoraConfig) -> None:
    """Decide how wide the image is and which of the targets hold projections of it, and write that into ``config``."""
    config.projecting = ()
    if not widths:
        return
    read = _width_read(model)
    if read is not None and config.image_width not in (None, read):
        raise PeftMethodError(
            f"image_width={config.image_width}: another adapter of the model reads an image of {read} features, and "
            "one image reaches all"
        )
    wide = config.image_width or read or default_image_width(model, widths)
    foreign = tuple(name for width, name in widths.items() if width != wide)
    if foreign and config.image_projection is None:
        listed = ", ".join(f"{name} takes {width} features" for width, name in widths.items())
        whose = "the image that another adapter reads has" if read is not None else "the image has"
        raise PeftMethodError(
            f"the target modules and the image differ in width: {listed}, and {whose} {wide}. Set "
            "image_projection='linear' or 'own' (and image_width, where the image has another), or leave those of "
            "another width out of target_modules (or name them in exclude_modules)"
        )
    config.projecting = foreign if config.image_projection == "linear" else ()
    if config.image_projection is not None:
        config.image_width = wide


def _width_read(model: nn.Module) -> int | None:
    """How wide the image is that adapters in ``model`` read; None: there is none that reads any."""
    for layer in routed_layers(model):
        for update in layer.routed.values():
            if update.reads_image:
                return update.image_projection.in_features if update.image_projection else update.image_width
    return None


def _share_projections(layers: list[RoutedLinear], adapter: str) -> None:
    """Have all layers of a width read the image by the projection that the first of them holds."""
    shared: dict[int, nn.Module] = {}
    for layer in layers:
        if adapter in layer.lora_project_image:
            shared[layer.in_features] = layer.lora_project_image[adapter]
        if adapter in layer.routed:
            layer.routed[adapter].project_image_by(shared.get(layer.in_features))


def _input_width(base: nn.Module) -> int | None:
    """How many features a projection of any kind takes; None for other modules."""
    if hasattr(base, "infeatures") and hasattr(base, "outfeatures"):  # auto-gptq and its kin
        return base.infeatures
    widths = projection_widths(base) if is_projection(base) else callable_widths(base)
    return None if widths is None else widths[0]


def _family_slices(places: list[LoRAPlace]) -> str | dict[str, list[list[int]]]:
    """What the families know of fused projections: {name: columns to adapt}; "family" where slices cannot say it."""
    if any(place.parts for place in places):
        return "family"
    slices = {place.name: [list(part) for part in place.slices] for place in places if place.slices is not None}
    if not slices:
        raise PeftMethodError(
            "slices='family': none of the target modules is a fused projection of a family that routingvl knows; leave "
            "slices out, or give the columns as {name: [[start, stop], ...]}"
        )
    by_ending = {name.rpartition(".")[2]: parts for name, parts in slices.items()}
    alike = all(by_ending[name.rpartition(".")[2]] == parts for name, parts in slices.items())
    return by_ending if alike else slices
