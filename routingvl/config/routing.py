"""The settings of the bottlenecks: what is trained, how it routes, and where it sits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from routingvl.config.checks import ConfigError, check_choice, check_settings, check_value, setting
from routingvl.kernels import ROUTINGS, Routing
from routingvl.kernels.attention import ATTENTION, FUNCTIONS, find_function
from routingvl.kernels.lora.options import PLACEMENTS

METHODS = ("lora", "adapter")
POSITIONS = ("post_module", "pre_norm", "post_norm")
IMAGE_PROJECTIONS = ("linear", "own")
TWO_STEP = ("before", "after", "residual")  # where the second step down stands: before routing or after it
DECODER_ATTENTIONS = ("both", "self", "cross")
BOTTLENECK_DTYPES = ("float32", "model")
# What a bottleneck is routed by -> what of it: "image", the "text" that it is in, or the states of an "encoder".
ROUTED_BY = {
    name: name.removesuffix("_tokens") for name in ("image", "text", "text_tokens", "encoder", "encoder_tokens")
}
POOLED = ("text", "encoder")  # by one token, the mean of all that are no padding
ALL_LINEAR = "all-linear"
T = TypeVar("T")


# Settings that came after the format of saved adapters, which leave them out where they are what all were before.
NEWER = ("routed_by", "two_step", "heads", "decoder_attention")


def named(patterns: Iterable[str], name: str) -> bool:
    """Whether one of ``patterns`` is the module's dotted name, the end of it from a dot on, or a regular expression
    for the whole of it.
    """
    return any(name == p or name.endswith(f".{p}") or re.fullmatch(p, name) for p in patterns)


def source_of(routed_by: str) -> str:
    """What a value of ``routed_by`` is made of: "image", "text" or "encoder"; ConfigError for one that is none."""
    check_choice("routed_by", routed_by, ROUTED_BY)
    return ROUTED_BY[routed_by]


def check_routed_by(routed_by: str, routing: str) -> None:
    """Raise ConfigError unless ``routed_by`` is known, and something for this routing function."""
    source, row = source_of(routed_by), find_function(routing)
    if source == "image":
        return
    if not row.uses_image:
        raise ConfigError(f"routed_by={routed_by!r}: routing {routing!r} is routed by nothing")
    if routed_by not in POOLED and row.max_visual_tokens == 1:
        raise ConfigError(
            f"routed_by={routed_by!r} gives several tokens and routing {routing!r} takes one: use "
            f"routed_by={source!r}, their mean"
        )


def saved_settings(config: RoutingConfig) -> dict[str, Any]:
    """What a saved adapter holds of ``config``."""
    defaults = {f.name: f.default for f in dataclasses.fields(config)}
    kept = dataclasses.asdict(config)
    return {key: value for key, value in kept.items() if key not in NEWER or value != defaults[key]}


def by_pattern(values: dict[str, T] | None, name: str, default: T) -> T:
    """The value of the first pattern in ``values`` that fits a module's name as in :func:`named`, else ``default``."""
    return next((value for pattern, value in (values or {}).items() if named([pattern], name)), default)


@dataclass(frozen=True)
class RoutingConfig:
    """How the low-rank bottlenecks are built, and where (arXiv 2403.09377).

    Attributes:
        method: "lora" adds a bottleneck beside a projection, "adapter" puts one behind a sublayer.
        routing: the function that mixes the image into the text's activation, a name of ``routingvl.kernels.ROUTINGS``;
            for comparisons also one of ``ABLATIONS``, or "attention", low-rank cross-attention with weights of its own.
        rank: width r of the bottleneck, at most 16,384; GPT-2's joined query and value LoRA has 2 r components.
        alpha: LoRA output is scaled by alpha / rank (adapters are not scaled).
        dropout: probability in [0, 1) of dropping an input component, drawn separately for text and image.
        layers: indices of the transformer layers that get a bottleneck; None for all.
        targets: the projections that get LoRA, each by its name, the end of it, or a regular expression for the whole
            of it; ``all-linear`` for every one in the transformer layers; None for the family's own (query and value).
        exclude: those that do not, in the same way.
        rank_pattern: {name, end of a name or regular expression: rank} for bottlenecks with another one.
        alpha_pattern: the same for alpha; None leaves alpha as it is.
        image_projection: "linear" trains one projection of the image for each input width that is not the image's;
            "own" gives the image a down-projection of its own in every bottleneck, whatever its width; None projects it
            by the text's, and makes a target of another width an error.
        train_modules: further modules to train whole (heads), named as in ``targets``.
        bottleneck_dtype: "float32" holds all that trains in float32 over half-precision weights, "model" as the model.
        routed_by: what stands in the image's place: "image" itself; "text", the mean of the layer's own input over
            positions that are no padding, or "text_tokens", all of them (encoders only); in a decoder that reads an
            encoder's states "encoder", their mean, or "encoder_tokens", all of them, while the encoder's own layers
            are routed by the image.
        two_step: down-projections in two steps, to a quarter of the rank and up to it, for text and image each (an
            ablation): "before" routing goes up, "after" it, or "residual", after it and a LayerNorm of it plus the
            text's; None for one step.
        heads: of routing "attention"; they divide its width, a quarter of the rank (for all slices together).
        decoder_attention: which attention of a decoder that reads an encoder's states gets bottlenecks, "both", its own
            ("self") or that to the encoder ("cross"); other layers and adapters behind feed-forward parts stay as ever.
        placement: where a LoRA routes, "bottleneck" (before the up-projection) or "output" (after it).
        position: where an adapter sits, "post_module" (on the sublayer's output), "pre_norm" or "post_norm".
        relu: ReLU on both factors of vllora's inner product.
        adapter_residual: adapter adds its own input to its output; None for the family's published choice.
        train_layer_norm: train the LayerNorms and RMSNorms inside the transformer layers.
        train_bias: train the bias of each projection that LoRA adapts.

    Raises:
        ConfigError: a value is unknown or the combination is not defined.
    """

    method: str = setting("lora", choices=METHODS)
    routing: str = setting("add", choices=FUNCTIONS)
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
    exclude: tuple[str, ...] | None = None
    rank_pattern: dict | None = None
    alpha_pattern: dict | None = None
    image_projection: str | None = setting(None, choices=IMAGE_PROJECTIONS)
    train_modules: tuple[str, ...] | None = None
    bottleneck_dtype: str = setting("float32", choices=BOTTLENECK_DTYPES)
    routed_by: str = setting("image", choices=ROUTED_BY)
    two_step: str | None = setting(None, choices=TWO_STEP)
    heads: int = setting(4, least=1, most=1024)
    decoder_attention: str = setting("both", choices=DECODER_ATTENTIONS)

    def __post_init__(self) -> None:
        for key in ("targets", "exclude", "train_modules"):
            if isinstance(value := getattr(self, key), str):
                object.__setattr__(self, key, (value,))
        check_settings(self)
        self._check_patterns()
        if self.relu and not self.function.supports_relu:
            able = [name for name, row in ROUTINGS.items() if row.supports_relu]
            raise ConfigError(f"relu=True is defined for routing {', '.join(able)}, not for {self.routing!r}")
        check_routed_by(self.routed_by, self.routing)
        self._check_two_step()
        if self.targets is not None and self.decoder_attention != "both":
            raise ConfigError(
                f"decoder_attention={self.decoder_attention!r} chooses among a family's own places: with targets, name "
                "the projections of one attention there"
            )
        # A setting that belongs to the other method would silently do nothing.
        other = "adapter" if self.method == "lora" else "lora"
        default = {f.name: f.default for f in dataclasses.fields(self)}
        for key in {
            "adapter": ("position", "adapter_residual"),
            "lora": ("placement", "targets", "exclude", "alpha_pattern"),
        }[other]:
            if (value := getattr(self, key)) != default[key]:
                raise ConfigError(f"{key}={value!r} is defined for method={other!r} only")

    @property
    def function(self) -> Routing:
        """The routing function's row, or what stands for attention."""
        return find_function(self.routing)

    @property
    def reads_image(self) -> bool:
        """Whether the image reaches some bottleneck: routed by an encoder's states, that encoder's own are."""
        return self.function.uses_image and source_of(self.routed_by) != "text"

    @property
    def has_own_projection(self) -> bool:
        """Whether each bottleneck has a down-projection for the image alone."""
        return self.image_projection == "own" or self.two_step is not None or self.function is ATTENTION

    def _check_two_step(self) -> None:
        attends = self.function is ATTENTION
        if self.heads != 4 and not attends:
            raise ConfigError(f"heads={self.heads} is defined for routing='attention' only")
        if self.image_projection == "own" and not self.function.uses_image:
            raise ConfigError(
                f"image_projection='own' projects the image, which routing {self.routing!r} does not read"
            )
        if not (attends or self.two_step is not None):
            return
        what = "routing='attention'" if attends else f"two_step={self.two_step!r}"
        if attends and self.two_step is not None:
            raise ConfigError(f"two_step={self.two_step!r} is for routing functions: attention has its own way down")
        if not self.function.uses_image:
            raise ConfigError(f"{what} projects the image, which routing {self.routing!r} does not read")
        if self.image_projection == "linear":
            raise ConfigError(f"{what} projects an image of any width: leave image_projection='linear' out")
        if self.placement != "bottleneck":
            raise ConfigError(f"{what} is in the bottleneck, so placement={self.placement!r} is not defined for it")
        for rank in (self.rank, *(self.rank_pattern or {}).values()):
            if rank < 4:
                raise ConfigError(f"{what} goes down to a quarter of the rank, so rank={rank} must be at least 4")

    def _check_patterns(self) -> None:
        for key in ("targets", "exclude", "train_modules", "rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, key) or ():
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise ConfigError(f"{key}: {pattern!r} is no name and no regular expression: {error}") from error
        limits = {f.name: f.metadata["limits"] for f in dataclasses.fields(self) if f.name in ("rank", "alpha")}
        for key, kind in (("rank", int), ("alpha", float)):
            for pattern, value in (getattr(self, f"{key}_pattern") or {}).items():
                check_value(f"{key}_pattern[{pattern!r}]", value, (kind,), {"limits": limits[key]})
