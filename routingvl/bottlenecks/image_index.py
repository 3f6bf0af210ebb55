"""Which image each token of the text reads, where that is said token by token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from routingvl.bottlenecks.rows import Tokens, check_mask


@dataclass(frozen=True)
class ImageIndex:
    """The argument ``image_index`` of :meth:`VisualContext.bind`, ready for the layers.

    Attributes:
        pooled: the mean of each image's tokens [I, 1, d]; where tokens of the text read none, one of zeros behind them.
        index: int64 [rows, T], the entry of ``pooled`` that each token of the text reads.
        keep: bool [rows, T], False where the bottleneck adds nothing; None: True everywhere.
        real: bool [I, 1], False for the zeros in ``pooled``; None: there are none.
        several: L, if the features have more than one visual token per image, else 1.
        begun: not empty once a call had the whole text; before it none is a later step. Copies share it.
    """

    pooled: torch.Tensor
    index: torch.Tensor
    keep: torch.Tensor | None
    real: torch.Tensor | None
    several: int
    begun: set[bool] = field(default_factory=set)

    @classmethod
    def of(
        cls, features: torch.Tensor, mask: torch.Tensor | None, index: torch.Tensor, text_only: str | None
    ) -> ImageIndex:
        """Of features [I, L, d], mask [I, L] and index [rows, T], -1 for none; ValueError where one does not fit."""
        images, several = features.shape[:2]
        if mask is not None:
            check_mask(mask, features, None)
        everywhere = _check(index, images, text_only)
        pooled, index = Tokens(features, mask).mean().features, index.to(features.device)
        if everywhere:
            return cls(pooled, index, None, None, several)
        pooled = torch.cat([pooled, pooled.new_zeros(1, 1, pooled.shape[2])])
        real = (torch.arange(images + 1, device=index.device) < images).unsqueeze(1)
        keep = index >= 0 if text_only == "skip" else None
        return cls(pooled, torch.where(index < 0, images, index), keep, real, several)

    def of_rows(self, rows: torch.Tensor) -> ImageIndex:
        """The same for some rows of the text, long [n]."""
        rows = rows.to(self.index.device)
        return replace(self, index=self.index[rows], keep=None if self.keep is None else self.keep[rows])

    def for_text(self, x: torch.Tensor, pooled: bool, decoding: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The entry for each token of ``x`` [rows*beams, T, d], and which tokens the bottleneck adds to [.., T, 1].

        Raises:
            ValueError: the layer would read several visual tokens (not ``pooled``); x has another number of tokens than
                the index, and it is no step of a ``decoding`` binding.
        """
        if not pooled and self.several > 1:
            raise ValueError(
                f"with image_index= a layer reads one visual token per image, and the features have {self.several}: "
                "bind their mean, features.mean(1, keepdim=True)"
            )
        if x.dim() != 3:
            raise ValueError(f"image_index is for text [rows, T, width], and a routed layer was given {list(x.shape)}")
        index, keep, tokens, whole = self.index, self.keep, x.shape[1], self.index.shape[1]
        if tokens != whole and not decoding:
            raise ValueError(
                f"image_index is for {whole} tokens, and the text of a routed layer has {tokens}; in generation, bind "
                "with decoding=True"
            )
        if tokens >= whole:
            self.begun.add(True)
        if not self.begun:
            raise ValueError(
                f"image_index is for {whole} tokens, and the first call has {tokens} of them: give the text in one "
                "call (generate without prefill_chunk_size)"
            )
        if tokens != whole:
            index, keep = (None if of is None else _with_written(of, tokens) for of in (index, keep))
        if (beams := x.shape[0] // len(index)) > 1:
            index, keep = (None if of is None else of.repeat_interleave(beams, 0) for of in (index, keep))
        return index, None if keep is None else keep.unsqueeze(2)


def _with_written(of: torch.Tensor, tokens: int) -> torch.Tensor:
    """``of`` [rows, T] for a call of another number of tokens: what was written reads what the row's last token does.

    More of them are the text again with what was written behind it (no cache), fewer are of that alone.
    """
    whole, last = of.shape[1], of[:, -1:]
    return torch.cat([of, last.expand(-1, tokens - whole)], 1) if tokens > whole else last.expand(-1, tokens)


def _check(index: torch.Tensor, images: int, text_only: str | None) -> bool:
    """Whether every token reads an image; ValueError where the index is not allowed."""
    if not isinstance(index, torch.Tensor):
        raise ValueError(f"image_index must be a tensor, torch.int64 [rows of text, T], not {type(index).__name__}")
    if index.dtype != torch.int64 or index.dim() != 2:
        raise ValueError(f"image_index must be torch.int64 [rows of text, T], not {index.dtype} {list(index.shape)}")
    if not index.numel():
        return True
    least, most = torch.stack(index.aminmax()).tolist()  # one wait for the device
    if least < -1 or most >= images:
        raise ValueError(
            f"image_index has values from {least} to {most}, and there are {images} images: -1 (none) to {images - 1}"
        )
    if least < 0 and text_only is None:
        raise ValueError("image_index has tokens without an image (-1): say text_only='skip' or 'zero' for them")
    return least >= 0
