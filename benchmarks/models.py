"""Whole models of random weights, at the sizes of the published backbones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from routingvl.config import RoutingConfig
from routingvl.models import ViTGPT2ForCaptioning, ViTRobertaForVQA
from routingvl.models.base import RoutedVLModel


@dataclass(frozen=True)
class Size:
    """Sizes that ViT and language model share, the language model's vocabulary, the ViT's image, and the answers."""

    width: int
    layers: int
    heads: int
    vocabulary: int = 50257
    image: int = 224
    patch: int = 16
    answers: int = 3129


SIZES = {
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
    "tiny": Size(64, 2, 4, vocabulary=500, image=16, patch=8, answers=50),
}


def build_model(task: str, size: str, routing: RoutingConfig, *, vision: bool = False) -> RoutedVLModel:
    """ViT + RoBERTa for task "vqa", ViT + GPT-2 for any other; always the same weights, bottlenecks as initialised.

    Without ``vision`` there is no ViT, and the model takes ``vision_features``.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = SIZES[size]
    shape = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "intermediate_size": 4 * sizes.width,
    }
    vit: nn.Module | None = None
    if vision:
        vit = ViTModel(ViTConfig(**shape, image_size=sizes.image, patch_size=sizes.patch))
    if task == "vqa":
        text = RobertaModel(RobertaConfig(**shape, vocab_size=sizes.vocabulary))
        return ViTRobertaForVQA.from_backbones(vit, text, routing, num_labels=sizes.answers)
    shape = {"n_embd": sizes.width, "n_layer": sizes.layers, "n_head": sizes.heads, "vocab_size": sizes.vocabulary}
    end = sizes.vocabulary - 1
    text = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=end, eos_token_id=end))
    return ViTGPT2ForCaptioning.from_backbones(vit, text, routing)
