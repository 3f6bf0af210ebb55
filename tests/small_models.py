"""Small random backbones for tests: real transformers classes, a fraction of a second to build."""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel, ViTConfig, ViTModel

from routingvl import RoutingConfig, ViTGPT2ForCaptioning, ViTRobertaForVQA

WIDTH = 32


def small_vit(width: int = WIDTH) -> ViTModel:
    torch.manual_seed(1)
    return ViTModel(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
        )
    ).eval()


def small_gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    torch.manual_seed(2)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=50,
            n_positions=40,
            n_embd=WIDTH,
            n_layer=2,
            n_head=4,
            bos_token_id=49,
            eos_token_id=49,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            initializer_range=0.3,
        )
    )


def small_roberta(dropout: float = 0.0) -> RobertaModel:
    torch.manual_seed(3)
    return RobertaModel(
        RobertaConfig(
            vocab_size=50,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=40,
            type_vocab_size=1,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            initializer_range=0.3,
        )
    )


def captioner(config: RoutingConfig | None = None, vit_width: int = WIDTH, **options) -> ViTGPT2ForCaptioning:
    config = RoutingConfig(rank=4, alpha=8, routing="mul") if config is None else config
    return ViTGPT2ForCaptioning.from_backbones(small_vit(vit_width), small_gpt2(), config, **options)


def answerer(config: RoutingConfig | None = None, vit_width: int = WIDTH, **options) -> ViTRobertaForVQA:
    config = RoutingConfig(rank=4, alpha=8, routing="mul") if config is None else config
    options = {"num_labels": 7} | options
    return ViTRobertaForVQA.from_backbones(small_vit(vit_width), small_roberta(), config, **options)


def randomise(model: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """Give every trained parameter a random value, so that nothing hides behind a zero up-projection."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def batch(rows: int = 3, tokens: int = 6) -> dict[str, torch.Tensor]:
    """pixel_values, input_ids and attention_mask with one padded row."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, tokens // 2 :] = 0
    ids = torch.randint(3, 48, (rows, tokens), generator=generator)
    return {
        "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
        "input_ids": ids.masked_fill(mask == 0, 1),
        "attention_mask": mask,
    }
