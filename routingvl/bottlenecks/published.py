"""The published code's state dicts (github.com/tingyu215/Routing_VLPEFT), loaded into models of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from routingvl.bottlenecks.checkpoint import CheckpointError, copy_strictly
from routingvl.tensor_files import check_floats, listed


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
        CheckpointError: a key is missing, unexpected or there twice, a shape differs, or a tensor is not a dense
            floating-point one, holds NaN or infinity, or is a head that differs from the embedding it is tied to here;
            nothing is loaded then.
    """
    source = "the published state dict"
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise CheckpointError(f"{source} must be a dict of names and tensors")
    ours = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.startswith(("vit.", "visual_projection."))
    }
    # The tied output embedding appears once in named_parameters, under the name the state dict uses (wte).
    names: dict[str, str] = {}
    for key in state_dict:
        name = key.removeprefix("module.")
        names[key] = f"gpt.{name}" if name.startswith(("transformer.", "lm_head.")) else name
    if twice := [key for key, name in names.items() if list(names.values()).count(name) > 1]:
        raise CheckpointError(f"{source} holds the same parameter under several names: {listed(twice)}")
    tensors = {name: state_dict[key] for key, name in names.items() if name in ours or not _is_derived(name)}
    check_floats(tensors, source, CheckpointError)
    for key, name in names.items():
        if name.endswith("lm_head.weight") and name not in ours:
            embedding = tensors.get("gpt.transformer.wte.weight")
            check_floats({key: state_dict[key]}, source, CheckpointError)
            if embedding is not None and not torch.equal(state_dict[key], embedding):
                raise CheckpointError(f"{source}: {key} differs from the token embedding, which it is tied to here")
    copy_strictly(ours, tensors, source)
    return {key: name for key, name in names.items() if name in tensors}


def _is_derived(name: str) -> bool:
    """Buffers of older transformers, and the output embedding tied to the input's."""
    return name.endswith((".attn.bias", ".attn.masked_bias", "position_ids", "token_type_ids", "lm_head.weight"))
