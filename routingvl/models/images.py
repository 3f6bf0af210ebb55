"""How a model gets at its images: pixels or features in, visual tokens out, bound for the bottlenecks to read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from routingvl.backbones.vision import image_features
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.rows import Tokens
from routingvl.config import ConfigError, RoutingConfig
from routingvl.models.checks import check_finite, check_tensor


class ReadsImages:
    """The images' part of :class:`~routingvl.models.base.RoutedVLModel`, which has these attributes.

    Attributes:
        vit: the frozen vision tower, or None; its features are ``vision_width`` wide.
        vision_features, vision_layer, image_pooling: which features, and what bottlenecks read of several tokens.
        visual_projection: what brings features to the language model's width; None where they have it.
        routing, context: of the bottlenecks.
        device, dtype: the language model's.
    """

    vit: nn.Module | None
    vision_features: str
    vision_layer: int | None
    vision_width: int
    image_pooling: str | None
    visual_projection: nn.Linear | None
    routing: RoutingConfig
    context: VisualContext
    device: torch.device
    dtype: torch.dtype

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values [B, 3, H, W] -> features [B, L, d_vision], without gradients; L is 1 but for "tokens".

        N images each, [B, N, 3, H, W], give [B, N, L, d_vision]. The result is what ``vision_features=`` takes, so
        images that come again can be encoded once.
        """
        if self.vit is None:
            raise ValueError("the model was built without a ViT: pass vision_features= instead of pixel_values=")
        several = isinstance(pixel_values, torch.Tensor) and pixel_values.dim() == 5
        check_tensor("pixel_values", pixel_values, 5 if several else 4)
        if not pixel_values.numel():
            raise ValueError("the batch is empty: there is no image in pixel_values")
        check_finite("pixel_values", pixel_values)
        images = pixel_values.flatten(0, 1) if several else pixel_values
        features = image_features(self.vit, images, self.vision_features, self.vision_layer)
        return features.unflatten(0, pixel_values.shape[:2]) if several else features

    def visual_features(self, pixel_values: torch.Tensor | None, vision_features: torch.Tensor | None) -> torch.Tensor:
        """Features [B, L, d] as the bottlenecks read them, from exactly one of the two inputs.

        They have the language model's width and type; with ``image_projection="own"`` they keep the tower's width.

        pixel_values are images [B, 3, H, W], vision_features [B, L, d_vision] what :meth:`encode_images` made of them.
        Of N images each, [B, N, 3, H, W] or [B, N, L, d_vision], the tokens stand one behind the other: [B, N L, d].
        Bottlenecks of a routing function of one visual token read their mean.

        Raises:
            ValueError: both or neither are given, the shape does not fit, or values on the CPU are not finite.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("pass either pixel_values= (images) or vision_features= (encoded images)")
        if vision_features is None:
            vision_features = self.encode_images(pixel_values)
        check_tensor("vision_features", vision_features)
        if vision_features.dim() not in (3, 4) or vision_features.shape[-1] != self.vision_width:
            have = list(vision_features.shape)
            raise ValueError(f"vision_features must be [batch, visual tokens, {self.vision_width}], not {have}")
        if not len(vision_features):
            raise ValueError("the batch is empty: there is no image in vision_features")
        check_finite("vision_features", vision_features)
        self.check_visual_tokens(vision_features.shape[-2])
        if vision_features.dim() == 4:
            vision_features = vision_features.flatten(1, 2)
        features = vision_features.to(self.device, self.dtype)
        own = self.routing.has_own_projection
        return features if self.visual_projection is None or own else self.visual_projection(features)

    def prefix(self, features: torch.Tensor) -> torch.Tensor:
        """What :meth:`visual_features` gave as the visual tokens in front of the text, [B, L, width of the text]."""
        apart = self.routing.has_own_projection and self.visual_projection is not None
        return self.visual_projection(features) if apart else features

    def check_visual_tokens(self, visual_tokens: int) -> None:
        """Raise ConfigError unless the routing function takes so many visual tokens."""
        if not self.routing.reads_image:
            return
        try:
            self.routing.function.check(1 if self.image_pooling else visual_tokens, self.routing.relu)
        except ValueError as error:
            pools = "vision_features='mean' pools them, image_pooling='mean' for the bottlenecks alone"
            raise ConfigError(f"{error}; {pools}") from error

    def bind(
        self, features: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
    ) -> AbstractContextManager[None]:
        """Bind what the bottlenecks read of features [B, L, d]: all tokens, or the mean of those in mask [B, L].

        ``options`` are those of :meth:`~routingvl.bottlenecks.context.VisualContext.bind`.
        """
        if self.image_pooling == "mean":
            features, mask = Tokens(features, mask).mean().features, None
        return self.context.bind(features, mask=mask, **options)
