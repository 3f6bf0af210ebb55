"""What the models share whose language model writes: their tokens, the loss of what is written, generation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from routingvl.backbones.text import DECODER, ENCODER_DECODER, WRITE, fuse_gelu, has_plain_head, text_kind, token_ids
from routingvl.bottlenecks.rows import Tokens
from routingvl.config import ConfigError, RoutingConfig
from routingvl.data.collate import IGNORED
from routingvl.models.base import ModelOutput, RoutedVLModel
from routingvl.models.checks import check_tensor, check_values
from routingvl.models.losses import caption_loss, caption_loss_without_logits
from routingvl.models.output import UnalignedOutput


class WritingVLModel(RoutedVLModel):
    """Vision tower + language model that writes. Use a subclass.

    Args:
        vision, text, routing, **shared: see :class:`RoutedVLModel`.

    Raises:
        ConfigError: as of :class:`RoutedVLModel`, or the text model's config names no end token.
    """

    text_use = WRITE

    def __init__(self, vision: nn.Module | None, text: nn.Module, routing: RoutingConfig, **shared: Any) -> None:
        writes = isinstance(text, nn.Module) and text_kind(text) in (DECODER, ENCODER_DECODER)
        plain_head = writes and has_plain_head(text)
        super().__init__(vision, text, routing, **shared)
        self._has_plain_head = plain_head
        fuse_gelu(text)
        # The ids with which texts begin (without a visual prefix) and end, in training and in generation.
        self.end_tokens = token_ids(text.config.eos_token_id)
        if not self.end_tokens:
            raise ConfigError("the text model's config must name an end token (eos_token_id), and it is None")
        start = token_ids(getattr(text.config, "bos_token_id", None))
        self.end_token = self.end_tokens[0]
        self.start_token = start[0] if start else self.end_token
        if self.text_kind == ENCODER_DECODER:
            self.start_token = self.decoder_inputs(torch.tensor([[self.end_token]], device=self.device)).item()
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

    def check_labels(self, labels: torch.Tensor | None, return_logits: bool) -> None:
        """Raise ValueError for labels that are no tokens of the vocabulary or -100, or where nothing is wanted."""
        if labels is None and not return_logits:
            raise ValueError("return_logits=False leaves only the loss: pass labels=")
        if labels is not None:
            check_tensor("labels", labels, integers=True)
            check_values("labels", labels, 0, self.vocabulary_size - 1, f", or {IGNORED}", ignored=IGNORED)

    def next_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """labels [B, T] -> what each position is to predict, -100 where none counts: of a decoder in an
        encoder-decoder the labels as they stand, since its input begins with a start token.
        """
        return labels

    def read(self, image: Tokens, inputs: dict[str, torch.Tensor], return_logits: bool) -> torch.Tensor:
        """The language model's logits for its ``inputs`` with ``image`` bound; its last hidden states where the loss
        alone is wanted and needs no more.
        """
        with self.bind(*image):
            if self._has_plain_head and not return_logits:
                return self.language_model.base_model(**inputs, use_cache=False).last_hidden_state
            return self.language_model(**inputs, use_cache=False).logits

    def score(self, found: torch.Tensor, labels: torch.Tensor | None, return_logits: bool) -> ModelOutput:
        """Loss and logits from what :meth:`read` gave. Compiled graphs may end where this is called."""
        if self._has_plain_head and not return_logits:
            return ModelOutput(self._loss_without_logits(found, labels), None)
        logits = found
        if labels is None:
            return (UnalignedOutput if self.text_kind == DECODER else ModelOutput)(None, logits)
        loss = caption_loss(logits, self.next_tokens(labels).to(logits.device))
        return ModelOutput(loss, logits if return_logits else None)

    @torch.compiler.disable  # how many positions count differs from batch to batch
    def _loss_without_logits(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weight = self.language_model.get_output_embeddings().weight
        return caption_loss_without_logits(hidden, weight, self.next_tokens(labels))

    def lengths(
        self, num_beams: int | None, max_new_tokens: int | None, max_length: int | None, **options: Any
    ) -> dict[str, int]:
        """``num_beams`` and ``max_new_tokens`` of a call of ``generate``: its own, else generation_config's."""
        settings = options.get("generation_config") or self.generation_config
        num_beams = _first(num_beams, settings.num_beams, 1)
        max_new_tokens = _first(max_new_tokens, max_length, settings.max_new_tokens, settings.max_length, 20)
        if min(num_beams, max_new_tokens) < 1:
            raise ValueError(f"num_beams={num_beams} and max_new_tokens={max_new_tokens} must be at least 1")
        return {"num_beams": num_beams, "max_new_tokens": max_new_tokens}

    def write(self, image: Tokens, start: dict[str, torch.Tensor], lengths: dict[str, int], **options: Any) -> Any:
        """What transformers' ``generate`` writes from ``start``, with ``image`` bound: the new tokens alone.

        Raises:
            ValueError: they do not fit the position embeddings.
        """
        written = start.get("decoder_input_ids", start["attention_mask"])  # where the new tokens follow
        given, new = written.shape[1], lengths["max_new_tokens"]
        if (longest := given + new - 1) > self.max_positions:  # the last token is written, never read
            raise ValueError(
                f"max_new_tokens={new} behind {given} positions of image and text needs {longest}, and the "
                f"text model has {self.max_positions}"
            )
        # transformers lays the candidates of one image side by side, as rows of the image's one entry.
        # An encoder reads the images once, its decoder once for each candidate: that is seen at each call.
        settings = options.get("generation_config") or self.generation_config
        beams = max(lengths["num_beams"], _first(options.get("num_return_sequences"), settings.num_return_sequences, 1))
        beams = beams if self.text_kind == DECODER else None
        with self.bind(*image, beams=beams, decoding=True):
            tokens = self.language_model.generate(**start, **lengths, use_cache=True, **options)
        if "inputs_embeds" not in start or "decoder_input_ids" in start:  # else it returns the new tokens alone
            if isinstance(tokens, torch.Tensor):
                return tokens[:, given:]
            tokens.sequences = tokens.sequences[:, given:]
        return tokens

    def encoder_inputs(self, image: Tokens) -> dict[str, torch.Tensor]:
        """What an encoder reads of images alone: them, or where they are no prefix an empty text, an end token."""
        features, mask = image
        if self.visual_prefix:
            if (length := features.shape[1]) > self.max_positions:
                raise ValueError(f"{length} visual tokens exceed the text model's {self.max_positions} positions")
            inputs = self.image_inputs(features)
            return inputs if mask is None else inputs | {"attention_mask": mask.long()}
        ids = torch.full((len(features), 1), self.end_token, device=features.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def decoder_inputs(self, labels: torch.Tensor) -> torch.Tensor:
        """What a decoder reads to predict labels [B, T], -100 for padding: they begin with its start token."""
        return self.language_model.prepare_decoder_input_ids_from_labels(labels=labels)


def _first(*values: int | None) -> int:
    """The first that is not None."""
    return next(value for value in values if value is not None)


def _repeated(model: WritingVLModel, prefix: str) -> dict[str, str]:
    """The names in a state under which a weight stands once more (a head that is the embeddings), and its first."""
    first: dict[int, str] = {}
    named = model.named_parameters(prefix.removesuffix("."), remove_duplicate=False)
    pairs = {name: first.setdefault(id(weight), name) for name, weight in named}
    return {name: known for name, known in pairs.items() if name != known}


def _leave_out_repeated(model: WritingVLModel, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in _repeated(model, prefix):
        state.pop(name, None)


def _put_back_repeated(model: WritingVLModel, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, known in _repeated(model, prefix).items():
        if known in state:
            state.setdefault(name, state[known])
