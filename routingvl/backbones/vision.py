"""Vision towers, a row per kind: how one is loaded, and which of its outputs the language model can see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from routingvl.backbones.loading import BackboneError, load_float32, model_type

NO_POOLER = "has no pooler, which vision_features='pooler' reads: set model.vision_features=cls or mean"


def _pooler(output: Any, prefix_tokens: int) -> Tensor:
    if output.pooler_output is None:
        raise BackboneError(f"this vision tower {NO_POOLER}")
    return output.pooler_output[:, None]


# What can be taken of a tower's output: (output of transformers, prefix tokens) -> features [B, L, d].
FEATURES: dict[str, Callable[[Any, int], Tensor]] = {
    "pooler": _pooler,
    "cls": lambda output, prefix_tokens: output.last_hidden_state[:, :1],
    "mean": lambda output, prefix_tokens: output.last_hidden_state[:, prefix_tokens:].mean(dim=1, keepdim=True),
    "tokens": lambda output, prefix_tokens: output.last_hidden_state,
}


@dataclass(frozen=True)
class VisionTower:
    """A kind of vision model of transformers.

    Attributes:
        model_type: ``model_type`` in its config.
        model_class: name of its class in transformers.
        prefix_tokens: tokens in front of the patches' in its last hidden state (a class token: 1).
        width_key: the entry of its config that holds d, the width of its features.
        features: what can be taken of its output, by the names of ``model.vision_features``.
    """

    model_type: str
    model_class: str
    prefix_tokens: int = 1
    width_key: str = "hidden_size"
    features: Mapping[str, Callable[[Any, int], Tensor]] = field(default_factory=lambda: FEATURES)


TOWERS: dict[str, VisionTower] = {tower.model_type: tower for tower in (VisionTower("vit", "ViTModel"),)}


def tower_of(backbone: nn.Module | str) -> VisionTower:
    """The row of a loaded tower, or of a hub name or folder; raises :class:`BackboneError` when there is none."""
    found = model_type(backbone)
    if found not in TOWERS:
        what = backbone if isinstance(backbone, str) else type(backbone).__name__
        known = ", ".join(map(repr, TOWERS))
        raise BackboneError(f"vision {what} is of model type {found!r}, which is no vision tower known here ({known})")
    return TOWERS[found]


def load_tower(name: str) -> nn.Module:
    """The vision tower of a hub name or folder, in evaluation mode and float32.

    Raises:
        BackboneError: its model type has no row, or it cannot be loaded whole; the message names file and weights.
    """
    tower, drawn = load_float32(tower_of(name).model_class, name, optional="pooler.")
    if drawn:
        tower.pooler = None  # a random one would be frozen; the other features need none
    return tower


def check_features(vision: nn.Module, kind: str) -> None:
    """Raise :class:`BackboneError` unless features of this ``kind`` can be taken of a loaded tower's output."""
    tower, name = tower_of(vision), getattr(vision.config, "_name_or_path", "")
    if kind not in tower.features:
        known = ", ".join(map(repr, tower.features))
        raise BackboneError(f"vision_features={kind!r}: a {tower.model_type} has only {known}")
    if kind == "pooler" and getattr(vision, "pooler", None) is None:
        raise BackboneError(f"model.vision: the checkpoint {name} {NO_POOLER}")


def check_image_size(vision: nn.Module, size: tuple[int, int]) -> None:
    """Raise :class:`BackboneError` unless a loaded tower takes images of ``size`` (height and width in pixels)."""
    side = getattr(vision.config, "image_size", None)
    wanted = tuple(side) if isinstance(side, list | tuple) else (side, side)
    if side is not None and wanted != tuple(size):
        raise BackboneError(
            f"images are resized to {size[0]} x {size[1]} pixels, but the vision tower "
            f"{getattr(vision.config, '_name_or_path', '')} takes {wanted[0]} x {wanted[1]}: take the "
            "preprocessor_config.json that belongs to it"
        )


def tower_width(vision: nn.Module) -> int:
    """The width d of a loaded tower's features."""
    return getattr(vision.config, tower_of(vision).width_key)


def image_features(vision: nn.Module, pixel_values: Tensor, kind: str) -> Tensor:
    """Run a vision tower without gradients.

    Args:
        vision: a loaded tower.
        pixel_values: [B, 3, H, W], normalised as the tower was trained.
        kind: "pooler" (of a ViT: dense + tanh on the class token, the published choice), "cls" (the class token),
            "mean" (mean of the patch tokens) or "tokens" (all tokens).

    Returns:
        [B, 1, d], or [B, prefix tokens + patches, d] for "tokens".

    Raises:
        BackboneError: the tower does not have this kind of feature.
    """
    tower = tower_of(vision)
    if kind not in tower.features:
        known = ", ".join(map(repr, tower.features))
        raise BackboneError(f"vision_features={kind!r}: a {tower.model_type} has only {known}")
    with torch.no_grad():
        output = vision(pixel_values=pixel_values)
    return tower.features[kind](output, tower.prefix_tokens)
