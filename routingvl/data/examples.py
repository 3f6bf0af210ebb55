"""The data set of a split: what the data sets of all tasks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from routingvl.data.images import PictureSource
from routingvl.data.tokens import TokenTable


class ExampleDataset(PictureSource, Dataset):
    """Examples of a split, each with its image; a skipped image gives None, which collators drop.

    Args:
        split: what a loader of this package gives: it has ``images``, ImageRecords.
        pictures: arguments of :class:`~routingvl.data.images.PictureSource`: preprocessor, features, on_bad_image.

    Attributes:
        tokens: set it to the token ids of :attr:`texts`, and items bring theirs along as ``token_ids``.
    """

    def __init__(self, split: Any, *args: Any, **pictures: Any):
        super().__init__(*args, **pictures)
        self.split = split
        self.tokens: TokenTable | None = None
        self._images = {image.image_id: image for image in split.images}

    @property
    @abstractmethod
    def texts(self) -> Sequence[Any]:
        """The text of each example, as the collator's ``encode`` takes it; empty where examples have none."""

    @abstractmethod
    def example(self, index: int) -> dict[str, Any]:
        """Example ``index`` without its image; ``image_id`` says which that is."""

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        example = self.example(index)
        picture = self.picture(self._images[example["image_id"]])
        if picture is None:
            return None
        tokens = {} if self.tokens is None else {"token_ids": self.tokens[index]}
        return example | tokens | picture
