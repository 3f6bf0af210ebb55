"""The settings of the bottlenecks: what is trained, how it routes, and where it sits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from routingvl.config.checks import ConfigError, check_settings, setting
from routingvl.kernels import ROUTINGS
from routingvl.kernels.lora.options import PLACEMENTS

METHODS = ("lora", "adapter")
POSITIONS = ("post_module", "pre_norm", "post_norm")


@dataclass(frozen=True)
class RoutingConfig:
    """How the low-rank bottlenecks are built, and where (arXiv 2403.09377).

    Attributes:
        method: "lora" adds a bottleneck beside a projection, "adapter" puts one behind a sublayer.
        routing: the function that mixes the image into the text's activation, a name of ``routingvl.kernels.ROUTINGS``.
        rank: width r of the bottleneck, at most 16,384; GPT-2's joined query and value LoRA has 2 r components.
        alpha: LoRA output is scaled by alpha / rank (adapters are not scaled).
        dropout: probability in [0, 1) of dropping an input component, drawn separately for text and image.
        layers: indices of the transformer layers that get a bottleneck; None for all.
        targets: name endings of the projections that get LoRA; None for the family's own (query and value).
        placement: where a LoRA routes, "bottleneck" (before the up-projection) or "output" (after it).
        position: where an adapter sits, "post_module" (on the sublayer's output), "pre_norm" or "post_norm".
        relu: ReLU on both factors of vllora's inner product.
        adapter_residual: adapter adds its own input to its output; None for the family's published choice.
        train_layer_norm: train the LayerNorms inside the transformer layers.
        train_bias: train the bias of each projection that LoRA adapts.

    Raises:
        ConfigError: a value is unknown or the combination is not defined.
    """

    method: str = setting("lora", choices=METHODS)
    routing: str = setting("add", choices=ROUTINGS)
    rank: int = setting(128, least=1, most=16384)
    alpha: float = setting(128, above=0, most=1e6)
    dropout: float = setting(0.0, least=0, below=1)
    layers: tuple[int, ...] | None = setting(None, least=0)
    targets: tuple[str, ...] | None = None
    placement: str = setting("bottleneck", choices=PLACEMENTS)
    position: str = setting("post_module", choices=POSITIONS)
    relu: bool = False
    adapter_residual: bool | None = None
    train_layer_norm: bool = True
    train_bias: bool = True

    def __post_init__(self) -> None:
        check_settings(self)
        if self.relu and not ROUTINGS[self.routing].supports_relu:
            able = [name for name, row in ROUTINGS.items() if row.supports_relu]
            raise ConfigError(f"relu=True is defined for routing {', '.join(able)}, not for {self.routing!r}")
        # A setting that belongs to the other method would silently do nothing.
        other = "adapter" if self.method == "lora" else "lora"
        default = {f.name: f.default for f in dataclasses.fields(self)}
        for key in {"adapter": ("position", "adapter_residual"), "lora": ("placement", "targets")}[other]:
            if (value := getattr(self, key)) != default[key]:
                raise ConfigError(f"{key}={value!r} is defined for method={other!r} only")
