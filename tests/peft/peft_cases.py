"""What the tests of routingvl.peft share: a tiny Llama and GPT-2, adapters that show in the outputs, and logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft.tuners")  # this folder's name alone can be imported as `peft`

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from routingvl import VisualContext
from routingvl.peft import RoutedLoraConfig
from routingvl.peft.model import routed_layers

WIDTH, WORDS, ROWS = 32, 40, 3
IDS = torch.randint(3, WORDS, (ROWS, 5), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(ROWS, 1, WIDTH, generator=torch.Generator().manual_seed(2))
TARGETS = ["q_proj", "v_proj"]


def spread(model: nn.Module) -> nn.Module:
    """Weights so wide that differences show."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.15)
    return model.eval()


def llama(**changes) -> LlamaForCausalLM:
    """Two layers of width 32; queries, keys and values are equally wide."""
    shape = {"vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"intermediate_size": 48, "max_position_embeddings": 32, "pad_token_id": 0, "eos_token_id": None}
    return spread(LlamaForCausalLM(LlamaConfig(**shape | changes)))


def gpt2() -> GPT2LMHeadModel:
    """Two layers of width 32, without dropout."""
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"vocab_size": WORDS, "n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    return spread(GPT2LMHeadModel(GPT2Config(**shape, **drops, bos_token_id=1, eos_token_id=2)))


def config(routing: str = "mul", **changes) -> RoutedLoraConfig:
    """Rank 4 at the queries and values."""
    return RoutedLoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "routing": routing} | changes)


def plain(**changes) -> LoraConfig:
    """PEFT's own LoRA of the same size."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | changes)


def fill(model: nn.Module, seed: int = 7, name: str = "lora_B") -> nn.Module:
    """Give the up-projections random values, so that nothing hides behind zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if name in key:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return model


def adapted(settings: LoraConfig | None = None, base: nn.Module | None = None, seed: int = 7, **options) -> PeftModel:
    """``base``, a Llama unless given, with an adapter that does something."""
    settings = config() if settings is None else settings
    return fill(get_peft_model(llama() if base is None else base, settings, **options), seed).eval()


def context_of(model: nn.Module) -> VisualContext:
    """The one context that all routed layers read."""
    (context,) = {layer.context for layer in routed_layers(model)}
    return context


def logits(model: nn.Module, images: torch.Tensor = IMAGES, ids: torch.Tensor = IDS, **inputs) -> torch.Tensor:
    """[B, T, words], with ``images`` bound where the model is adapted."""
    with torch.no_grad():
        if not any(routed_layers(model)):
            return model(input_ids=ids, **inputs).logits
        with context_of(model).bind(images):
            return model(input_ids=ids, **inputs).logits


def train(model: nn.Module, steps: int = 2, images: torch.Tensor = IMAGES) -> nn.Module:
    """A few steps on the texts; returns the model in evaluation mode."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    model.train()
    for _ in range(steps):
        with context_of(model).bind(images):
            loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
