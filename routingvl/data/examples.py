"""The data set of a split: what the data sets of all tasks share.

ExampleDataset(split, preprocessor=None, *, features=None, on_bad_image="fail")        implement example(index)
    item: what example(index) gives (``image_id`` at least), and pixel_values [3, H, W] or vision_features [L, d];
    None for a skipped image; .skipped counts those
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from routingvl.data.images import Features, ImagePreprocessor, PictureSource
from routingvl.data.tokens import TokenTable


class ExampleDataset(Dataset):
    """Examples of a split, each with its image; a skipped image gives None, which collators drop.

    Args:
        split: what a loader of this package gives: it has ``images``, ImageRecords.
        preprocessor: for image files; not needed with ``features``.
        features: image id -> [L, d], a mapping or a function; images are then never opened.
        on_bad_image: "fail" or "skip", see :class:`~routingvl.data.images.PictureSource`.

    Attributes:
        tokens: set it to the token ids of :attr:`texts`, and items bring theirs along as ``token_ids``.
    """

    def __init__(
        self,
        split: Any,
        preprocessor: ImagePreprocessor | None = None,
        *,
        features: Features | None = None,
        on_bad_image: str = "fail",
    ):
        self.split = split
        self.tokens: TokenTable | None = None
        self.pictures = PictureSource(preprocessor, features, on_bad_image)
        self._images = {image.image_id: image for image in split.images}

    @property
    def skipped(self) -> int:
        """Examples skipped for their image so far, in every worker together."""
        return self.pictures.skipped

    @property
    @abstractmethod
    def texts(self) -> Sequence[Any]:
        """The text of each example, as the collator's ``encode`` takes it; empty where examples have none."""

    @abstractmethod
    def example(self, index: int) -> dict[str, Any]:
        """Example ``index`` without its image; ``image_id`` says which that is."""

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        example = self.example(index)
        picture = self.pictures(self._images[example["image_id"]])
        if picture is None:
            return None
        tokens = {} if self.tokens is None else {"token_ids": self.tokens[index]}
        return example | tokens | picture
