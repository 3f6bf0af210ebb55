"""Evaluation without the examples' own images: what a score owes to the image is what it loses here."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

from routingvl.config import ConfigError, check_choice
from routingvl.data.examples import ExampleDataset
from routingvl.data.images import ImageRecord, stack_pictures
from routingvl.tasks.base import Task

CONTROLS = ("shuffled", "zeros", "ones", "noise")
Images = tuple[ImageRecord, ...]  # of one example
Keys = tuple[Hashable, ...]


class ImageControl(Dataset):
    """``dataset`` with another image in the place of each example's own.

    "shuffled" gives all examples of an image another picture of the split, a fixed one; examples with several images
    get those of one other example with as many, in their order. The others put features [L, d] in the place of the
    frozen tower's: all 0, all 1, or standard normal noise, which is the same whenever a file of that name comes again.
    Examples whose own image is skipped as unreadable are skipped here too.

    Raises:
        ConfigError: there is no such control, or nothing to shuffle with.
    """

    def __init__(self, dataset: ExampleDataset, task: Task, control: str) -> None:
        check_choice("image_control", control, CONTROLS)
        self.dataset, self.control = dataset, control
        if control == "shuffled":
            groups = [dataset.images_of(i, dataset.example(i)) for i in range(len(dataset))]
            self._order = ImageOrder(groups)
            for images in self._order.groups:
                if next(self._order.others(images), None) is None:
                    raise ConfigError(self._alone(images))
        else:
            self._shape = task.feature_shape

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        example = self.dataset.example(index)
        images = self.dataset.images_of(index, example)
        if self.dataset.on_bad_image == "skip" and self.dataset.pictures(images) is None:
            return None
        if self.control == "shuffled":
            return example | self._strangers(images)
        return example | stack_pictures([self._features(image) for image in images])

    def _strangers(self, images: Images) -> dict[str, Any]:
        """Other images, the next that can be read."""
        pictures = map(self.dataset.pictures, self._order.others(images))
        if (found := next((picture for picture in pictures if picture is not None), None)) is None:
            raise ConfigError(f"{self._alone(images)} that can be read")
        return found

    def _alone(self, images: Images) -> str:
        names = ", ".join(image.file_name for image in images)
        return f"image_control='shuffled' needs two images, and split {self.dataset.split.name!r} has none but {names}"

    def _features(self, image: ImageRecord) -> dict[str, torch.Tensor]:
        if self.control == "noise":
            seed = hashlib.sha256(os.path.normpath(image.file_name).encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            return {"vision_features": torch.randn(self._shape, generator=generator)}
        return {"vision_features": torch.full(self._shape, float(self.control == "ones"))}


def keys_of(images: Images) -> Keys:
    """What tells the images of an example from those of others."""
    return tuple(image.key for image in images)


class ImageOrder:
    """The images of all examples, each once, in an order drawn once and for all.

    Attributes:
        groups: the images of one example each.
    """

    def __init__(self, groups: Iterable[Images]) -> None:
        distinct = list({keys_of(images): images for images in groups}.values())
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0)).tolist()
        self.groups = [distinct[i] for i in order]
        self._places = {keys_of(images): place for place, images in enumerate(self.groups)}

    def others(self, images: Images) -> Iterator[Images]:
        """Those of other examples that are as many and other pictures, from the one behind ``images`` on."""
        begin, number = self._places[keys_of(images)], len(self.groups)
        for place in range(begin + 1, begin + number):
            other = self.groups[place % number]
            if len(other) == len(images) and not all(map(same_picture, images, other)):
                yield other


def same_picture(one: ImageRecord, other: ImageRecord) -> bool:
    """Whether both are one file, or files of the same bytes."""
    if one.key == other.key or one.path is None or other.path is None:
        return one.key == other.key
    try:
        return filecmp.cmp(one.path, other.path, shallow=False)
    except OSError:  # left to whoever reads it
        return False
