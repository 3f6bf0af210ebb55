"""Vision towers, a row per kind: how one is loaded, and which of its outputs the language model can see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from routingvl.backbones.loading import BackboneError, inner_model_type, load_float32, model_type

NO_POOLER = "has no pooler, which vision_features='pooler' reads: set model.vision_features=cls or mean"


def _pooler(output: Any, prefix_tokens: int) -> Tensor:
    if output.pooler_output is None:
        raise BackboneError(f"this vision tower {NO_POOLER}")
    return output.pooler_output.flatten(1)[:, None]


def _tokens(output: Any, prefix_tokens: int) -> Tensor:
    hidden = output.last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden  # a feature map [B, d, H, W], row by row


# What can be taken of a tower's output: (output of transformers, prefix tokens) -> features [B, L, d].
FEATURES: dict[str, Callable[[Any, int], Tensor]] = {
    "pooler": _pooler,
    "cls": lambda output, prefix_tokens: output.last_hidden_state[:, :1],
    "mean": lambda output, prefix_tokens: _tokens(output, 0)[:, prefix_tokens:].mean(dim=1, keepdim=True),
    "tokens": _tokens,
}
WITHOUT_CLASS_TOKEN = {kind: take for kind, take in FEATURES.items() if kind != "cls"}


@dataclass(frozen=True)
class VisionTower:
    """A kind of vision model of transformers.

    Attributes:
        model_type: ``model_type`` in its config.
        model_class: name of its class in transformers.
        prefix_tokens: tokens in front of the patches' in its last hidden state (a class token: 1), beside as many
            register tokens as its config says.
        width_key: the entry of its config that holds d, the width of its features, or a list that ends with it.
        features: what can be taken of its output, by the names of ``model.vision_features``.
        pooler: its module that makes the pooled output.
        may_lack: prefixes of the weights that a checkpoint may come without: its pooler, or what is never used.
        whole: the model types whose folders hold this tower beside a text tower.
        others: pattern of what a checkpoint may hold beside the tower: a text tower, a projection.
        image_sizes: "config" (the size that its config says), "patches" (any of whole patches) or "any".
        has_layers: its layers are all as wide as its features, so that ``model.vision_layer`` can name one.
    """

    model_type: str
    model_class: str
    prefix_tokens: int = 1
    width_key: str = "hidden_size"
    features: Mapping[str, Callable[[Any, int], Tensor]] = field(default_factory=lambda: FEATURES)
    pooler: str = "pooler"
    may_lack: tuple[str, ...] = ("pooler.",)
    whole: tuple[str, ...] = ()
    others: str = ""
    image_sizes: str = "config"
    has_layers: bool = True


_MASK_TOKEN = ("embeddings.mask_token",)  # stands for patches that are hidden in pretraining, and for none here
_TEXT_TOWER = r"text_model\..*|(visual|text)_projection\..*|logit_(scale|bias)"
_PATCHES = {"may_lack": _MASK_TOKEN, "image_sizes": "patches"}
_STAGES = {"prefix_tokens": 0, "features": WITHOUT_CLASS_TOKEN, "has_layers": False}
_CONVOLUTIONS = _STAGES | {"width_key": "hidden_sizes", "may_lack": (), "image_sizes": "any"}

TOWERS: dict[str, VisionTower] = {
    tower.model_type: tower
    for tower in (
        VisionTower("vit", "ViTModel"),
        VisionTower("deit", "DeiTModel", prefix_tokens=2),  # a distillation token beside the class token
        VisionTower("beit", "BeitModel", may_lack=_MASK_TOKEN),
        VisionTower("dinov2", "Dinov2Model", pooler="layernorm", **_PATCHES),
        VisionTower("dinov2_with_registers", "Dinov2WithRegistersModel", pooler="layernorm", **_PATCHES),
        VisionTower("dinov3_vit", "DINOv3ViTModel", pooler="norm", **_PATCHES),
        # The first of its tokens is the mean of the map.
        VisionTower(
            "dinov3_convnext", "DINOv3ConvNextModel", pooler="layer_norm", **_CONVOLUTIONS | {"prefix_tokens": 1}
        ),
        VisionTower(
            "clip_vision_model",
            "CLIPVisionModel",
            pooler="post_layernorm",
            may_lack=(),
            whole=("clip",),
            others=_TEXT_TOWER,
        ),
        VisionTower(
            "siglip_vision_model",
            "SiglipVisionModel",
            prefix_tokens=0,
            features=WITHOUT_CLASS_TOKEN,
            pooler="head",
            may_lack=(),
            whole=("siglip",),
            others=_TEXT_TOWER,
        ),
        VisionTower("swin", "SwinModel", may_lack=_MASK_TOKEN, **_STAGES),
        VisionTower("convnext", "ConvNextModel", pooler="layernorm", **_CONVOLUTIONS),
        VisionTower("resnet", "ResNetModel", **_CONVOLUTIONS),
    )
}

_NAFLEX = (
    "its NaFlex images are patches with a mask and a shape each, and all images here have one number of tokens; give a "
    "SigLIP2 of fixed resolution (google/siglip2-base-patch16-224 and the like, of model type 'siglip')"
)
REFUSED = {"siglip2": _NAFLEX, "siglip2_vision_model": _NAFLEX}


def tower_of(backbone: nn.Module | str) -> VisionTower:
    """The row of a loaded tower, or of a hub name or folder; raises :class:`BackboneError` when there is none."""
    found = model_type(backbone)
    if found in TOWERS:
        return TOWERS[found]
    what = backbone if isinstance(backbone, str) else type(backbone).__name__
    around = next((tower for tower in TOWERS.values() if found in tower.whole), None)
    if around is not None and isinstance(backbone, str):
        return around
    message = f"vision {what} is of model type {found!r}, "
    if around is not None:
        raise BackboneError(f"{message}a text tower beside a vision tower: give its .vision_model")
    if found in REFUSED:
        raise BackboneError(f"{message}which is not taken: {REFUSED[found]}")
    if inner := inner_model_type(backbone, "vision_config", "encoder"):
        raise BackboneError(
            f"{message}a whole model around a vision tower ({inner!r}): save that tower alone in a folder, with the "
            "preprocessor_config.json, and give the folder"
        )
    known = ", ".join(map(repr, [*TOWERS, *(name for tower in TOWERS.values() for name in tower.whole)]))
    raise BackboneError(f"{message}which is no vision tower known here ({known})")


def load_tower(name: str) -> nn.Module:
    """The vision tower of a hub name or folder, in evaluation mode and float32; of CLIP and SigLIP also a whole model.

    Raises:
        BackboneError: its model type has no row, or it cannot be loaded whole; the message names file and weights.
    """
    row = tower_of(name)
    tower, drawn = load_float32(row.model_class, name, optional=row.may_lack, others=row.others)
    if any(key.startswith(f"{row.pooler}.") for key in drawn):
        setattr(tower, row.pooler, None)  # a random one would be frozen; the other features need none
    return tower


def check_features(vision: nn.Module, kind: str, layer: int | None = None) -> None:
    """Raise :class:`BackboneError` unless features of this ``kind`` can be taken of a loaded tower's ``layer``."""
    tower, name = tower_of(vision), getattr(vision.config, "_name_or_path", "")
    classes = [cls.__name__ for cls in type(vision).__mro__]
    if "PreTrainedModel" in classes and tower.model_class not in classes:  # one with a head gives no hidden states
        raise BackboneError(f"model.vision: a {classes[0]} is no {tower.model_class}: give the tower inside it")
    if kind not in tower.features:
        known = ", ".join(map(repr, tower.features))
        raise BackboneError(f"vision_features={kind!r}: a {tower.model_type} has only {known}")
    if layer is not None:
        _check_layer(vision, kind, layer)
    if kind == "pooler" and getattr(vision, tower.pooler, None) is None:
        raise BackboneError(f"model.vision: the checkpoint {name} {NO_POOLER}")


def _check_layer(vision: nn.Module, kind: str, layer: int) -> None:
    tower = tower_of(vision)
    if not tower.has_layers:
        raise BackboneError(
            f"vision_layer={layer}: a {tower.model_type} has stages of different widths, and only the last is taken: "
            "leave model.vision_layer out"
        )
    if not -vision.config.num_hidden_layers <= layer <= -1:
        raise BackboneError(f"vision_layer={layer}: this tower has layers -{vision.config.num_hidden_layers} to -1")
    if kind == "pooler":
        raise BackboneError(
            f"vision_layer={layer}: a pooler reads the tower's own output only: set model.vision_features=cls, mean or "
            "tokens, or leave model.vision_layer out"
        )


def config_image_size(vision: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels that a loaded tower's config names, None where it names none."""
    side = getattr(vision.config, "image_size", None)
    return side if side is None else tuple(side) if isinstance(side, list | tuple) else (side, side)


def check_image_size(vision: nn.Module, size: tuple[int, int]) -> None:
    """Raise :class:`BackboneError` unless a loaded tower takes images of ``size`` (height and width in pixels)."""
    tower, name, (height, width) = tower_of(vision), getattr(vision.config, "_name_or_path", ""), size
    if tower.image_sizes == "config":
        wanted = config_image_size(vision)
        if wanted is not None and wanted != (height, width):
            raise BackboneError(
                f"images are resized to {height} x {width} pixels, but the vision tower {name} takes "
                f"{wanted[0]} x {wanted[1]}: take the preprocessor_config.json that belongs to it"
            )
    elif tower.image_sizes == "patches":
        patch = vision.config.patch_size
        sides = tuple(patch) if isinstance(patch, list | tuple) else (patch, patch)
        if height % sides[0] or width % sides[1]:
            raise BackboneError(
                f"images are resized to {height} x {width} pixels, which patches of {sides[0]} x {sides[1]} of the "
                f"vision tower {name} do not fill: take the preprocessor_config.json that belongs to it"
            )


def tower_width(vision: nn.Module) -> int:
    """The width d of a loaded tower's features."""
    width = getattr(vision.config, tower_of(vision).width_key)
    return width[-1] if isinstance(width, list | tuple) else width


def image_features(vision: nn.Module, pixel_values: Tensor, kind: str, layer: int | None = None) -> Tensor:
    """Run a vision tower without gradients.

    Args:
        vision: a loaded tower.
        pixel_values: [B, 3, H, W], normalised as the tower was trained.
        kind: "pooler" (of a ViT: dense + tanh on the class token, the published choice), "cls" (the class token),
            "mean" (mean of the patch tokens) or "tokens" (all tokens).
        layer: None for the tower's own output, its final norm included where it has one; else what transformer layer
            ``layer``, counted from the end (-1 is the last), gives to the next, without a norm.

    Returns:
        [B, 1, d], or [B, prefix tokens + patches, d] for "tokens".

    Raises:
        BackboneError: the tower does not have this kind of feature or layer, or takes no images of this size.
    """
    tower = tower_of(vision)
    if kind not in tower.features or layer is not None:
        check_features(vision, kind, layer)
    check_image_size(vision, tuple(pixel_values.shape[-2:]))
    weight = next(vision.parameters())  # of another type, or on another device, than the language model perhaps
    pixel_values = pixel_values.to(weight.device, weight.dtype if weight.is_floating_point() else None)
    with torch.no_grad():
        if layer is None:
            output = vision(pixel_values=pixel_values)
        else:
            output = vision(pixel_values=pixel_values, output_hidden_states=True)
            output.last_hidden_state = output.hidden_states[layer]
    prefix_tokens = tower.prefix_tokens + getattr(vision.config, "num_register_tokens", 0)
    return tower.features[kind](output, prefix_tokens)
