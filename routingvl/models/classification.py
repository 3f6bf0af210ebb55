"""Classification of an image with a text: a frozen ViT and a RoBERTa with a head over the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from routingvl.config import ConfigError, RoutingConfig, check_choice
from routingvl.config.schema import CLASSIFIER_LAYERS, TEXT_EMBEDDINGS
from routingvl.models.base import ModelOutput, RoutedVLModel
from routingvl.models.losses import label_loss, soft_label_loss


class ViTRobertaForClassification(RoutedVLModel):
    """ViT + RoBERTa, a classifier over labels of which exactly one is right (softmax).

    The frozen pooler of RoBERTa reads the first position, which is the image's own when there is a visual prefix.

    Args:
        num_labels: number of labels.
        classifier_layers: 1 (Linear) or 2 (Linear to 2 d, LayerNorm, GELU, Linear: the published recipe).
        text_embedding: how text and prefix are embedded. "published" (default) sends the text through RoBERTa's
            embedding block twice, once alone and once behind the prefix, as the published code does, so that its
            recipes and checkpoints carry over; "single" joins plain word embeddings to the prefix and embeds once.
            Without a prefix the two are the same.
        vision, text, routing, **shared: see :class:`RoutedVLModel`.
    """

    language_model_name = "roberta"
    model_type = "roberta"
    num_labels = 0  # none: it must be given
    loss = staticmethod(label_loss)  # logits and labels -> scalar

    def __init__(
        self,
        vision: nn.Module | None,
        text: nn.Module,
        routing: RoutingConfig,
        *,
        num_labels: int | None = None,
        classifier_layers: int = 2,
        text_embedding: str = "published",
        **shared: Any,
    ) -> None:
        check_choice("text_embedding", text_embedding, TEXT_EMBEDDINGS)
        check_choice("classifier_layers", classifier_layers, CLASSIFIER_LAYERS)
        num_labels = type(self).num_labels if num_labels is None else num_labels
        if num_labels < 1:
            raise ConfigError(f"num_labels={num_labels!r} must be at least 1")
        super().__init__(vision, text, routing, **shared)
        self.num_labels = self.config.num_labels = num_labels
        self.classifier_layers = classifier_layers
        self.text_embedding = text_embedding
        self.classifier = _classifier(self.roberta.config.hidden_size, num_labels, classifier_layers)
        self.classifier.to(device=self.device, dtype=self.dtype)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Classify images with their texts.

        Args:
            pixel_values, vision_features: one of them, see :meth:`visual_features`.
            input_ids: [B, T] texts.
            attention_mask: [B, T] of the text, 1 for tokens to read; None for all.
            labels: int64 [B]; for :class:`ViTRobertaForVQA` float [B, num_labels], soft scores in [0, 1].

        Returns:
            The loss (softmax cross entropy, mean over the batch; for :class:`ViTRobertaForVQA` binary cross entropy,
            mean over batch and answers) and logits [B, num_labels].
        """
        features = self.visual_features(pixel_values, vision_features)
        inputs = self.text_inputs(features, input_ids, attention_mask)
        with self.context.bind(features):
            pooled = self.roberta(**inputs).pooler_output
        logits = self.classifier(pooled)
        return ModelOutput(None if labels is None else self.loss(logits, labels), logits)

    @staticmethod
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        """logits [B, num_labels] -> float32 probabilities that sum to 1."""
        return logits.float().softmax(dim=-1)

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See :meth:`RoutedVLModel.embed_text`, and ``text_embedding`` above."""
        return (
            self.roberta.embeddings(input_ids=input_ids)
            if self.text_embedding == "published"
            else super().embed_text(input_ids)
        )


class ViTRobertaForVQA(ViTRobertaForClassification):
    """ViT + RoBERTa, a classifier over the answers (arXiv 2403.09377, the VQAv2 experiments).

    As :class:`ViTRobertaForClassification`, but each answer is a yes-or-no decision of its own, learned from soft
    scores; ``num_labels`` is by default 3129, the answers of the published vocabulary.
    """

    num_labels = 3129
    loss = staticmethod(soft_label_loss)

    @staticmethod
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        """logits [B, num_labels] -> float32 probabilities, each between 0 and 1 on its own."""
        return logits.float().sigmoid()


def _classifier(width: int, num_labels: int, layers: int) -> nn.Module:
    """The head over the labels; weights N(0, 0.02), biases 0."""
    head: nn.Module = nn.Linear(width, num_labels)
    if layers == 2:
        inner = 2 * width
        head = nn.Sequential(nn.Linear(width, inner), nn.LayerNorm(inner), nn.GELU(), nn.Linear(inner, num_labels))
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return head
