"""Backbones of random weights in the shape of trained ones, from their configs alone: for estimates of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from routingvl.backbones.loading import BackboneError, find_source, load_config
from routingvl.backbones.text import READ
from routingvl.backbones.vision import TOWERS

VIT = {"model_type": "vit"}
VIT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {
    "model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    "architectures": ["RobertaForMaskedLM"],
}  # fmt: skip
# What differs from transformers' defaults in the configs of the backbones that recipes name (from their config.json):
# an estimate of a recipe needs no network then.
CONFIGS: dict[str, dict[str, Any]] = {
    "google/vit-base-patch16-224-in21k": VIT,
    "google/vit-large-patch16-224-in21k": VIT | VIT_LARGE,
    "google/siglip2-base-patch16-224": {"model_type": "siglip_vision_model"},
    "openai/clip-vit-base-patch32": {"model_type": "clip_vision_model"},
    "roberta-base": ROBERTA,
    "roberta-large": ROBERTA | VIT_LARGE,
    "gpt2": {"model_type": "gpt2"},
    "gpt2-medium": {"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16},
    "facebook/bart-base": {
        "model_type": "bart", "vocab_size": 50265, "d_model": 768, "encoder_layers": 6, "decoder_layers": 6,
        "encoder_attention_heads": 12, "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072,
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    },
}  # fmt: skip


def known_config(name: str) -> Any:
    """The config of a folder or hub name; those of :data:`CONFIGS` are not looked up anywhere.

    Raises:
        BackboneError: there is none, or the hub cannot be reached.
    """
    from transformers import AutoConfig

    if name in CONFIGS and not find_source(name)[1]:
        settings = dict(CONFIGS[name])
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    return load_config(name)


def untrained_tower(name: str) -> nn.Module:
    """A vision tower of random weights in the shape of that of a hub name or folder, in evaluation mode and float32.

    Raises:
        BackboneError: it has no config here or in reach, or is of a type that has no row.
    """
    import transformers

    config = known_config(name)
    config = config if config.model_type in TOWERS else getattr(config, "vision_config", config)
    if config.model_type not in TOWERS:
        raise BackboneError(f"{name} is of model type {config.model_type!r}, which is no vision tower known here")
    return getattr(transformers, TOWERS[config.model_type].model_class)(config).float().eval()


def untrained_text(use: str, name: str) -> nn.Module:
    """The same of a language model, with a head when it is to ``WRITE``."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as ENCODER_DECODERS

    config = known_config(name)
    writer = "AutoModelForSeq2SeqLM" if config.model_type in ENCODER_DECODERS else "AutoModelForCausalLM"
    try:
        model = getattr(transformers, "AutoModel" if use == READ else writer).from_config(config)
    except ValueError as error:
        raise BackboneError(f"{name} is of model type {config.model_type!r}, which is no language model") from error
    model.drawn_weights = _weights_that_lack(config, model) if use == READ else []
    return model.to(torch.float32).eval()


def _weights_that_lack(config: Any, model: nn.Module) -> list[str]:
    """The pooler's weights where the checkpoint was saved by a class without one, which its config names.

    :func:`~routingvl.backbones.text.load_text` draws them, and they train.
    """
    import transformers

    pooler = [name for name, _ in model.named_parameters() if name.startswith("pooler.")]
    saved_by = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    if not pooler or saved_by is None:
        return []
    with torch.device("meta"):
        saved = {name for name, _ in saved_by(config).named_parameters()}
    return [] if any(f".{name}".endswith(".pooler.dense.weight") for name in saved) else pooler
