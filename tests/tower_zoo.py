"""Tiny random vision towers of transformers, of every kind that routingvl knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import transformers
from torch import nn

SHAPE = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
CONVOLUTIONS = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
DINOV3 = SHAPE | {"num_register_tokens": 4}


class Case(NamedTuple):
    """A tower's class, config, image side and prefix tokens, and the kinds of feature that it has."""

    tower: str
    config: object
    side: int = 16
    prefix: int = 1
    kinds: str = "pooler cls mean tokens"


CASES = {
    "vit": Case("ViTModel", transformers.ViTConfig(**SHAPE)),
    "deit": Case("DeiTModel", transformers.DeiTConfig(**SHAPE), prefix=2),
    "beit": Case("BeitModel", transformers.BeitConfig(**SHAPE, use_absolute_position_embeddings=True)),
    "beit_relative": Case(
        "BeitModel",
        transformers.BeitConfig(**SHAPE, use_relative_position_bias=True, use_mean_pooling=False, use_mask_token=True),
    ),
    # Published DINOv2 have positions for 518 pixels and take 224.
    "dinov2": Case("Dinov2Model", transformers.Dinov2Config(**SHAPE | {"image_size": 40}), side=16),
    "dinov2_with_registers": Case(
        "Dinov2WithRegistersModel", transformers.Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=3), prefix=4
    ),
    "dinov3_vit": Case("DINOv3ViTModel", transformers.DINOv3ViTConfig(**DINOV3), side=24, prefix=5),
    "dinov3_convnext": Case(
        "DINOv3ConvNextModel", transformers.DINOv3ConvNextConfig(**CONVOLUTIONS), 64, kinds="pooler mean tokens"
    ),
    "clip": Case("CLIPVisionModel", transformers.CLIPVisionConfig(**SHAPE)),
    "siglip": Case("SiglipVisionModel", transformers.SiglipVisionConfig(**SHAPE), 16, 0, "pooler mean tokens"),
    "swin": Case("SwinModel", transformers.SwinConfig(**WINDOWS), 32, 0, "pooler mean tokens"),
    "convnext": Case("ConvNextModel", transformers.ConvNextConfig(**CONVOLUTIONS), 64, 0, "pooler mean tokens"),
    "resnet": Case(
        "ResNetModel", transformers.ResNetConfig(embedding_size=8, **CONVOLUTIONS), 64, 0, "pooler mean tokens"
    ),
}


def randomised(model: nn.Module) -> nn.Module:
    """``model`` in evaluation mode with no weight or statistic as it was made: nothing hides behind zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.state_dict().values():  # what a checkpoint has
            if weight.is_floating_point():
                weight.add_(0.1 * torch.rand(weight.shape, generator=generator))
    return model.eval()


def vision_tower(name: str) -> nn.Module:
    """The tower of a case."""
    torch.manual_seed(0)
    return randomised(getattr(transformers, CASES[name].tower)(CASES[name].config))


def tower_images(name: str, seed: int) -> torch.Tensor:
    """Two images [2, 3, H, W] of its size."""
    side = CASES[name].side
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))
