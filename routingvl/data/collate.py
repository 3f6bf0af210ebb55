"""Collators: a list of dataset items in, one padded batch out.

A batch has the visual input, pixel_values float32 [B, 3, H, W] or vision_features [B, L, d], and image_ids (of examples
with N images each, [B, N, 3, H, W] or [B, N, L, d]); with texts
input_ids and attention_mask [B, T] int64, and labels where every item's are known. Items that are None (skipped images)
are left out; a batch in which every item is None is None itself: ``if batch is None: continue``. A text is tokenised
here, in the DataLoader's workers, unless its item brings ``token_ids`` that the collator's own ``encode`` made before.
Texts are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from routingvl.config import check_choice
from routingvl.config.schema import CAPTION_LOSSES, PADDINGS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label that no loss counts, which is torch's own choice
IMAGE_INPUTS = ("pixel_values", "vision_features")  # the two forms of the image in a batch, of which it has one

Item = Mapping[str, Any]
Batch = dict[str, Any]


def collate_images(items: Sequence[Item | None]) -> Batch | None:
    """Stack the visual inputs and list the image ids; None when every item was skipped."""
    if not (kept := _kept(items)):
        return None
    key = next(name for name in IMAGE_INPUTS if name in kept[0])
    return {key: torch.stack([item[key] for item in kept]), "image_ids": [item["image_id"] for item in kept]}


def _kept(items: Sequence[Item | None]) -> list[Item]:
    return [item for item in items if item is not None]


def _token_rows(items: Sequence[Item], text: str, encode: Callable[[list[str]], list[list[int]]]) -> list[list[int]]:
    """The token ids of each item: those it brings, else those of its text under the key ``text``."""
    if all("token_ids" in item for item in items):
        return [item["token_ids"] for item in items]
    return encode([item[text] for item in items])


def pad_rows(rows: Sequence[Sequence[int]], value: int, length: int | None) -> Tensor:
    """Rows of different length as one int64 tensor [B, length], filled on the right; None pads to the longest row."""
    length = length or max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)


def _texts(rows: Sequence[Sequence[int]], pad: int, length: int | None) -> Batch:
    mask = [[1] * len(row) for row in rows]
    return {"input_ids": pad_rows(rows, pad, length), "attention_mask": pad_rows(mask, 0, length)}


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that fills texts up: the end token's where the tokenizer has no padding token."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def check_lengths(padding: str, max_length: int, shortest: int) -> None:
    """Raise ConfigError or ValueError for an unknown way of padding, or no room for a text."""
    check_choice("padding", padding, PADDINGS)
    if max_length < shortest:
        need = f"data.max_text_length must be at least {shortest}"
        raise ValueError(f"max_length={max_length} leaves no room for text; {need}")


def _types(row: Sequence[int], separator: int | None) -> list[int]:
    """The type of each token: 1 for those behind the first separator, where a second sentence stands, else 0."""
    first = row.index(separator) + 1 if separator in row else len(row)
    return [0] * first + [1] * (len(row) - first)


def _marks_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer gives the sentences of a pair different types; ValueError when it does so in another way."""
    marked = tokenizer("a", "a", return_token_type_ids=True)
    given = marked.get("token_type_ids", [0])
    if max(given) == 0:
        return False
    if given != _types(marked["input_ids"], tokenizer.sep_token_id):
        raise ValueError("the tokenizer marks the two sentences of a pair otherwise than BERT's; set model.tokenizer")
    return True


class TextCollator:
    """Batches of texts to read: the tokenizer's special tokens included, and kept when a text is cut.

    What the collators of tasks with labels share; they are dataclasses with these attributes, in an order of their own.

    Attributes:
        tokenizer: of the text model; its end token stands in for a missing padding token, where nothing is read.
        max_length: longest text in tokens, special tokens included.
        padding: "longest" text of the batch, or always "max_length".
        token_types: how many types of token the text model knows (BERT: 2, for the sentences of a pair); where that is
            more than one, and the tokenizer marks pairs, batches have ``token_type_ids`` [B, T].

    Raises:
        ValueError: an option is unknown, the tokenizer has neither padding nor end token, or it marks the sentences
            of a pair otherwise than BERT does (1 behind the first separator).
    """

    text_key: ClassVar[str]  # of an item: its text
    id_key: ClassVar[str]  # of an item: its id
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    padding: str
    token_types: int = 0

    def __post_init__(self) -> None:
        check_lengths(self.padding, self.max_length, 1 + self.tokenizer.num_special_tokens_to_add())
        if self.pad is None:
            raise ValueError("the tokenizer has no padding or end token; set its pad_token, or another model.tokenizer")

    @property
    def pad(self) -> int | None:
        """The id that fills texts up."""
        return padding_token(self.tokenizer)

    @cached_property
    def marks_pairs(self) -> bool:
        """Whether batches tell the sentences of a pair apart."""
        return self.token_types > 1 and _marks_pairs(self.tokenizer)

    def encode(self, texts: list[Any]) -> list[list[int]]:
        """The token ids of texts or pairs of texts, special tokens included, cut to ``max_length``."""
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]

    def labels(self, targets: list[Any]) -> Tensor:
        """The targets of all items as the model's ``labels``."""
        raise NotImplementedError

    def __call__(self, items: Sequence[Item | None]) -> Batch | None:
        """Collate the items of a data set; there are labels where every item's ``target`` is known."""
        batch, kept = collate_images(items), _kept(items)
        if batch is None:
            return None
        batch[f"{self.id_key}s"] = [item[self.id_key] for item in kept]
        length = self.max_length if self.padding == "max_length" else None
        rows = _token_rows(kept, self.text_key, self.encode)
        batch |= _texts(rows, self.pad, length)
        if self.marks_pairs:
            batch["token_type_ids"] = pad_rows([_types(row, self.tokenizer.sep_token_id) for row in rows], 0, length)
        targets = [item["target"] for item in kept]
        return batch if None in targets else batch | {"labels": self.labels(targets)}


@dataclass
class VQACollator(TextCollator):
    """Batches of questions with soft targets, from items of :class:`~routingvl.data.vqa_dataset.VQADataset`.

    Attributes:
        num_labels: size of the answer vocabulary; see :class:`TextCollator` for the others.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    num_labels: int
    padding: str = "longest"
    token_types: int = 0

    text_key = "question"
    id_key = "question_id"

    def labels(self, targets: list[Mapping[int, float]]) -> Tensor:
        """Dense soft targets: float32 [B, num_labels]."""
        labels = torch.zeros(len(targets), self.num_labels)
        for row, target in zip(labels, targets, strict=True):
            for label, score in target.items():
                row[label] = score
        return labels


@dataclass
class LabelCollator(TextCollator):
    """Batches of labelled texts, from items of :class:`~routingvl.data.labelled.LabelledDataset`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    padding: str = "longest"
    token_types: int = 0

    text_key = "text"
    id_key = "id"

    def labels(self, targets: list[int]) -> Tensor:
        """The number of each item's label: int64 [B]."""
        return torch.tensor(targets)


@dataclass
class CaptionCollator:
    """Batches of captions, without the special tokens that a tokenizer adds by itself: one end token closes each.

    With the "sound" loss a text is the caption and one end token (a start token first when there is no visual prefix
    to start from), padded with attention 0 and label -100; a cut caption keeps its end token. Labels are the input ids:
    the model shifts them. The start token is no target either.

    The "reference" loss is the published code's: the caption, padded with end tokens to ``max_length`` (whatever
    ``padding`` says) with attention 0, and every label counts; a caption that fills ``max_length`` has no end token.

    Attributes:
        tokenizer: of the text model; needs an end token, which also stands in for a missing start or padding token.
        max_length: longest text in tokens, start and end tokens included.
        padding: "longest" text of the batch, or always "max_length".
        prefix: the model puts the image, or a start token of its own, in front of the text.
        loss: "sound" or "reference".
        start: what stands in for a start token that the tokenizer lacks; None for its end token.

    Raises:
        ValueError: an option is unknown or the tokenizer has no end token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    padding: str = "longest"
    prefix: bool = True
    loss: str = "sound"
    start: int | None = None

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, CAPTION_LOSSES)
        check_lengths(self.padding, self.max_length, 2 if self.prefix else 3)
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set its eos_token, or another model.tokenizer")

    def encode(self, captions: list[str]) -> list[list[int]]:
        """The token ids of captions alone, at most ``max_length`` each."""
        rows = self.tokenizer(captions, add_special_tokens=False)["input_ids"]
        return [row[: self.max_length] for row in rows]

    def __call__(self, items: Sequence[Item | None]) -> Batch | None:
        """Collate items of :class:`~routingvl.data.coco.CaptionDataset`; items of ``per_image=True`` give no text."""
        batch, kept = collate_images(items), _kept(items)
        if batch is None or "caption" not in kept[0]:
            return batch
        end = self.tokenizer.eos_token_id
        starts = (self.tokenizer.bos_token_id, self.start, end)
        start = [] if self.prefix else [next(token for token in starts if token is not None)]
        captions = _token_rows(kept, "caption", self.encode)
        if self.loss == "reference":
            rows = [[*start, *caption][: self.max_length] for caption in captions]
            batch |= _texts(rows, end, self.max_length)
            return batch | {"labels": batch["input_ids"].clone()}
        room = self.max_length - len(start) - 1
        rows = [[*start, *caption[:room], end] for caption in captions]
        length = self.max_length if self.padding == "max_length" else None
        labels = [[IGNORED] * len(start) + row[len(start) :] for row in rows]
        return (
            batch | _texts(rows, padding_token(self.tokenizer), length) | {"labels": pad_rows(labels, IGNORED, length)}
        )
