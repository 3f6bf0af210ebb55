"""The published recipe's training step: every image through the ViT each time, texts of fixed length, float32.

The backbones are transformers' own and the loss the model's; only the adapted projections are replaced, by the
published chain of operations (see ``published.py``), so that both sides can be given the same weights.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from routingvl.backbones.dropout import LaneDropout
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.models.base import RoutedVLModel

from .published_layers import published_lora_linear, published_merged_linear


class RepeatingContext(VisualContext):
    """Features as the published layers take them: one entry per row of text, so repeated for the beams of a search."""

    def bind(
        self, features: Tensor | None, *, mask: Tensor | None = None, beams: int = 1, decoding: bool = False
    ) -> AbstractContextManager[None]:
        """See :meth:`VisualContext.bind`."""
        features, mask = (x if x is None or beams == 1 else x.repeat_interleave(beams, 0) for x in (features, mask))
        return super().bind(features, mask=mask)


class PublishedLoRALinear(nn.Module):
    """A routed LoRA layer computed by the published chain, with the parameters (names too) of the layer given."""

    def __init__(self, layer: RoutedLoRALinear, context: VisualContext) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.context = context
        self.options = {"routing": layer.routing.name, "scaling": layer.scaling}
        self.columns, self.groups = layer.columns, layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, K] -> [B, T, N]."""
        tensors = (x, self.context.read(x), self.weight, self.bias, self.lora_A, self.lora_B)
        if self.columns is None:
            return published_lora_linear(*tensors, **self.options)
        return published_merged_linear(*tensors, groups=self.groups, columns=self.columns, **self.options)


def published_model(model: RoutedVLModel) -> RoutedVLModel:
    """A copy of ``model`` (LoRA) with the published layers, and with the activation and dropout that came with it."""
    model = copy.deepcopy(model)
    model.context = RepeatingContext()

    def published(part: nn.Module) -> nn.Module | None:
        if isinstance(part, RoutedLoRALinear):
            return PublishedLoRALinear(part, model.context)
        if isinstance(part, nn.GELU) and part.approximate == "tanh":
            return NewGELUActivation()
        return nn.Dropout(part.p).train(part.training) if isinstance(part, LaneDropout) else None

    for parent in list(model.language_model.modules()):
        for name, child in list(parent.named_children()):
            if (new := published(child)) is not None:
                setattr(parent, name, new)
    return model


def published_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with the published settings, in torch's default form."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=3e-5, eps=1e-6, weight_decay=0.0)
