"""Whole models of random weights, at the sizes of the published backbones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from routingvl.config import RoutingConfig
from routingvl.models import ViTGPT2ForCaptioning, ViTRobertaForVQA
from routingvl.models.base import RoutedVLModel

from .gate import exact_convolutions, relative_rms
from .layer_cases import DTYPES
from .passes import half_autocast


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


def routed_model(
    task: str, size: str, routing: str = "add", rank: int | None = None, *, vision: bool = True
) -> RoutedVLModel:
    """The model of a task whose bottlenecks' updates are not zero; ``rank`` is by default 128, of tiny models 4."""
    rank = rank or (4 if size == "tiny" else 128)
    model = build_model(task, size, RoutingConfig(routing=routing, rank=rank, alpha=rank), vision=vision)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def step_inputs(task: str, model: RoutedVLModel, batch: int, tokens: int) -> dict[str, Tensor]:
    """What a step of a model without ViT takes: random features [batch, 1, d], texts [batch, tokens] and labels."""
    random = torch.Generator().manual_seed(1)
    features = torch.randn(batch, 1, model.vision_width, generator=random)
    ids = torch.randint(3, model.language_model.config.vocab_size, (batch, tokens), generator=random)
    labels = torch.rand(batch, model.num_labels, generator=random) if task == "vqa" else ids
    return {"vision_features": features, "input_ids": ids, "labels": labels}


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The precision of a side: half types run under autocast, float32 does not."""
    return half_autocast(device, DTYPES[dtype])


@exact_convolutions()
def loss_and_gradients(
    model: nn.Module, inputs: Mapping[str, Any], precision: torch.autocast, call: Callable[..., Any] | None = None
) -> tuple[Tensor, Tensor]:
    """The loss, and all gradients as one vector in the order of the parameters' names, in float32.

    ``call`` computes what the model does, by default the model itself. No gradients stay with the model.
    """
    with precision:
        loss = (model if call is None else call)(**inputs).loss
    loss.backward()
    found = {_plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = torch.cat([found[name].flatten().float() for name in sorted(found)])
    model.zero_grad()
    return loss.detach().float(), gradients


def _plain_name(name: str) -> str:
    """A parameter's name as our layers have it, of PEFT's too."""
    return name.replace(".base_layer.", ".").replace(".default.weight", "")


def errors_of(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Relative RMS errors of what :func:`loss_and_gradients` gave."""
    return {
        name: relative_rms(*pair) for name, pair in zip(("loss", "gradients"), zip(got, want, strict=True), strict=True)
    }


def write_captions(model: RoutedVLModel, features: Tensor, *, beams: int, tokens: int, dtype: str) -> Tensor:
    """Token ids [B, tokens] of one beam search of full length for features [B, L, d]."""
    with torch.inference_mode(), autocast(features.device, dtype):
        return model.generate(vision_features=features, num_beams=beams, max_new_tokens=tokens, min_new_tokens=tokens)
