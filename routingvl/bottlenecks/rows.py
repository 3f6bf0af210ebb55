"""Which visual tokens belong to which row of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

# The ids, in a model's config, that stand in the text where visual tokens belong; in the order of their encoding.
TOKEN_IDS = (("image_token_id", "image_token_index"), ("video_token_id", "video_token_index"))
# What callers pass when several texts are packed into one row.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


class BindingError(ValueError):
    """The image cannot be brought to the routed layers; the message says what was given and what is needed."""


class Tokens(NamedTuple):
    """features [B, L, d] and mask bool [B, L], False for padding, or None."""

    features: torch.Tensor
    mask: torch.Tensor | None

    def mean(self) -> Tokens:
        """The mean of each row's own tokens [B, 1, d], and which rows have any."""
        features, mask = self
        if mask is None:
            return Tokens(features if features.shape[1] == 1 else features.mean(1, keepdim=True), None)
        mask = mask.to(features.device)
        total = features.masked_fill(~mask.unsqueeze(2), 0).sum(1, keepdim=True, dtype=_wide(features))
        counts = mask.sum(1).clamp(min=1).view(-1, 1, 1)
        return Tokens((total / counts).to(features.dtype), mask.any(1, keepdim=True))


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def check_mask(mask: torch.Tensor, features: torch.Tensor, text_only: str | None) -> tuple[bool, bool]:
    """Whether every row has a token, and whether all are tokens; ValueError where the mask [B, L] is not allowed."""
    if mask.dtype != torch.bool or mask.shape != features.shape[:2]:
        have = f"{mask.dtype} {list(mask.shape)}"
        raise ValueError(f"mask must be torch.bool {list(features.shape[:2])} like the features' tokens, not {have}")
    present = mask.any(1)
    somewhere, everywhere = torch.stack([present.all(), mask.all()]).tolist()  # one wait for the device
    if not somewhere and text_only is None:
        rows = (~present).nonzero().flatten().tolist()
        raise ValueError(f"rows {rows} of the mask have no visual token: say text_only='skip' or 'zero' for such texts")
    return somewhere, everywhere


def tensors_of(output: Any, name: str) -> list[torch.Tensor]:
    """The visual tokens in a module's output: a tensor, several of them, or a ModelOutput's last hidden state."""
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state")
    elif isinstance(output, tuple):
        output = output[0] if output else None
    tensors = list(output) if isinstance(output, list | tuple) else [output]
    if not tensors or any(not isinstance(t, torch.Tensor) or t.dim() not in (2, 3) for t in tensors):
        raise BindingError(
            f"{name} gives no visual tokens [.., tokens, width]: name a sub-module whose output is a "
            "tensor, or give a function of the batch"
        )
    return tensors


def place_in_rows(outputs: Sequence[torch.Tensor], input_ids: torch.Tensor | None, config: Any, name: str) -> Tokens:
    """Visual tokens, each [N, d] or [entries, n, d], as the features of each row of ``input_ids`` [B, T].

    Tokens take the places of the ids for them, in order. Where there is no such id (or no input_ids), an entry belongs
    to a row; where there is and the numbers differ, each entry to one of the rows with ids.

    Raises:
        BindingError: they fit neither.
    """
    places = _places(input_ids, config)
    if not places:
        features = outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))
        return Tokens(features if features.dim() == 3 else features.unsqueeze(1), None)
    images = places[0]
    flat = [output.flatten(0, -2) for output in outputs]
    if sum(map(len, flat)) == int(images.sum()):
        return packed_tokens([(images, torch.cat(flat))])
    if len(flat) == len(places) and all(len(x) == int(at.sum()) for x, at in zip(flat, places, strict=True)):
        return packed_tokens(list(zip(places, flat, strict=True)))
    rows = (images > 0).nonzero().flatten()
    if all(output.dim() == 3 for output in outputs) and len({output.shape[1] for output in outputs}) == 1:
        entries = torch.cat(list(outputs))
        if len(entries) == len(rows):
            counts = torch.zeros_like(images)
            counts[rows] = entries.shape[1]
            return packed_tokens([(counts, entries.flatten(0, 1))])
    raise BindingError(
        f"{name} gave {' and '.join(str(list(x.shape)) for x in outputs)} for {sum(map(len, flat))} visual tokens, and "
        f"the rows of input_ids have places for {' and '.join(str(at.tolist()) for at in places)}: name a module whose "
        "tokens take those places, or give a function of the batch that returns features [B, L, d] and a mask"
    )


def has_places(input_ids: torch.Tensor | None, config: Any) -> bool:
    """Whether the text has ids in it that stand for visual tokens."""
    return isinstance(input_ids, torch.Tensor) and bool(_places(input_ids, config))


def ids_of(embeds: torch.Tensor, embeddings: torch.nn.Module, config: Any) -> torch.Tensor | None:
    """The ids that stand for visual tokens among ``embeds`` [B, T, d], -1 elsewhere; None for a model without such.

    Vision-language models that are given embeddings find the places in the same way.
    """
    known = [value for keys in TOKEN_IDS for key in keys if (value := getattr(config, key, None)) is not None]
    if not known or embeds.dim() != 3:
        return None
    ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
    for token in known:
        with torch.no_grad():
            place = embeddings(torch.tensor(token, device=embeds.device))
        ids[(embeds == place.to(embeds.dtype)).all(2)] = token
    return ids


def token_ids(config: Any) -> list[int]:
    """The ids that stand for visual tokens, one for each kind that the model has."""
    known = [
        next((value for key in keys if (value := getattr(config, key, None)) is not None), None) for keys in TOKEN_IDS
    ]
    return [value for value in known if value is not None]


def _places(input_ids: torch.Tensor | None, config: Any) -> list[torch.Tensor]:
    """How many visual tokens of each kind every row has a place for [B], on the CPU; kinds without any left out."""
    if input_ids is None or input_ids.dim() != 2:
        return []
    found = torch.stack([(input_ids == value).sum(1) for value in token_ids(config)] or [input_ids[:, 0] * 0])
    return [counts for counts in found.cpu() if counts.any()]


def packed_tokens(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Tokens:
    """The rows made of (how many tokens each row takes [B], tokens [N, d]), one part after the other in each row."""
    rows = torch.cat([torch.arange(len(counts)).repeat_interleave(counts) for counts, _ in parts])
    tokens = torch.cat([part for _, part in parts]) if len(parts) > 1 else parts[0][1]
    total = sum(counts for counts, _ in parts)
    if len(parts) > 1:
        order = rows.argsort(stable=True)
        rows, tokens = rows[order], tokens[order.to(tokens.device)]
    longest = int(total.max())
    if (total == longest).all():
        return Tokens(tokens.view(len(total), longest, -1), None)
    mask = torch.arange(longest) < total.unsqueeze(1)
    features = tokens.new_zeros(len(total), longest, tokens.shape[1])
    return Tokens(features.masked_scatter(mask.unsqueeze(2).to(tokens.device), tokens), mask)


def position_begins(batch: Mapping[str, Any], rows: int = 1) -> torch.Tensor | None:
    """Where texts begin by a call's position_ids, bool [rows, T]; None where it has none that say so.

    As transformers sees it: where a position is not the one before it plus 1. Of the four kinds of positions that
    Qwen2-VL takes the first are those of the text; its three kinds do not say where a text begins. Padding is no text.
    """
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(positions, torch.Tensor):
        return None
    if positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]
    if positions.dim() != 2:
        return None
    if len(positions) == 1:  # for every row
        positions = positions.expand(rows, -1)
    real = torch.ones_like(positions, dtype=torch.bool)
    if isinstance(mask, torch.Tensor) and mask.shape == positions.shape:
        real = mask != 0
    columns = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    before = torch.where(real, columns, -1).cummax(1).values.roll(1, 1)  # the last token that is no padding
    before[:, :1] = -1
    goes_on = (before >= 0) & (positions == positions.gather(1, before.clamp(min=0)) + 1)
    begins = real & ~goes_on
    return begins


def refuse_packed_rows(batch: Mapping[str, Any]) -> None:
    """Raise BindingError where one row of the batch is several texts, which may each have an image."""
    packed = any(batch.get(key) is not None for key in PACKED)
    begins = position_begins(batch)
    if begins is not None:
        packed = packed or bool((begins.sum(1) > 1).any())
    if packed:
        raise BindingError(
            "several texts are packed into one row (position_ids begin again, or cu_seq_lens_q is given), and a row is "
            "routed with one image: give each text its row (a padding collator, packing=False), or each token "
            "the nearest image before it (image_pooling='nearest'), or bind by hand with image_index="
        )
