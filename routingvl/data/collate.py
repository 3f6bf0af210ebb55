"""Collators: a list of dataset items in, one padded batch out.

    VQACollator(tokenizer, max_length, num_labels, padding="longest")
        batch: input_ids, attention_mask [B, T] int64; labels float32 [B, num_labels] (absent when the split has no
        answers); question_ids, image_ids: lists of int
    CaptionCollator(tokenizer, max_length, padding="longest", prefix=True, loss="sound")
        batch: input_ids, attention_mask, labels [B, T] int64 (absent for items without caption); image_ids
    collate_images(items) -> batch: image_ids

and in every batch the visual input: pixel_values float32 [B, 3, H, W] or vision_features [B, L, d]. Items that are None
(skipped images) are left out; a batch in which every item is None is None itself: ``if batch is None: continue``.
A text is tokenised here, in the DataLoader's workers, unless its item brings ``token_ids`` that the collator's own
``encode`` made before. Texts are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PADDINGS = ("longest", "max_length")
CAPTION_LOSSES = ("sound", "reference")
IGNORED = -100  # label that torch's cross entropy leaves out

Item = Mapping[str, Any]
Batch = dict[str, Any]


def collate_images(items: Sequence[Item | None]) -> Batch | None:
    """Stack the visual inputs and list the image ids; None when every item was skipped."""
    kept = [item for item in items if item is not None]
    return _visual_batch(kept) if kept else None


def _visual_batch(items: Sequence[Item]) -> Batch:
    """``pixel_values`` or ``vision_features``, stacked, and ``image_ids``."""
    key = "vision_features" if "vision_features" in items[0] else "pixel_values"
    return {key: torch.stack([item[key] for item in items]), "image_ids": [item["image_id"] for item in items]}


def _token_rows(items: Sequence[Item], text: str, encode: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
    """The token ids of each item: those it brings, else those of its text under the key ``text``."""
    if all("token_ids" in item for item in items):
        return [item["token_ids"] for item in items]
    return encode([item[text] for item in items])


def _pad(rows: Sequence[Sequence[int]], value: int, length: int | None) -> Tensor:
    """Rows of different length as one int64 tensor [B, length], filled on the right; None pads to the longest row."""
    length = length or max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)


def _check(padding: str, max_length: int, shortest: int) -> None:
    if padding not in PADDINGS:
        raise ValueError(f"padding={padding!r} is not one of {', '.join(PADDINGS)}")
    if max_length < shortest:
        raise ValueError(f"max_length={max_length} leaves no room for text; it must be at least {shortest}")


@dataclass
class VQACollator:
    """Batches of questions for RoBERTa: the tokenizer's special tokens included, and kept when a text is cut.

    Attributes:
        tokenizer: of the text model; needs a padding token.
        max_length: longest text in tokens, special tokens included.
        num_labels: size of the answer vocabulary.
        padding: "longest" text of the batch, or always "max_length".

    Raises:
        ValueError: an option is unknown or the tokenizer has no padding token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    num_labels: int
    padding: str = "longest"

    def __post_init__(self) -> None:
        _check(self.padding, self.max_length, 1 + self.tokenizer.num_special_tokens_to_add())
        if self.tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token before training")

    def encode(self, questions: list[str]) -> list[list[int]]:
        """The token ids of questions, special tokens included, cut to ``max_length``."""
        return self.tokenizer(questions, truncation=True, max_length=self.max_length)["input_ids"]

    def __call__(self, items: Sequence[Item | None]) -> Batch | None:
        """Collate items of :class:`~routingvl.data.vqa.VQADataset`; labels are dense soft targets."""
        kept = [item for item in items if item is not None]
        if not kept:
            return None
        rows = _token_rows(kept, "question", self.encode)
        length = self.max_length if self.padding == "max_length" else None
        batch = _visual_batch(kept) | {
            "question_ids": [item["question_id"] for item in kept],
            "input_ids": _pad(rows, self.tokenizer.pad_token_id, length),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, length),
        }
        if all(item["target"] is not None for item in kept):
            batch["labels"] = torch.zeros(len(kept), self.num_labels)
            for row, item in zip(batch["labels"], kept, strict=True):
                for label, score in item["target"].items():
                    row[label] = score
        return batch


@dataclass
class CaptionCollator:
    """Batches of captions for GPT-2, which has neither padding nor separate start and end tokens.

    With the "sound" loss a text is the caption and one end token (a start token first when there is no visual prefix
    to start from), padded with attention 0 and label -100; a cut caption keeps its end token. Labels are the input ids:
    the model shifts them. The start token is no target either.

    The "reference" loss is the published code's: the caption, padded with end tokens to ``max_length`` (whatever
    ``padding`` says) with attention 0, and every label counts; a caption that fills ``max_length`` has no end token.

    Attributes:
        tokenizer: of the text model; needs an end token, which also stands in for a missing start or padding token.
        max_length: longest text in tokens, start and end tokens included.
        padding: "longest" text of the batch, or always "max_length".
        prefix: the model puts the image in front of the text.
        loss: "sound" or "reference".

    Raises:
        ValueError: an option is unknown or the tokenizer has no end token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    padding: str = "longest"
    prefix: bool = True
    loss: str = "sound"

    def __post_init__(self) -> None:
        if self.loss not in CAPTION_LOSSES:
            raise ValueError(f"loss={self.loss!r} is not one of {', '.join(CAPTION_LOSSES)}")
        _check(self.padding, self.max_length, 2 if self.prefix else 3)
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set tokenizer.eos_token before training")

    def encode(self, captions: list[str]) -> list[list[int]]:
        """The token ids of captions alone, at most ``max_length`` each."""
        rows = self.tokenizer(captions, add_special_tokens=False)["input_ids"]
        return [row[: self.max_length] for row in rows]

    def __call__(self, items: Sequence[Item | None]) -> Batch | None:
        """Collate items of :class:`~routingvl.data.coco.CaptionDataset`; items of ``per_image=True`` give no text."""
        kept = [item for item in items if item is not None]
        if not kept:
            return None
        batch = _visual_batch(kept)
        if "caption" not in kept[0]:
            return batch
        end = self.tokenizer.eos_token_id
        start = [] if self.prefix else [end if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id]
        captions = _token_rows(kept, "caption", self.encode)
        if self.loss == "reference":
            rows = [[*start, *caption][: self.max_length] for caption in captions]
            ids = _pad(rows, end, self.max_length)
            mask = _pad([[1] * len(row) for row in rows], 0, self.max_length)
            return batch | {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
        room = self.max_length - len(start) - 1
        rows = [[*start, *caption[:room], end] for caption in captions]
        length = self.max_length if self.padding == "max_length" else None
        pad = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        return batch | {
            "input_ids": _pad(rows, pad, length),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, length),
            "labels": _pad([[IGNORED] * len(start) + row[len(start) :] for row in rows], IGNORED, length),
        }
