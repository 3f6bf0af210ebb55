"""The settings of the bottlenecks: what is trained, how it routes, and where it sits."""

from __future__ import annotations

from dataclasses import dataclass

from routingvl.config.checks import ConfigError, check_choice
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
        rank: width r of the bottleneck; GPT-2's joined query and value LoRA has 2 r components.
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

    method: str = "lora"
    routing: str = "add"
    rank: int = 128
    alpha: float = 128
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    targets: tuple[str, ...] | None = None
    placement: str = "bottleneck"
    position: str = "post_module"
    relu: bool = False
    adapter_residual: bool | None = None
    train_layer_norm: bool = True
    train_bias: bool = True

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("routing", self.routing, tuple(ROUTINGS))
        check_choice("placement", self.placement, PLACEMENTS)
        check_choice("position", self.position, POSITIONS)
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"rank={self.rank!r} must be an integer of at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"alpha={self.alpha!r} must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r} must lie in [0, 1)")
        for key in ("layers", "targets"):
            value = getattr(self, key)
            if isinstance(value, str):
                raise ConfigError(f"{key}={value!r} must be a list, such as [{value!r}]")
            if value is not None:
                if not value:
                    raise ConfigError(f"{key} is empty: nothing would be adapted; leave it out for the default")
                object.__setattr__(self, key, tuple(value))
        if self.relu and not ROUTINGS[self.routing].supports_relu:
            able = [name for name, row in ROUTINGS.items() if row.supports_relu]
            raise ConfigError(f"relu=True is defined for routing {', '.join(able)}, not for {self.routing!r}")
        self._check_method()

    def _check_method(self) -> None:
        """A setting that belongs to the other method would silently do nothing, so it is refused."""
        if self.method == "adapter":
            if self.placement != "bottleneck":
                raise ConfigError(f"placement={self.placement!r} is defined for method='lora' only")
            if self.targets is not None:
                raise ConfigError("targets chooses projections for method='lora'; adapters are placed by position")
        else:
            if self.position != "post_module":
                raise ConfigError(f"position={self.position!r} is defined for method='adapter' only")
            if self.adapter_residual is not None:
                raise ConfigError("adapter_residual is defined for method='adapter' only")

    @property
    def scaling(self) -> float:
        """The LoRA factor alpha / rank."""
        return self.alpha / self.rank
