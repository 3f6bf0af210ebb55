"""Image captioning: a frozen vision tower and a language model that writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from routingvl.backbones.text import DECODER, ENCODER_DECODER, WRITE, fuse_gelu, has_plain_head, text_kind, token_ids
from routingvl.config import ConfigError, RoutingConfig, check_choice
from routingvl.config.schema import CAPTION_LOSSES
from routingvl.data.collate import IGNORED
from routingvl.models.base import ModelOutput, RoutedVLModel
from routingvl.models.checks import check_tensor, check_values
from routingvl.models.losses import caption_loss, caption_loss_without_logits, caption_targets
from routingvl.models.output import UnalignedOutput


class VisionTextForCaptioning(RoutedVLModel):
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

    text_use = WRITE
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
        plain_head = has_plain_head(text) if isinstance(text, nn.Module) and text_kind(text) == DECODER else False
        super().__init__(vision, text, routing, **shared)
        if caption_loss == "reference" and self.text_kind != DECODER:
            raise ConfigError("caption_loss='reference' is of a decoder, such as GPT-2: take 'sound'")
        self.caption_loss = caption_loss
        self._has_plain_head = plain_head
        fuse_gelu(text)
        # The ids with which captions begin (without a visual prefix) and end, in training and in generation.
        self.end_tokens = token_ids(text.config.eos_token_id)
        if not self.end_tokens:
            raise ConfigError("the text model's config must name an end token (eos_token_id), and it is None")
        start = token_ids(getattr(text.config, "bos_token_id", None))
        self.end_token = self.end_tokens[0]
        self.start_token = start[0] if start else self.end_token
        if self.text_kind == ENCODER_DECODER:
            self.start_token = self._decoder_inputs(torch.tensor([[self.end_token]], device=self.device)).item()
        # In place of the backbone's own (generation_config.json), which could hold penalties or a least length.
        ends = self.end_token if len(self.end_tokens) == 1 else self.end_tokens
        tokens = {"bos_token_id": self.start_token, "eos_token_id": ends, "pad_token_id": self.end_token}
        if self.text_kind == ENCODER_DECODER:
            tokens["decoder_start_token_id"] = self.start_token
        text.generation_config = type(text.generation_config)(**tokens)
        self.config.pad_token_id = self.end_token
        # A head that is the embeddings once more stands once in the state: transformers' Trainer cannot save it twice.
        self.register_state_dict_post_hook(_leave_out_repeated)
        self.register_load_state_dict_pre_hook(_put_back_repeated)

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
        if labels is None and not return_logits:
            raise ValueError("return_logits=False leaves only the loss: pass labels=")
        if labels is not None:
            check_tensor("labels", labels, integers=True)
        if labels is not None and (input_ids is None or labels.shape != input_ids.shape):
            raise ValueError(f"labels {list(labels.shape)} must have the shape of input_ids")
        if labels is not None:
            check_values("labels", labels, 0, self.vocabulary_size - 1, f", or {IGNORED}", ignored=IGNORED)
        features = self.visual_features(pixel_values, vision_features)
        if self.text_kind == DECODER:
            inputs = self.text_inputs(features, input_ids, attention_mask)
        else:
            attention_mask = self.check_text(features, input_ids, attention_mask)
            inputs = self._encoder_inputs(features)
            inputs["decoder_input_ids"] = self._decoder_inputs(input_ids.masked_fill(attention_mask == 0, IGNORED))
        from_states = not return_logits and self._has_plain_head
        with self.context.bind(features):
            if from_states:
                hidden = self.language_model.base_model(**inputs, use_cache=False).last_hidden_state
            else:
                logits = self.language_model(**inputs, use_cache=False).logits
        if from_states:  # outside of the block: the compiled graph ends where the loss begins
            return ModelOutput(self._loss_without_logits(hidden, labels), None)
        if labels is None:
            return (UnalignedOutput if self.text_kind == DECODER else ModelOutput)(None, logits)
        loss = caption_loss(logits, self.next_tokens(labels).to(logits.device))
        return ModelOutput(loss, logits if return_logits else None)

    @torch.compiler.disable  # how many positions count differs from batch to batch
    def _loss_without_logits(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = self.language_model.get_output_embeddings().weight
        return caption_loss_without_logits(hidden, weight, self.next_tokens(labels))

    def next_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [B, T] -> what each position is to predict, see :func:`~routingvl.models.losses.caption_targets`.

        An encoder-decoder's positions predict the labels as they stand: its decoder's input begins with a start token.
        """
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
        settings = kwargs.get("generation_config") or self.generation_config
        num_beams = _first(num_beams, settings.num_beams, 1)
        max_new_tokens = _first(max_new_tokens, max_length, settings.max_new_tokens, settings.max_length, 20)
        input_ids = self.beginning(input_ids, attention_mask, labels)
        if min(num_beams, max_new_tokens) < 1:
            raise ValueError(f"num_beams={num_beams} and max_new_tokens={max_new_tokens} must be at least 1")
        features = self.visual_features(pixel_values, vision_features)
        start = self._start(features, input_ids)
        written = start.get("decoder_input_ids", start["attention_mask"])  # where the new tokens follow
        given = written.shape[1]
        if (longest := given + max_new_tokens - 1) > self.max_positions:  # the last token is written, never read
            raise ValueError(
                f"max_new_tokens={max_new_tokens} behind {given} positions of image and text needs {longest}, and the "
                f"text model has {self.max_positions}"
            )
        # transformers lays the candidates of one image side by side, as rows of the image's one entry.
        # An encoder reads the images once, its decoder once for each candidate: that is seen at each call.
        beams = max(num_beams, _first(kwargs.get("num_return_sequences"), settings.num_return_sequences, 1))
        beams = beams if self.text_kind == DECODER else None
        with self.context.bind(features, beams=beams, decoding=True):
            tokens = self.language_model.generate(
                **start, num_beams=num_beams, max_new_tokens=max_new_tokens, use_cache=True, **kwargs
            )
        if "inputs_embeds" not in start or "decoder_input_ids" in start:  # else it returns the new tokens alone
            if isinstance(tokens, torch.Tensor):
                return tokens[:, given:]
            tokens.sequences = tokens.sequences[:, given:]
        return tokens

    def _start(self, features: torch.Tensor, input_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """What generation starts from: the images, and the beginning of each caption where there is one."""
        first = torch.full((len(features), 1), self.start_token, device=features.device)
        if self.text_kind == ENCODER_DECODER:
            if input_ids is not None:
                self.check_text(features, input_ids, None)
                first = torch.cat([first, input_ids], dim=1)
            return {**self._encoder_inputs(features), "decoder_input_ids": first}
        if not self.visual_prefix:
            input_ids = first if input_ids is None else torch.cat([first, input_ids], dim=1)
        elif input_ids is None:
            return self.image_inputs(features)
        return self.text_inputs(features, input_ids, None)

    def _encoder_inputs(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """What an encoder reads: the images, or where they are no prefix an empty text, which is an end token."""
        if self.visual_prefix:
            if (length := features.shape[1]) > self.max_positions:
                raise ValueError(f"{length} visual tokens exceed the text model's {self.max_positions} positions")
            return self.image_inputs(features)
        ids = torch.full((len(features), 1), self.end_token, device=features.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def _decoder_inputs(self, labels: torch.Tensor) -> torch.Tensor:
        """What a decoder reads to predict labels [B, T], -100 for padding: they begin with its start token."""
        return self.language_model.prepare_decoder_input_ids_from_labels(labels=labels)


def _first(*values: int | None) -> int:
    """The first that is not None."""
    return next(value for value in values if value is not None)


# The name of before, when the language model was always a GPT-2.
ViTGPT2ForCaptioning = VisionTextForCaptioning


def _repeated(model: VisionTextForCaptioning, prefix: str) -> dict[str, str]:
    """The names in a state under which a weight stands once more (a head that is the embeddings), and its first."""
    first: dict[int, str] = {}
    named = model.named_parameters(prefix.removesuffix("."), remove_duplicate=False)
    pairs = {name: first.setdefault(id(weight), name) for name, weight in named}
    return {name: known for name, known in pairs.items() if name != known}


def _leave_out_repeated(model: VisionTextForCaptioning, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in _repeated(model, prefix):
        state.pop(name, None)


def _put_back_repeated(model: VisionTextForCaptioning, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, known in _repeated(model, prefix).items():
        if known in state:
            state.setdefault(name, state[known])
