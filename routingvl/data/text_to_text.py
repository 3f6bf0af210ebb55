"""Examples of a model that reads a text and images, and writes a text: questions and answers, prompts and captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from routingvl.data.collate import IGNORED, IMAGE_INPUTS, Batch, Item, check_lengths, pad_rows, padding_token
from routingvl.data.examples import ExampleDataset
from routingvl.data.images import ImageRecord

BETWEEN = -1  # stands between prompt and target where the token ids of both are one row


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text to read with images, and what is to be written.

    Attributes:
        id: an integer or a string, of this example alone.
        prompt: what is read.
        target: what is to be written; None where that is not known.
        images: one or several, in order.
    """

    id: int | str
    prompt: str
    target: str | None
    images: tuple[ImageRecord, ...]


class TextToTextDataset(ExampleDataset):
    """Examples of a split with their images.

    Items are dicts with ``id``, ``image_id`` (of the first image), ``prompt``, ``target`` and ``pixel_values`` float32
    [3, H, W] or ``vision_features`` [L, d], of several images with a first axis more.

    Args:
        split: it has ``name`` and ``images``, among them those of all examples.
        examples: in the order of the data set.
        pictures: see :class:`~routingvl.data.examples.ExampleDataset`.
    """

    def __init__(self, split: Any, examples: Sequence[TextExample], **pictures: Any) -> None:
        super().__init__(split, **pictures)
        self.examples = examples

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Prompt and target of each example."""
        return [(example.prompt, example.target or "") for example in self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def image(self, index: int, example: dict[str, Any]) -> ImageRecord:
        """The example's first one: an id alone may be another split's too."""
        return self.examples[index].images[0]

    def images_of(self, index: int, example: dict[str, Any]) -> tuple[ImageRecord, ...]:
        """Those of the example."""
        return self.examples[index].images

    def example(self, index: int) -> dict[str, Any]:
        """An item without its images."""
        example = self.examples[index]
        return {
            "id": example.id,
            "image_id": example.images[0].image_id,
            "prompt": example.prompt,
            "target": example.target,
        }


@dataclass
class TextToTextCollator:
    """Batches of texts to read (``input_ids`` and ``attention_mask`` [B, T]), ``ids``, images, and ``labels`` [B, S].

    Texts of both kinds have the special tokens that the tokenizer puts around a text; a target ends with its end token,
    also when it is cut. There are labels where every target is known, -100 for padding. Where items have different
    numbers of images, or one has several, the images have an axis more, and ``image_mask`` bool [B, n] says which are
    there.

    Attributes:
        tokenizer: of the text model; needs an end token, which also stands in for a missing padding token.
        max_length: longest prompt and longest target in tokens, special tokens included.
        padding: prompts to the "longest" of the batch, or always to "max_length".

    Raises:
        ValueError: an option is unknown or the tokenizer has no end token.
    """

    tokenizer: Any
    max_length: int
    padding: str = "longest"

    def __post_init__(self) -> None:
        check_lengths(self.padding, self.max_length, 1 + self.tokenizer.num_special_tokens_to_add())
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token; set its eos_token, or another model.tokenizer")

    def encode(self, pairs: list[tuple[str, str]]) -> list[list[int]]:
        """The token ids of prompts and targets: a row for each pair, with :data:`BETWEEN` between them."""
        prompts, targets = zip(*pairs, strict=True)
        options = {"truncation": True, "max_length": self.max_length}
        prompts = self.tokenizer(list(prompts), **options)["input_ids"]
        targets = [self._closed(row) for row in self.tokenizer(list(targets), **options)["input_ids"]]
        return [[*prompt, BETWEEN, *target] for prompt, target in zip(prompts, targets, strict=True)]

    def _closed(self, row: list[int]) -> list[int]:
        """A target's tokens up to its end token, which it gets where the tokenizer puts none."""
        end = self.tokenizer.eos_token_id
        if end in row:  # mBART's name of the language stands behind it
            return row[: len(row) - row[::-1].index(end)]
        return [*row[: self.max_length - 1], end]

    def __call__(self, items: Sequence[Item | None]) -> Batch | None:
        """Collate the items of a data set; None when every one was skipped."""
        items = [item for item in items if item is not None]
        if not items:
            return None
        batch = _images(items) | {"ids": [item["id"] for item in items]}
        if all("token_ids" in item for item in items):
            rows = [item["token_ids"] for item in items]
        else:
            rows = self.encode([(item["prompt"], item["target"] or "") for item in items])
        places = [row.index(BETWEEN) for row in rows]
        prompts = [row[:place] for row, place in zip(rows, places, strict=True)]
        length = self.max_length if self.padding == "max_length" else None
        batch["input_ids"] = pad_rows(prompts, padding_token(self.tokenizer), length)
        batch["attention_mask"] = pad_rows([[1] * len(row) for row in prompts], 0, length)
        if all(item["target"] is not None for item in items):
            targets = [row[place + 1 :] for row, place in zip(rows, places, strict=True)]
            batch["labels"] = pad_rows(targets, IGNORED, None)
        return batch


def _images(items: Sequence[Item]) -> Batch:
    """The images of all items in one tensor, and which of its entries are images where numbers differ."""
    key = next(name for name in IMAGE_INPUTS if name in items[0])
    one = 3 if key == "pixel_values" else 2
    images = [item[key] for item in items]
    if all(image.dim() == one for image in images):
        return {key: torch.stack(images), "image_ids": [item["image_id"] for item in items]}
    images = [image.unsqueeze(0) if image.dim() == one else image for image in images]
    numbers = torch.tensor([len(image) for image in images])
    most = int(numbers.max())
    padded = [torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) if len(x) < most else x for x in images]
    batch = {key: torch.stack(padded), "image_ids": [item["image_id"] for item in items]}
    if int(numbers.min()) < most:
        batch["image_mask"] = torch.arange(most) < numbers.unsqueeze(1)
    return batch
