"""The data set of a split: what the data sets of all tasks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from routingvl.data.files import DataError
from routingvl.data.images import ImageError, ImageRecord, PictureSource, check_image_file
from routingvl.data.tokens import TokenTable


class ExampleDataset(PictureSource, Dataset):
    """Examples of a split, each with its image; a skipped image gives None, which collators drop.

    Args:
        split: what a loader of this package gives: it has ``images``, ImageRecords.
        pictures: arguments of :class:`~routingvl.data.images.PictureSource`: preprocessor, features, on_bad_image.

    Attributes:
        tokens: set it to the token ids of :attr:`texts`, and items bring theirs along as ``token_ids``.

    Raises:
        DataError: features are given by image id, and two images have one id.
    """

    def __init__(self, split: Any, *args: Any, **pictures: Any):
        super().__init__(*args, **pictures)
        self.split = split
        self.tokens: TokenTable | None = None
        self._images = {image.image_id: image for image in split.images}
        if self.features_by_id and len(self._images) < len(split.images):
            one, other = next((a, b) for b in split.images if (a := self._images[b.image_id]) is not b)
            raise DataError(
                f"images {one.file_name} and {other.file_name} both have the id {one.image_id}: features by id cannot "
                "tell them apart"
            )

    def check_images(self) -> None:
        """Raise :class:`ImageError` for a missing image file or, when bad images are skipped, if none can be read."""
        if self.on_bad_image == "skip":
            problem: Exception | None = None
            for image in self.split.images:
                try:
                    self._read(image)
                    return
                except (ImageError, DataError) as error:
                    problem = error
            raise ImageError(f"no image of split {self.split.name!r} can be read; the last: {problem}") from problem
        if self.features is None:
            for image in self.split.images:
                if image.path is not None:
                    check_image_file(image.path)

    @property
    @abstractmethod
    def texts(self) -> Sequence[Any]:
        """The text of each example, as the collator's ``encode`` takes it; empty where examples have none."""

    @abstractmethod
    def example(self, index: int) -> dict[str, Any]:
        """Example ``index`` without its image; ``image_id`` says which that is."""

    def image(self, index: int, example: dict[str, Any]) -> ImageRecord:
        """The image of an example, by default the one with its ``image_id``."""
        return self._images[example["image_id"]]

    def images_of(self, index: int, example: dict[str, Any]) -> tuple[ImageRecord, ...]:
        """All images of an example, by default the one of :meth:`image`; as many for each example."""
        return (self.image(index, example),)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        example = self.example(index)
        picture = self.pictures(self.images_of(index, example))
        if picture is None:
            return None
        tokens = {} if self.tokens is None else {"token_ids": self.tokens[index]}
        return example | tokens | picture


def check_separate(train: Any, val: Any) -> None:
    """Raise :class:`DataError` when two splits, as loaders of this package give them, share an example."""
    learned = set(train.example_keys())
    if (shared := next((key for key in val.example_keys() if key in learned), None)) is not None:
        raise DataError(
            f"splits {train.name!r} and {val.name!r} share examples, such as {shared[0]}: set data.val_split to other "
            "ones (null for none), or data.allow_shared_splits=true if that is meant"
        )
