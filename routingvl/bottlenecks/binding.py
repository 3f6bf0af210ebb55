"""What is bound while a model runs, and what a layer reads of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from routingvl.bottlenecks.image_index import ImageIndex
from routingvl.bottlenecks.rows import Tokens, check_mask
from routingvl.kernels import ImageCode

Weights = tuple[torch.Tensor, ...]


class Reading(NamedTuple):
    """The image as one layer is to read it.

    Attributes:
        v: features [B, L, K], zero where they are padding; None when the routing reads no image.
        code: what they come to in the layer where that is kept, see :meth:`VisualContext.image_code`.
        keep: bool, for [rows of text, T, 1], False where the bottleneck adds nothing; None: True everywhere.
        counted: bool [B, L], False where v is padding; None: True everywhere.
        index: int64 [rows of text, T], the entry of v that each token reads; None: rows belong to entries in order.
    """

    v: torch.Tensor | None
    code: ImageCode | None = None
    keep: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    index: torch.Tensor | None = None


@dataclass(eq=False)
class Binding:
    """What :meth:`VisualContext.bind` was given, and what became of it.

    Attributes:
        features: [B, L, d], zero where they are padding; None: no image.
        pooled: their mean over each entry's own tokens [B, 1, d].
        mask: bool [B, L], True for tokens; None for all.
        counted: the same, but that an entry without tokens (``text_only="zero"``) counts its first.
        present: bool [B], False where the bottleneck adds nothing; None: True everywhere.
        index: the image of each token of the text; None: rows belong to the entries in order. With it ``pooled`` and
            ``mask`` are those of its entries, and layers read nothing else.
        traced: whether it was made in code that is being traced.
        read: whether a layer ran in it without an image.
        kept: {layer: (state that its code was made in, its weights, its code or None)}. The weights are there so that
            no other tensor can come to stand at their addresses.
        recomputes: whether it is that of a recomputation.
        hidden: whether layers ran in it that a reentrant checkpoint may recompute.
        fault: what a layer that reads it raises: it could not be made.
    """

    features: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    beams: int | None = 1
    decoding: bool = False
    text_only: str | None = None
    mask: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    present: torch.Tensor | None = None
    index: ImageIndex | None = None
    traced: bool = False
    read: bool = False
    kept: dict[nn.Module, tuple[tuple, Weights, ImageCode | None]] = field(default_factory=dict)
    recomputes: bool = False
    hidden: bool = False
    fault: Exception | None = None

    @property
    def batch(self) -> int:
        """How many rows of text there are without beams."""
        return len(self.features) if self.index is None else len(self.index.index)

    def apply(self, mask: torch.Tensor) -> None:
        """Fill what depends on ``mask`` [B, L]."""
        somewhere, everywhere = check_mask(mask, self.features, self.text_only)
        mask = None if everywhere else mask.to(self.features.device)
        if mask is not None:
            self.features = self.features.masked_fill(~mask.unsqueeze(2), 0)
        self.pooled, present = Tokens(self.features, mask).mean()
        self.mask = self.counted = mask
        if not somewhere and self.text_only == "skip":
            self.present = present.squeeze(1)
        elif not somewhere:
            first = torch.arange(mask.shape[1], device=mask.device) == 0
            self.counted = mask | (first & ~present)

    def again(self) -> Binding:
        """The same for a recomputation, which also sees what was made of the features."""
        return replace(self, recomputes=True, hidden=False)
