"""Classification of an image with a text: a frozen vision tower and a language model with a head over the labels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from routingvl.backbones.loading import model_type
from routingvl.backbones.text import ENCODER, ENCODER_DECODER, READ, text_model, token_ids
from routingvl.config import ConfigError, RoutingConfig, check_choice
from routingvl.config.schema import CLASSIFIER_LAYERS, TEXT_EMBEDDINGS
from routingvl.models.base import ModelOutput, RoutedVLModel
from routingvl.models.losses import label_loss, soft_label_loss


class VisionTextForClassification(RoutedVLModel):
    """Vision tower + language model, a classifier over labels of which exactly one is right (softmax).

    The head reads one state of the language model: of an encoder the pooler's, or without a pooler the last state, of
    the first position, which is the image's own when there is a visual prefix; of a decoder that of the last token;
    of an encoder-decoder that of its last end token, the text being the decoder's input too, as in transformers'
    BartForSequenceClassification.

    Args:
        num_labels: number of labels.
        classifier_layers: 1 (Linear) or 2 (Linear to 2 d, LayerNorm, GELU, Linear: the published recipe).
        text_embedding: how text and prefix are embedded. "published" sends the text through RoBERTa's
            embedding block twice, once alone and once behind the prefix, as the published code does, so that its
            recipes and checkpoints carry over; "single" joins plain word embeddings to the prefix and embeds once.
            Without a prefix the two are the same. None (default) takes "published" for RoBERTa, and for all others
            "single", which is all that they have.
        vision, text, routing, **shared: see :class:`RoutedVLModel`.
    """

    text_use = READ
    former_names = ("ViTRobertaForClassification",)
    num_labels = 0  # none: it must be given
    problem_type: ClassVar[str | None] = None  # in the config, where Trainer looks whether labels can be smoothed
    loss = staticmethod(label_loss)  # logits and labels -> scalar

    def __init__(
        self,
        vision: nn.Module | None,
        text: nn.Module,
        routing: RoutingConfig,
        *,
        num_labels: int | None = None,
        classifier_layers: int = 2,
        text_embedding: str | None = None,
        **shared: Any,
    ) -> None:
        check_choice("text_embedding", text_embedding, (None, *TEXT_EMBEDDINGS))
        check_choice("classifier_layers", classifier_layers, CLASSIFIER_LAYERS)
        num_labels = type(self).num_labels if num_labels is None else num_labels
        if num_labels < 1:
            raise ConfigError(f"num_labels={num_labels!r} must be at least 1")
        super().__init__(vision, text, routing, **shared)
        self.num_labels = self.config.num_labels = num_labels
        self.config.problem_type = self.problem_type
        self.classifier_layers = classifier_layers
        embeds_twice = text_model(self.language_model).embeds_twice
        if text_embedding == "published" and not embeds_twice:
            raise ConfigError(
                f"text_embedding='published' is RoBERTa's, and the text model is a {model_type(self.language_model)}: "
                "leave it null, or take 'single'"
            )
        self.text_embedding = text_embedding or ("published" if embeds_twice else "single")
        self.classifier = _classifier(self.language_model.config.hidden_size, num_labels, classifier_layers)
        self.classifier.to(device=self.device, dtype=self.dtype)
        self._hold_what_trains()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> ModelOutput:
        """Classify images with their texts.

        Args:
            pixel_values, vision_features: one of them, see :meth:`visual_features`.
            input_ids: [B, T] texts.
            attention_mask: [B, T] of the text, 1 for tokens to read; None for all.
            labels: int64 [B]; for :class:`VisionTextForVQA` float [B, num_labels], soft scores in [0, 1].
            token_type_ids: [B, T] of the text, where the language model tells first and second sentences apart.

        Returns:
            The loss (softmax cross entropy, mean over the batch; for :class:`VisionTextForVQA` binary cross entropy,
            mean over batch and answers) and logits [B, num_labels].
        """
        features = self.visual_features(pixel_values, vision_features)
        inputs = self.text_inputs(features, input_ids, attention_mask, token_type_ids)
        if self.text_kind == ENCODER_DECODER:
            inputs["decoder_input_ids"] = self._shifted(input_ids, attention_mask)
        if self.text_kind != ENCODER:
            inputs["use_cache"] = False
        with self.bind(features):
            output = self.language_model(**inputs)
        logits = self.classifier(self._pooled(output, inputs["attention_mask"], input_ids, attention_mask))
        return ModelOutput(None if labels is None else self.loss(logits, labels), logits)

    def _pooled(
        self, output: Any, mask: torch.Tensor, input_ids: torch.Tensor, text_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """The state [B, d] that the head reads; ``mask`` is of what the language model was given."""
        if self.text_kind == ENCODER:
            pooled = getattr(output, "pooler_output", None)
            return output.last_hidden_state[:, 0] if pooled is None else pooled
        if self.text_kind == ENCODER_DECODER:
            mask = torch.ones_like(input_ids) if text_mask is None else text_mask
            ends = (input_ids == token_ids(self.language_model.config.eos_token_id)[-1]) & mask.bool()
            mask = torch.where(ends.any(dim=1, keepdim=True), ends, mask.bool())
        places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        last = (mask.long() * places).argmax(dim=1)
        return output.last_hidden_state[torch.arange(len(last), device=last.device), last]

    def _shifted(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The decoder's input for texts [B, T]: each begins with the start token, and lacks its last one.

        Where the config has no start token (mBART), it is the last token of the text, in turn.
        """
        start = self.language_model.config.decoder_start_token_id
        if start is None:
            last = (torch.full_like(input_ids[:, 0], input_ids.shape[1]) if mask is None else mask.sum(dim=1)) - 1
            first = input_ids.gather(1, last[:, None])
        else:
            first = torch.full_like(input_ids[:, :1], start)
        return torch.cat([first, input_ids[:, :-1]], dim=1)

    @staticmethod
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        """logits [B, num_labels] -> float32 probabilities that sum to 1."""
        return logits.float().softmax(dim=-1)

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """See :meth:`RoutedVLModel.embed_text`, and ``text_embedding`` above."""
        return (
            self.language_model.embeddings(input_ids=input_ids)
            if self.text_embedding == "published"
            else super().embed_text(input_ids)
        )


class VisionTextForVQA(VisionTextForClassification):
    """Vision tower + language model, a classifier over the answers (arXiv 2403.09377, the VQAv2 experiments).

    As :class:`VisionTextForClassification`, but each answer is a yes-or-no decision of its own, learned from soft
    scores; ``num_labels`` is by default 3129, the answers of the published vocabulary.
    """

    former_names = ("ViTRobertaForVQA",)
    num_labels = 3129
    problem_type = "multi_label_classification"
    loss = staticmethod(soft_label_loss)

    @staticmethod
    def probabilities(logits: torch.Tensor) -> torch.Tensor:
        """logits [B, num_labels] -> float32 probabilities, each between 0 and 1 on its own."""
        return logits.float().sigmoid()


# The names of before, when the language model was always a RoBERTa.
ViTRobertaForClassification, ViTRobertaForVQA = VisionTextForClassification, VisionTextForVQA


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
