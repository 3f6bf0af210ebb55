"""Image captioning: a frozen ViT and a GPT-2 that writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from routingvl.backbones.text import fuse_gelu
from routingvl.config import ConfigError, RoutingConfig, check_choice
from routingvl.config.schema import CAPTION_LOSSES
from routingvl.data.collate import IGNORED
from routingvl.models.base import ModelOutput, RoutedVLModel
from routingvl.models.checks import check_tensor, check_values
from routingvl.models.losses import caption_loss, caption_loss_without_logits, caption_targets
from routingvl.models.output import UnalignedOutput


class ViTGPT2ForCaptioning(RoutedVLModel):
    """ViT + GPT-2 language model (arXiv 2403.09377, the COCO captioning experiments).

    Text is the caption and one end-of-text token; without a visual prefix a begin-of-text token stands in front.

    Args:
        caption_loss: "sound" (default): every token is predicted from what stands before it, the first one from the
            last visual token; labels of -100 do not count. "reference": the published loss, which never supervises
            the first token, ignores token id 0 and counts end-of-text padding.
        vision, text, routing, **shared: see :class:`RoutedVLModel`.
    """

    language_model_name = "gpt"
    model_type = "gpt2"

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
        self.caption_loss = caption_loss
        fuse_gelu(text)
        # The ids with which captions begin (without a visual prefix) and end, in training and in generation.
        self.end_token, start = text.config.eos_token_id, text.config.bos_token_id
        self.start_token = self.end_token if start is None else start
        if not isinstance(self.end_token, int) or not isinstance(self.start_token, int):
            raise ConfigError(f"the text model's config must name one end token (eos_token_id), not {self.end_token!r}")
        # In place of the backbone's own (generation_config.json), which could hold penalties or a least length.
        tokens = {"bos_token_id": self.start_token, "eos_token_id": self.end_token, "pad_token_id": self.end_token}
        text.generation_config = type(text.generation_config)(**tokens)
        self.config.pad_token_id = self.end_token
        # A head that is the embeddings once more stands once in the state: transformers' Trainer cannot save it twice.
        self.register_state_dict_post_hook(_leave_out_tied_head)
        self.register_load_state_dict_pre_hook(_put_back_tied_head)

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
        if labels is None and not return_logits:
            raise ValueError("return_logits=False leaves only the loss: pass labels=")
        if labels is not None:
            check_tensor("labels", labels, integers=True)
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            raise ValueError(f"labels {list(labels.shape)} must have the shape of input_ids")
        if labels is not None:
            check_values("labels", labels, 0, self.vocabulary_size - 1, f", or {IGNORED}", ignored=IGNORED)
        features = self.visual_features(pixel_values, vision_features)
        inputs = self.text_inputs(features, input_ids, attention_mask)
        with self.context.bind(features):
            if return_logits:
                logits = self.gpt(**inputs, use_cache=False).logits
            else:
                hidden = self.gpt.transformer(**inputs, use_cache=False).last_hidden_state
        if not return_logits:  # outside of the block: the compiled graph ends where the loss begins
            return ModelOutput(self._loss_without_logits(hidden, labels), None)
        if labels is None:
            # With a prefix there are more logits than labels, which is an error in evaluation anyway.
            unaligned = self.training or not self.visual_prefix
            return (UnalignedOutput if unaligned else ModelOutput)(None, logits)
        return ModelOutput(caption_loss(logits, self.next_tokens(labels)), logits)

    @torch.compiler.disable  # how many positions count differs from batch to batch
    def _loss_without_logits(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return caption_loss_without_logits(hidden, self.gpt.lm_head.weight, self.next_tokens(labels))

    def next_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [B, T] -> what each position is to predict, see :func:`~routingvl.models.losses.caption_targets`."""
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
        """Write captions with a key-value cache, by beam search or whatever ``kwargs`` ask of ``GPT2.generate``.

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
            what ``GPT2.generate`` returns, with these as its ``sequences``.

        Raises:
            ValueError: inputs do not fit each other or the position embeddings, or a number is below 1.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        num_beams = _first(num_beams, settings.num_beams, 1)
        max_new_tokens = _first(max_new_tokens, max_length, settings.max_new_tokens, settings.max_length, 20)
        input_ids = self.beginning(input_ids, attention_mask, labels)
        if min(num_beams, max_new_tokens) < 1:
            raise ValueError(f"num_beams={num_beams} and max_new_tokens={max_new_tokens} must be at least 1")
        features = self.visual_features(pixel_values, vision_features)
        start = self._start(features, input_ids)
        given = start["attention_mask"].shape[1]
        if (longest := given + max_new_tokens - 1) > self.max_positions:  # the last token is written, never read
            raise ValueError(
                f"max_new_tokens={max_new_tokens} behind {given} positions of image and text needs {longest}, and the "
                f"text model has {self.max_positions}"
            )
        # transformers lays the candidates of one image side by side, as rows of the image's one entry.
        beams = max(num_beams, _first(kwargs.get("num_return_sequences"), settings.num_return_sequences, 1))
        with self.context.bind(features, beams=beams, decoding=True):
            tokens = self.gpt.generate(
                **start, num_beams=num_beams, max_new_tokens=max_new_tokens, use_cache=True, **kwargs
            )
        if "input_ids" in start:  # started from embeddings, generate returns the new tokens alone
            if isinstance(tokens, torch.Tensor):
                return tokens[:, given:]
            tokens.sequences = tokens.sequences[:, given:]
        return tokens

    def _start(self, features: torch.Tensor, input_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        if not self.visual_prefix:
            start = torch.full((len(features), 1), self.start_token, device=features.device)
            input_ids = start if input_ids is None else torch.cat([start, input_ids], dim=1)
        elif input_ids is None:
            return {
                "inputs_embeds": features,
                "attention_mask": features.new_ones(features.shape[:2], dtype=torch.long),
            }
        return self.text_inputs(features, input_ids, None)


def _first(*values: int | None) -> int:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _tied_head(model: ViTGPT2ForCaptioning, prefix: str) -> tuple[str, str] | None:
    """The names of head and embeddings in a state, where they are one weight."""
    tied = model.gpt.lm_head.weight is model.gpt.get_input_embeddings().weight
    return (f"{prefix}gpt.lm_head.weight", f"{prefix}gpt.transformer.wte.weight") if tied else None


def _leave_out_tied_head(model: ViTGPT2ForCaptioning, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    if names := _tied_head(model, prefix):
        state.pop(names[0], None)


def _put_back_tied_head(model: ViTGPT2ForCaptioning, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    names = _tied_head(model, prefix)
    if names and names[1] in state:
        state.setdefault(names[0], state[names[1]])
