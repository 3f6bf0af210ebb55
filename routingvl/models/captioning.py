"""Image captioning: a frozen vision tower and a language model that writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from routingvl.backbones.text import DECODER, ENCODER_DECODER
from routingvl.bottlenecks.rows import Tokens
from routingvl.config import ConfigError, RoutingConfig, check_choice
from routingvl.config.schema import CAPTION_LOSSES
from routingvl.data.collate import IGNORED
from routingvl.models.losses import caption_targets
from routingvl.models.output import ModelOutput
from routingvl.models.writing import WritingVLModel


class VisionTextForCaptioning(WritingVLModel):
    """Vision tower + language model that writes (arXiv 2403.09377, the COCO captioning experiments, with GPT-2).

    The language model is a decoder, whose text is the caption and one end token behind the visual prefix (without one
    a begin token stands in front); or an encoder-decoder, whose encoder reads the visual prefix (without one an end
    token), and whose decoder writes the caption and one end token.

    Args:
        caption_loss: "sound" (default): every token is predicted from what stands before it, the first one from the
            last visual token; labels of -100 do not count. "reference": the published loss, which never supervises
            the first token, ignores token id 0 and counts end-of-text padding (decoders only).
        vision, text, routing, **shared: see :class:`RoutedVLModel`.
    """

    former_names = ("ViTGPT2ForCaptioning",)

    def __init__(
        self,
        vision: nn.Module | None,
        text: nn.Module,
        routing: RoutingConfig,
        *,
        caption_loss: str = "sound",
        **shared: Any,
    ) -> None:
        check_choice("caption_loss", caption_loss, CAPTION_LOSSES)
        super().__init__(vision, text, routing, **shared)
        if caption_loss == "reference" and self.text_kind != DECODER:
            raise ConfigError("caption_loss='reference' is of a decoder, such as GPT-2: take 'sound'")
        self.caption_loss = caption_loss

    @property
    def written_behind(self) -> bool:
        """Whether captions need no begin token: the image, or a decoder's own start token, stands in front of them."""
        return self.visual_prefix or self.text_kind == ENCODER_DECODER

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_logits: bool = True,
    ) -> ModelOutput:
        """Score captions.

        Args:
            pixel_values, vision_features: one of them, see :meth:`visual_features`.
            input_ids: [B, T] captions.
            attention_mask: [B, T] of the text, 1 for tokens to read; None for all.
            labels: [B, T], input_ids with -100 where nothing is to be learned. They may stay on the CPU, which spares
                a wait for the device without logits.
            return_logits: False computes the loss from the positions that count, a chunk at a time, see
                :func:`~routingvl.models.losses.linear_cross_entropy`: what training does, to save memory and time.

        Returns:
            Cross entropy in nats, mean over the tokens that count (0 if none does), and logits [B, L + T, vocabulary]
            ([B, T, ...] without visual prefix), or None.

        Raises:
            ValueError: inputs do not fit each other, or neither labels nor logits are wanted.
        """
        self.check_labels(labels, return_logits)
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            raise ValueError(f"labels {list(labels.shape)} must have the shape of input_ids")
        image = Tokens(self.visual_features(pixel_values, vision_features), None)
        if self.text_kind == DECODER:
            inputs = self.text_inputs(image.features, input_ids, attention_mask)
        else:
            attention_mask = self.check_text(image.features, input_ids, attention_mask)
            inputs = self.encoder_inputs(image)
            inputs["decoder_input_ids"] = self.decoder_inputs(input_ids.masked_fill(attention_mask == 0, IGNORED))
        return self.score(self.read(image, inputs, return_logits), labels, return_logits)

    def next_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """See :meth:`WritingVLModel.next_tokens`, and of decoders :func:`~routingvl.models.losses.caption_targets`."""
        if self.text_kind == ENCODER_DECODER:
            return labels
        return caption_targets(labels, self.caption_loss, self.visual_prefix)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        num_beams: int | None = None,
        max_new_tokens: int | None = None,
        *,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write captions with a key-value cache, by beam search or what ``kwargs`` ask of transformers' ``generate``.

        What no argument says, ``generation_config`` does: that of the call, else the model's, which names the tokens
        and nothing else until someone sets more. The backbone's own generation_config.json is not read.

        Args:
            pixel_values, vision_features: one of them, see :meth:`visual_features`.
            input_ids: [B, T] the beginning of each caption, without padding; None to start from the image.
            num_beams: width of the beam, by default 1.
            max_new_tokens: length limit, by default 20; image, beginning and new tokens have to fit the position
                embeddings.
            attention_mask, labels, max_length: as Seq2SeqTrainer passes them: see :meth:`beginning`; ``max_length``
                is ``max_new_tokens`` by the name that it has there.
            **kwargs: passed on to transformers' ``generate`` (num_return_sequences, do_sample, length_penalty ...).

        Returns:
            Long [B * num_return_sequences, new tokens], padded with end-of-text; with ``return_dict_in_generate=True``
            what transformers' ``generate`` returns, with these as its ``sequences``.

        Raises:
            ValueError: inputs do not fit each other or the position embeddings, or a number is below 1.
        """
        lengths = self.lengths(num_beams, max_new_tokens, max_length, **kwargs)
        input_ids = self.beginning(input_ids, attention_mask, labels)
        image = Tokens(self.visual_features(pixel_values, vision_features), None)
        return self.write(image, self._start(image, input_ids), lengths, **kwargs)

    def _start(self, image: Tokens, input_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What generation starts from: the images, and the beginning of each caption where there is one."""
        features = image.features
        first = torch.full((len(features), 1), self.start_token, device=features.device)
        if self.text_kind == ENCODER_DECODER:
            if input_ids is not None:
                self.check_text(features, input_ids, None)
                first = torch.cat([first, input_ids], dim=1)
            return {**self.encoder_inputs(image), "decoder_input_ids": first}
        if not self.visual_prefix:
            input_ids = first if input_ids is None else torch.cat([first, input_ids], dim=1)
        elif input_ids is None:
            return self.image_inputs(features)
        return self.text_inputs(features, input_ids, None)


# The name of before, when the language model was always a GPT-2.
ViTGPT2ForCaptioning = VisionTextForCaptioning
