"""The published code's state dicts (github.com/tingyu215/Routing_VLPEFT), loaded into models of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from routingvl.bottlenecks.checkpoint import copy_strictly


def load_reference_state_dict(model: Any, state_dict: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Load a state dict of the published code (github.com/tingyu215/Routing_VLPEFT) into a model of ours.

    Our models keep the published parameter names. What differs is taken care of: a ``module.`` prefix of
    DistributedDataParallel, the ``gpt.`` prefix that published models without visual prefix lack, the tied output
    embedding, and buffers that older transformers saved. Frozen and trained weights are both loaded, the language
    model's and the head's. The published code keeps its frozen ViT outside the model that it saves, so ours stays.

    Args:
        model: :class:`ViTRobertaForVQA` or :class:`ViTGPT2ForCaptioning`, built with the matching configuration.
        state_dict: published name -> tensor, of any floating-point type.

    Returns:
        Published name -> name of our parameter, for every tensor loaded.

    Raises:
        CheckpointError: a key is missing or unexpected, or a shape differs; nothing is loaded then.
    """
    ours = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(("vit.", "visual_projection."))
    }
    # The tied output embedding appears once in named_parameters, under the name the state dict uses (wte).
    names = {}
    for key in state_dict:
        name = key.removeprefix("module.")
        if name.startswith(("transformer.", "lm_head.")):
            name = f"gpt.{name}"
        if not _is_derived(name):
            names[key] = name
    copy_strictly(ours, {name: state_dict[key] for key, name in names.items()}, "the published state dict")
    return names


def _is_derived(name: str) -> bool:
    """Buffers of older transformers, and the output embedding tied to the input's."""
    return name.endswith((".attn.bias", ".attn.masked_bias", "position_ids", "token_type_ids", "lm_head.weight"))
