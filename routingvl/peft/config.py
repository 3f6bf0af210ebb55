"""The settings of a routed LoRA in PEFT, and what of PEFT's own settings cannot go with it."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig

from routingvl.config import ConfigError
from routingvl.config.routing import check_routed_by, source_of
from routingvl.kernels import ABLATIONS, ROUTINGS, find_routing
from routingvl.kernels.attention import ATTENTION
from routingvl.kernels.lora.options import PLACEMENTS
from routingvl.peft.card import write_note

POOLINGS = ("mean", "tokens", "nearest")
TEXT_ONLY = (None, "skip", "zero")
PROJECTIONS = (None, "linear", "own")
INITS = (True, False, "gaussian")

_VARIANT = "it is another formula for the update, and the routing function is one already"
_BASE = "it starts from a changed base weight, which holds for x Wᵀ + s x Aᵀ Bᵀ and not once the image is routed in"
# Field of LoraConfig -> why a routed LoRA cannot have it.
REFUSED = {
    "use_dora": "it rescales the merged weight, and a routed update depends on the image: there is no merged weight",
    "use_qalora": _VARIANT,
    "lora_bias": "a bias in B would be added without having met the image; bias='lora_only' trains the base's own",
    "megatron_config": "Megatron's parallel layers split the bottleneck, in which the image is routed as a whole",
    "target_parameters": "a bare parameter has no input to route the image with; name modules in target_modules",
    "loftq_config": _BASE,
    "corda_config": _BASE,
    "lora_ga_config": _BASE,
    "eva_config": "it takes A from the text's activations alone, and A projects the image too",
}
REFUSED_INITS = {
    "eva": REFUSED["eva_config"],
    "orthogonal": "B would not start at 0, so the model would not start as its base",
    "mica": _VARIANT,
}


class PeftMethodError(ValueError):
    """A routed LoRA cannot do in PEFT what was asked; the message names the setting or layer and the way out."""


class RoutedType(str, enum.Enum):
    """The method's name in PEFT's files; an enumeration because PEFT asks for ``.value``."""

    ROUTED_LORA = "ROUTED_LORA"


@dataclass
class RoutedLoraConfig(LoraConfig):
    """LoRA whose bottleneck the image is routed into: PEFT's LoraConfig and what :class:`RoutingConfig` adds to it.

    r, lora_alpha, lora_dropout, target_modules, rank_pattern and so on mean what they mean in PEFT. The image reaches
    the layers by ``image_from``, or by ``with routingvl.bind_image(model, features)`` around the call.

    Attributes:
        routing: a name of ``routingvl.kernels.ROUTINGS`` (or ``ABLATIONS``); "none" is PEFT's own LoRA.
        relu: ReLU on both factors of vllora's inner product.
        placement: where it routes, "bottleneck" (before the up-projection) or "output" (after it).
        slices: adapt some output columns of a fused projection only, with a joined rank: {name: [[start, stop], ...]},
            names as in ``rank_pattern``. "family" takes what routingvl knows of the model's family (query and value of
            GPT-2's c_attn); None adapts all columns.
        image_from: where the image's features come from in every call: the name of a module of the model, or a function
            of the call's keyword arguments; see ``routingvl.attach``. A function is not saved. None: bound by hand.
        image_pooling: with image_from, "mean" of a row's visual tokens, all "tokens" (vllora), or the mean of the image
            that is "nearest" before each token of the text.
        text_only: with image_from, what a row without an image gets: None is an error, "skip" the base model's output,
            "zero" an image of zeros.
        image_projection: "linear" trains one nn.Linear from the image's width to each input width of the targets that
            is another, shared by the layers of that width; "own" trains a down-projection of the image in every layer,
            beside A, whatever the image's width; None makes such a target an error.
        image_width: how wide the image's features are; None: what other adapters of the model read, else the width of
            all targets, or of the text model where they differ. With image_projection it is saved as found.
        routed_by: what stands in the image's place: "image" itself; in a decoder that reads an encoder's states
            "encoder" (their mean) or "encoder_tokens" (all of them); in an encoder "text" or "text_tokens".
        joined_rank: r and rank_pattern, where slices share a rank; hot-swapping may not change it then.
        registered_by: for who finds the file: the import that makes PEFT know the method.

    Raises:
        PeftMethodError: a setting of PEFT cannot go with a routed LoRA (the reason is given), or a value is unknown.
    """

    routing: str = "add"
    relu: bool = False
    placement: str = "bottleneck"
    slices: str | dict[str, list[list[int]]] | None = None
    image_from: str | Callable[[dict[str, Any]], Any] | None = None
    image_pooling: str = "mean"
    text_only: str | None = "skip"
    image_projection: str | None = None
    image_width: int | None = None
    routed_by: str = "image"
    joined_rank: list[Any] | None = None
    registered_by: str = "import routingvl.peft"

    def __post_init__(self) -> None:
        _refuse(self)
        super().__post_init__()
        self.peft_type = RoutedType.ROUTED_LORA
        # No settings, but what the tuner finds out: about the target modules, by name, which of them hold the
        # projection of the image to their width, and which are routed by something else, with how wide that is.
        self.places, self.projecting, self.elsewhere = {}, (), {}
        if self.routing == ATTENTION.name:
            raise PeftMethodError(
                "routing='attention' has weights of its own, which PEFT's LoRA has no place for: put it in with "
                "routingvl.inject"
            )
        for key, known in (
            ("routing", (*ROUTINGS, *ABLATIONS)), ("placement", PLACEMENTS), ("image_pooling", POOLINGS),
            ("text_only", TEXT_ONLY), ("image_projection", PROJECTIONS), ("init_lora_weights", INITS),
        ):  # fmt: skip
            if (value := getattr(self, key)) not in known:
                raise PeftMethodError(f"{key}={value!r} is not one of {', '.join(map(repr, known))}")
        row = find_routing(self.routing)
        if self.relu and not row.supports_relu:
            able = [name for name, other in ROUTINGS.items() if other.supports_relu]
            raise PeftMethodError(f"relu=True is defined for routing {', '.join(able)}, not for {self.routing!r}")
        if self.image_projection == "own" and not row.uses_image:
            raise PeftMethodError(
                f"image_projection='own' projects the image, which routing {self.routing!r} does not read"
            )
        if self.image_pooling == "tokens" and row.max_visual_tokens == 1:
            raise PeftMethodError(
                f"image_pooling='tokens' gives several visual tokens and routing {self.routing!r} takes one: use 'mean'"
            )
        try:
            check_routed_by(self.routed_by, self.routing)
        except ConfigError as error:
            raise PeftMethodError(str(error)) from error
        if self.image_from is not None and source_of(self.routed_by) == "text":
            raise PeftMethodError(f"image_from= brings an image, and with routed_by={self.routed_by!r} none is read")
        if not (self.slices in (None, "family") or isinstance(self.slices, dict)):
            raise PeftMethodError(f"slices={self.slices!r} is not None, 'family' or {{name: [[start, stop], ...]}}")
        if self.image_width is not None and (type(self.image_width) is not int or self.image_width < 1):
            raise PeftMethodError(f"image_width={self.image_width!r} is not None or a number of features")
        if not (self.image_from is None or isinstance(self.image_from, str) or callable(self.image_from)):
            raise PeftMethodError(f"image_from={self.image_from!r} is neither a module's name nor a function")

    def to_dict(self) -> dict[str, Any]:
        """The settings that go into adapter_config.json; an ``image_from`` that is a function becomes null."""
        settings = dataclasses.replace(self, image_from=None) if callable(self.image_from) else self
        return super(RoutedLoraConfig, settings).to_dict()

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into the model card which import opens the adapter."""
        if callable(self.image_from):
            warnings.warn(
                "image_from is a function, which adapter_config.json cannot hold: after loading, call "
                "routingvl.attach(model, function)",
                stacklevel=2,
            )
        super().save_pretrained(save_directory, **kwargs)
        write_note(save_directory)


class OwnAdapterConfig(PeftConfig):
    """Stands in PEFT's table for adapters that routingvl saved in its own format, to say what opens them."""

    def __init__(self, *, opened: str = "this folder", **kwargs: Any) -> None:
        raise PeftMethodError(
            f"{opened} is an adapter in routingvl's own format, not PEFT's: open it with "
            "routingvl.load_adapter(model, folder), or with from_pretrained of the routingvl model that saved it"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any) -> OwnAdapterConfig:
        """Raise PeftMethodError."""
        return cls(opened=str(pretrained_model_name_or_path))


def _refuse(config: RoutedLoraConfig) -> None:
    """Raise for what PEFT offers and a routed LoRA cannot have."""
    init = config.init_lora_weights
    if isinstance(init, str) and init != "gaussian":
        reason = REFUSED_INITS.get(init.lower(), _BASE)
        raise PeftMethodError(f"init_lora_weights={init!r} cannot be used with a routed LoRA: {reason}")
    for setting in dataclasses.fields(config):
        reason = REFUSED.get(setting.name, _VARIANT if setting.metadata.get("is_lora_variant") else None)
        if reason is not None and getattr(config, setting.name):
            raise PeftMethodError(f"{setting.name} cannot be used with a routed LoRA: {reason}")
