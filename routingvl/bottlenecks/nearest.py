"""Which image each token of a text reads where a row has several: the nearest before it, within its own text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from routingvl.bottlenecks.rows import BindingError, packed_tokens, position_begins, token_ids


def nearest_images(
    outputs: Sequence[torch.Tensor], input_ids: torch.Tensor | None, batch: Mapping[str, Any], config: Any, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of each image that a module gave, and which of them each token of the text reads.

    The tokens take the places of the ids for them, in order. An image is an entry of an output [entries, n, d], or the
    tokens [N, d] whose places stand side by side. Several texts may be packed into a row: an image serves its own.

    Args:
        outputs: visual tokens, each [N, d] or [entries, n, d].
        input_ids: [B, T].
        batch: the arguments of the call, for where texts begin: position_ids, cu_seq_lens_q or seq_idx.
        config: the model's, with the ids that stand for visual tokens.
        name: what gave the outputs, for the error.

    Returns:
        Features [I, 1, d] and the index, int64 [B, T], -1 for tokens before their text's first image.

    Raises:
        BindingError: the tokens do not fit the places, or the model has an encoder and a decoder.
    """
    if any(getattr(of, "is_encoder_decoder", False) for of in (config, getattr(config, "text_config", None))):
        raise BindingError("image_pooling='nearest' is for decoders: a decoder behind an encoder has a text of its own")
    places = []
    if isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2:
        places = [at for at in (input_ids == value for value in token_ids(config)) if at.any()]
    counts, given = [int(at.sum()) for at in places], [output.flatten(0, -2).shape[0] for output in outputs]
    if counts and sum(given) == counts[0]:
        kinds = [(places[0], outputs)]
    elif counts and given == counts:
        kinds = [(at, [output]) for at, output in zip(places, outputs, strict=True)]
    else:
        raise BindingError(
            f"{name} gave {' and '.join(str(list(x.shape)) for x in outputs)}, and input_ids have "
            f"{' and '.join(map(str, counts)) or 'no'} places for visual tokens: image_pooling='nearest' needs a "
            "module whose tokens take those places, or a function of the batch that returns features, a mask (or None) "
            "and an image_index"
        )
    image_at, sizes = torch.full_like(input_ids, -1, dtype=torch.int64), []
    for at, of_kind in kinds:
        number = _image_of_place(at, of_kind)
        image_at[at] = number + sum(map(len, sizes))
        sizes.append(torch.bincount(number.cpu()))
    tokens = torch.cat([output.flatten(0, -2) for _, of_kind in kinds for output in of_kind])
    features = packed_tokens([(torch.cat(sizes), tokens)]).mean().features
    return features, _nearest(image_at, _text_starts(batch, input_ids))


def _image_of_place(at: torch.Tensor, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The number of the image of each place, in order; ``at`` bool [B, T] says where places are."""
    if all(output.dim() == 3 for output in outputs):
        sizes = torch.tensor([output.shape[1] for output in outputs for _ in range(len(output))], device=at.device)
        return torch.arange(len(sizes), device=at.device).repeat_interleave(sizes)
    begins = at.clone()
    begins[:, 1:] &= ~at[:, :-1]
    return begins.flatten().cumsum(0)[at.flatten()] - 1


def _text_starts(batch: Mapping[str, Any], input_ids: torch.Tensor) -> torch.Tensor:
    """For each token [B, T] the place in the row where its text begins."""
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    found = position_begins(batch, len(input_ids))
    if found is not None and found.shape == begins.shape:
        begins |= found
    if (lengths := batch.get("cu_seq_lens_q")) is not None:
        begins.view(-1)[lengths[lengths < begins.numel()].long()] = True  # its end may stand there several times
    if (texts := batch.get("seq_idx")) is not None:
        begins[:, 1:] |= texts[:, 1:] != texts[:, :-1]
    return torch.where(begins, _columns(begins), 0).cummax(1).values


def _nearest(image_at: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The image of the last place up to each token, -1 where there is none in its text."""
    last = torch.where(image_at >= 0, _columns(image_at), -1).cummax(1).values
    return torch.where((last >= 0) & (last >= starts), image_at.gather(1, last.clamp(min=0)), -1)


def _columns(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
