"""The frozen ViT: which of its outputs the language model sees."""

from __future__ import annotations

import torch
from torch import nn

VISION_FEATURES = ("pooler", "cls", "mean", "tokens")


def vit_features(vit: nn.Module, pixel_values: torch.Tensor, kind: str) -> torch.Tensor:
    """Run ``vit`` without gradients.

    Args:
        vit: a transformers ViTModel.
        pixel_values: [B, 3, H, W], normalised as the ViT was trained.
        kind: "pooler" (dense + tanh on the class token, the published choice), "cls" (the class token), "mean" (mean of
            the patch tokens) or "tokens" (class and patch tokens).

    Returns:
        [B, 1, d], or [B, 1 + patches, d] for "tokens".

    Raises:
        ValueError: "pooler" of a ViT that has none.
    """
    with torch.no_grad():
        output = vit(pixel_values=pixel_values)
    tokens = output.last_hidden_state
    if kind == "pooler":
        if output.pooler_output is None:
            raise ValueError("this ViT has no pooler: choose vision_features='cls', 'mean' or 'tokens'")
        return output.pooler_output[:, None]
    if kind == "cls":
        return tokens[:, :1]
    if kind == "mean":
        return tokens[:, 1:].mean(dim=1, keepdim=True)
    return tokens
