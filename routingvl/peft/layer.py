"""A projection with routed LoRAs beside it, one per adapter, in PEFT's form."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear
from peft.utils.other import get_pattern_key
from torch import nn

from routingvl.bottlenecks.beside import LoRAUpdate
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.projections import is_conv1d, is_projection
from routingvl.bottlenecks.sharding import is_sharded
from routingvl.kernels.routing import Routing
from routingvl.peft.config import PeftMethodError, RoutedLoraConfig


class AdapterUpdate(LoRAUpdate):
    """What one adapter adds to a layer's output; its weights, scaling and dropout stay where PEFT keeps them."""

    def __init__(self, layer: RoutedLinear, adapter: str, rank: int, **options: Any) -> None:
        widths = layer.in_features, layer.out_features
        super().__init__(widths, rank, partial(layer.weights_of, adapter), context=layer.context, **options)
        self._layer, self.adapter = (layer,), adapter  # in a tuple: not a sub-module

    @property
    def is_joined(self) -> bool:
        """Whether several parts of the output share its rank, so that rows of A and B have their places in it."""
        return self.groups > 1 or self.parts is not None or self.columns is not None

    def joint_options(self, v: torch.Tensor) -> dict[str, Any] | None:
        """See :class:`~routingvl.bottlenecks.layers.RoutedLayer`; only adapters that run are projected with others."""
        (layer,) = self._layer
        self.refresh()
        runs = self.adapter in layer.active_adapters and not layer.disable_adapters
        return super().joint_options(v) if runs else None

    def to_own_width(self, v: torch.Tensor) -> torch.Tensor:
        """See :class:`~routingvl.bottlenecks.layers.RoutedLayer`; PeftMethodError where the projection is not whole."""
        projection = self.image_projection
        if projection is not None and is_sharded(projection.weight) and not is_sharded(self.projection[0]):
            raise PeftMethodError(
                "image_projection: FSDP2 shards the layers one by one, and the first of a width holds the projection "
                "that the others use: shard the model as a whole, fully_shard(model)"
            )
        return super().to_own_width(v)

    def refresh(self) -> AdapterUpdate:
        """Itself, with what PEFT may have changed since the last call: scaling, dropout and mode."""
        (layer,) = self._layer
        drop = layer.lora_dropout[self.adapter]
        self.scaling = float(layer.scaling[self.adapter])
        self.dropout, self.training = getattr(drop, "p", 0.0), drop.training
        return self


class _Weights(nn.ModuleDict):
    """A or B of each adapter.

    Those of a joined rank keep their shape, since PEFT would pad them at their end; and those beside a down-projection
    of the image's own, which PEFT would not pad.
    """

    def __init__(self, updates: dict[str, AdapterUpdate]) -> None:
        super().__init__()
        self.updates = updates

    def __setitem__(self, adapter: str, linear: nn.Module) -> None:
        fixed = adapter in self.updates and (self.updates[adapter].is_joined or self.updates[adapter].has_own)
        if fixed and linear.weight.shape != self[adapter].weight.shape:
            raise PeftMethodError(
                f"adapter {adapter!r} cannot be padded to another rank: slices of a fused projection (or text and "
                f"image with image_projection='own') share its rank {self.updates[adapter].rank}; leave target_rank "
                "out, and hot-swap adapters of this rank"
            )
        super().__setitem__(adapter, linear)


class RoutedLinear(Linear):
    """PEFT's LoRA layer, which calls its base layer, whatever that is, and adds the active adapters' routed updates.

    The same class stands beside plain, quantised and foreign projections. ``lora_project_image`` holds, in the first
    layer of each width that is not the image's, the adapter's projection to that width, and ``lora_A_image`` the
    image's own down-projection of adapters that have one.
    """

    adapter_layer_names = (*Linear.adapter_layer_names, "lora_project_image", "lora_A_image")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RoutedLoraConfig, **kwargs: Any) -> None:
        # nn.Module's own attributes do not exist yet, and update_layer runs inside PEFT's constructor.
        self.__dict__.update(routed={}, context=VisualContext(), on_delete=None)
        super().__init__(base_layer, adapter_name, config, **kwargs)
        base = self.get_base_layer()
        self.is_target_conv_1d_layer = self.fan_in_fan_out = is_conv1d(base)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: RoutedLoraConfig, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does; with slices, of joined rank G*r."""
        if not isinstance(config, RoutedLoraConfig):
            raise PeftMethodError(
                f"adapter {adapter_name!r} is a {type(config).__name__} and the model has routed adapters: PEFT cannot "
                "keep both; use RoutedLoraConfig(routing='none'), which is the plain LoRA"
            )
        target = kwargs.get("target_name", "")
        if not hasattr(self, "lora_project_image"):  # this runs inside PEFT's constructor
            self.lora_project_image, self.lora_A_image = nn.ModuleDict(), nn.ModuleDict()
            self.lora_A, self.lora_B = _Weights(self.routed), _Weights(self.routed)
        self.routed.pop(adapter_name, None)  # one of that name is replaced
        if target in config.projecting:
            self.lora_project_image[adapter_name] = nn.Linear(config.image_width, self.in_features)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        update = AdapterUpdate(self, adapter_name, r, placement=config.placement, **_options(config, target))
        if update.is_joined:
            rows = update.groups * update.width if update.parts is None else sum(update.parts.sizes)
            self.lora_A[adapter_name] = nn.Linear(self.in_features, update.groups * r, bias=False)
            self.lora_B[adapter_name] = nn.Linear(r, rows, bias=False)
            self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        if update.has_own:
            self.lora_A_image[adapter_name] = own = nn.Linear(update.image_width, update.groups * r, bias=False)
            if config.init_lora_weights == "gaussian":  # as A; else both are what nn.Linear draws
                nn.init.normal_(own.weight, std=1 / r)
        self.routed[adapter_name] = update
        if not (update.is_joined or update.has_own):
            return
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def resolve_lora_variant(self, *, config: RoutedLoraConfig, **kwargs: Any) -> None:
        """None: variants are refused by the config."""
        return None

    def set_context(self, context: VisualContext) -> None:
        """Read the image from ``context`` from now on."""
        self.context = context
        for update in self.routed.values():
            if update.routed_by == "image":
                update.context = context
                context.add(update)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, as PEFT does."""
        super().delete_adapter(adapter_name)
        self.routed.pop(adapter_name, None)
        if self.on_delete is not None:
            self.on_delete(adapter_name)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., K] (three dimensions when an image is routed in) -> y [..., N] in the base layer's dtype."""
        names = kwargs.get("adapter_names")
        if names is None and self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("adapter_names", "alora_offsets")}
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        if names is not None:
            return self._add_by_row(y.clone(), x, names)
        for name in self.active_adapters:
            if name in self.routed and name not in self.merged_adapters:
                y = self.routed[name].refresh()(x, y)
        return y.to(dtype)

    def _add_by_row(self, y: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """y [B, T, N] with each row's adapter added, in place; names [B], each row meets its own image."""
        for name in dict.fromkeys(names):
            if (update := self.routed.get(name)) is None:
                continue
            rows = [row for row, other in enumerate(names) if other == name]
            index = torch.tensor(rows, device=x.device)
            with update.context.rows(index, of=len(names)):
                y[index] = update.refresh()(x[index], y[index]).to(y.dtype)
        return y

    def weights_of(self, adapter: str) -> tuple[torch.Tensor, ...]:
        """A [G*R, K], B [G*n, R] and, where the image has its own down-projection, A_v [G*R, K_v] of an adapter."""
        shared = (self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        return (*shared, self.lora_A_image[adapter].weight) if adapter in self.lora_A_image else shared

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters of routing "none" into a plain weight.

        Raises:
            PeftMethodError: an adapter is routed, or the base layer's weight is not a plain one.
        """
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name not in self.routed:
                continue
            check_linear(name, self.routed[name].routing, "merged into the weight")
            base = self.get_base_layer()
            if not (is_projection(base) and base.weight.is_floating_point()):
                raise PeftMethodError(f"adapter {name!r} cannot be merged into a {type(base).__name__}")
        super().merge(safe_merge, adapter_names)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What an adapter of routing "none" adds to the weight, in the weight's layout."""
        update = self.routed[adapter]
        check_linear(adapter, update.routing, "written as a change of the weight")
        if update.columns is None and update.parts is None:
            return super().get_delta_weight(adapter)
        # The update is linear in x, so that of the unit vectors is the matrix; slices need no second definition.
        a = update.projection[0]
        units = torch.eye(self.in_features, device=a.device, dtype=a.dtype)[None]
        update.refresh().dropout = 0.0  # a change of the weight has none, whatever the mode
        delta = update(units, units.new_zeros(1, self.in_features, self.out_features))[0]
        return delta if self.fan_in_fan_out else delta.T

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a plain LoRA: routing "none"."""
        return adapter_name not in self.routed or not self.routed[adapter_name].routing.uses_image


def check_linear(adapter: str, routing: Routing, done: str) -> None:
    """Raise PeftMethodError if what ``adapter`` adds depends on the image, so that it cannot be ``done``."""
    if routing.uses_image:
        raise PeftMethodError(
            f"adapter {adapter!r} routes the image in ({routing.name}): what it adds differs from image to image, so "
            f"it cannot be {done}; an adapter of routing 'none' can"
        )


def _options(config: RoutedLoraConfig, target: str) -> dict[str, Any]:
    """Routing, relu and the output columns of the bottleneck at the module called ``target``."""
    place = config.places.get(target)
    options = {"routing": config.routing, "relu": config.relu}
    if target in config.elsewhere:
        options["routed_by"] = config.routed_by
    if config.image_projection == "own":
        options |= {"image_projection": "own"}
        options["image_width"] = config.elsewhere.get(target, config.image_width)
    if place is not None and place.unrouted:
        options = {"routing": "none", "relu": False}
    if isinstance(config.slices, dict):
        options["slices"] = config.slices.get(get_pattern_key(config.slices.keys(), target))
    elif config.slices == "family" and place is not None:
        options |= {"slices": place.slices, "parts": place.parts}
    return options
