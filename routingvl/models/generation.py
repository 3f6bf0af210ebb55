"""Texts from images and texts: a frozen vision tower and an encoder-decoder, such as BART or T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from routingvl.backbones.text import ENCODER_DECODER, text_kind
from routingvl.bottlenecks.rows import Tokens
from routingvl.config import ConfigError, RoutingConfig
from routingvl.models.checks import check_tensor
from routingvl.models.output import ModelOutput
from routingvl.models.writing import WritingVLModel


class VisionTextForGeneration(WritingVLModel):
    """Vision tower + encoder-decoder: the encoder reads an image or several and a text, the decoder writes another.

    The setting of arXiv 2403.09377 with BART and CLIP: answers to questions, and captions, from one model. The encoder
    reads the visual tokens (unless ``visual_prefix`` is off) and the text behind them; without both an end token.

    Args:
        vision, text, routing, **shared: see :class:`RoutedVLModel`.

    Raises:
        ConfigError: as of :class:`RoutedVLModel`, or the text model is no encoder-decoder.
    """

    def __init__(self, vision: nn.Module | None, text: nn.Module, routing: RoutingConfig, **shared: Any) -> None:
        if isinstance(text, nn.Module) and (kind := text_kind(text)) != ENCODER_DECODER:
            raise ConfigError(
                f"generated answers need an encoder-decoder, such as BART or T5, and the text model is of type "
                f"{text.config.model_type!r}, {kind}"
            )
        super().__init__(vision, text, routing, **shared)

    def images(
        self,
        pixel_values: torch.Tensor | None,
        vision_features: torch.Tensor | None,
        image_mask: torch.Tensor | None = None,
    ) -> Tokens:
        """Features [B, n * L, d] of the n images of each text, and which of them are there.

        Args:
            pixel_values, vision_features: one of them: [B, 3, H, W] and [B, L, d] of one image each, or [B, n, 3, H, W]
                and [B, n, L, d].
            image_mask: bool [B, n], False where an image is padding; None for none.

        Raises:
            ValueError: as of :meth:`visual_features`; the mask does not fit, or a text has no image.
        """
        features = self.visual_features(pixel_values, vision_features)
        if image_mask is None:
            return Tokens(features, None)
        given, one = (vision_features, 3) if pixel_values is None else (pixel_values, 4)
        number = 1 if given.dim() == one else given.shape[1]
        check_tensor("image_mask", image_mask)
        if image_mask.dtype != torch.bool or image_mask.shape != (len(features), number):
            have, want = f"{image_mask.dtype} {list(image_mask.shape)}", [len(features), number]
            raise ValueError(f"image_mask must be torch.bool {want}, an entry for each image, not {have}")
        return Tokens(features, image_mask.to(features.device).repeat_interleave(features.shape[1] // number, dim=1))

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        return_logits: bool = True,
    ) -> ModelOutput:
        """Score what is written.

        Args:
            pixel_values, vision_features, image_mask: see :meth:`images`.
            input_ids: [B, T] texts to read; None for images alone.
            attention_mask: [B, T] of the text, 1 for tokens to read; None for all.
            labels: [B, S] texts to be written, -100 where nothing is to be learned.
            decoder_input_ids: [B, S] what the decoder reads; None for the labels behind a start token.
            return_logits: False returns the loss alone.

        Returns:
            Cross entropy in nats, mean over the labels that count (0 if none does), and logits [B, S, vocabulary].

        Raises:
            ValueError: inputs do not fit each other, or there is nothing that the decoder could read.
        """
        self.check_labels(labels, return_logits)
        image = self.images(pixel_values, vision_features, image_mask)
        inputs = self._reads(image, input_ids, attention_mask)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("pass labels= (or decoder_input_ids=), the texts to be scored")
            decoder_input_ids = self.decoder_inputs(labels.to(self.device))
        check_tensor("decoder_input_ids", decoder_input_ids, 2, integers=True)
        batch, length = decoder_input_ids.shape
        if batch != len(image.features):
            raise ValueError(f"labels have batch {batch}, the images {len(image.features)}")
        if labels is not None and labels.shape != decoder_input_ids.shape:
            raise ValueError(f"labels {list(labels.shape)} must have the shape of decoder_input_ids {[batch, length]}")
        if length > self.max_positions:
            raise ValueError(f"labels of {length} tokens exceed the text model's {self.max_positions} positions")
        found = self.read(image, {**inputs, "decoder_input_ids": decoder_input_ids}, return_logits)
        return self.score(found, labels, return_logits)

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
        image_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Write texts with a key-value cache, by beam search or what ``kwargs`` ask of transformers' ``generate``.

        The encoder runs once for each text; its states serve all beams. ``generation_config`` says what no argument
        does, see :meth:`VisionTextForCaptioning.generate`.

        Args:
            pixel_values, vision_features, image_mask: see :meth:`images`.
            input_ids, attention_mask: [B, T] texts to read, and their mask; None for images alone.
            num_beams: width of the beam, by default 1.
            max_new_tokens: length limit, by default 20.
            labels: [B, S], not read: Seq2SeqTrainer passes them along.
            decoder_input_ids: [B, S] the start token and the beginning of each text; None for the start token.
            max_length: ``max_new_tokens`` by the name that Seq2SeqTrainer has for it.
            **kwargs: passed on to transformers' ``generate`` (num_return_sequences, do_sample, length_penalty ...).

        Returns:
            Long [B * num_return_sequences, new tokens], padded with end-of-text; with ``return_dict_in_generate=True``
            what transformers' ``generate`` returns, with these as its ``sequences``.

        Raises:
            ValueError: inputs do not fit each other or the position embeddings, or a number is below 1.
        """
        lengths = self.lengths(num_beams, max_new_tokens, max_length, **kwargs)
        image = self.images(pixel_values, vision_features, image_mask)
        if decoder_input_ids is None:
            decoder_input_ids = torch.full((len(image.features), 1), self.start_token, device=self.device)
        start = {**self._reads(image, input_ids, attention_mask), "decoder_input_ids": decoder_input_ids}
        return self.write(image, start, lengths, **kwargs)

    def _reads(
        self, image: Tokens, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The encoder's arguments: the images in front of the texts."""
        if input_ids is None:
            return self.encoder_inputs(image)
        inputs = self.text_inputs(image.features, input_ids, attention_mask)
        if not self.visual_prefix or image.mask is None:
            return inputs
        texts = inputs["attention_mask"][:, image.mask.shape[1] :]
        mask = torch.cat([image.mask.to(texts.dtype), texts], dim=1)
        # Images that are not there go behind the text, so that its positions are those of the images that are.
        order = mask.argsort(dim=1, descending=True, stable=True)
        embeds = inputs["inputs_embeds"].gather(1, order.unsqueeze(2).expand_as(inputs["inputs_embeds"]))
        return inputs | {"inputs_embeds": embeds, "attention_mask": mask.gather(1, order)}
