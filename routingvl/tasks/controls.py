"""Evaluation without the examples' own images: what a score owes to the image is what it loses here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable, Iterable
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

    "shuffled" gives all examples of an image another image of the split, a fixed one; examples with several images get
    those of one other example, in their order. The others put features [L, d] in the place of the frozen tower's: all
    0, all 1, or standard normal noise, which is the same whenever a file of that name comes again. Examples whose own
    image is skipped as unreadable are skipped here too.

    Raises:
        ConfigError: there is no such control, or nothing to shuffle with.
    """

    def __init__(self, dataset: ExampleDataset, task: Task, control: str) -> None:
        check_choice("image_control", control, CONTROLS)
        self.dataset, self.control = dataset, control
        if control == "shuffled":
            groups = (dataset.images_of(i, dataset.example(i)) for i in range(len(dataset)))
            self._other = other_images(groups, dataset.split.name)
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
        other = self._other[keys_of(images)]
        while (pictures := self.dataset.pictures(other)) is None:
            other = self._other[keys_of(other)]
        if keys_of(other) == keys_of(images):
            raise ConfigError("image_control='shuffled' needs two images that can be read")
        return pictures

    def _features(self, image: ImageRecord) -> dict[str, torch.Tensor]:
        if self.control == "noise":
            seed = hashlib.sha256(os.path.normpath(image.file_name).encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            return {"vision_features": torch.randn(self._shape, generator=generator)}
        return {"vision_features": torch.full(self._shape, float(self.control == "ones"))}


def keys_of(images: Images) -> Keys:
    """What tells the images of an example from those of others."""
    return tuple(image.key for image in images)


def other_images(groups: Iterable[Images], split: str) -> dict[Keys, Images]:
    """For the images of each example, by their keys, those of another: the next in an order drawn once and for all."""
    distinct = {keys_of(images): images for images in groups}
    if len(distinct) < 2:
        raise ConfigError(f"image_control='shuffled' needs two images, and split {split!r} has {len(distinct)}")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0)).tolist()
    keys = list(distinct)
    return {keys[i]: distinct[keys[j]] for i, j in zip(order, order[1:] + order[:1], strict=True)}
