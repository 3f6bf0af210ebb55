"""Evaluation without the examples' own images: what a score owes to the image is what it loses here."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch.utils.data import Dataset

from routingvl.config import ConfigError, check_choice
from routingvl.data.examples import ExampleDataset
from routingvl.data.images import ImageRecord
from routingvl.tasks.base import Task

CONTROLS = ("shuffled", "zeros", "ones", "noise")


class ImageControl(Dataset):
    """``dataset`` with another image in the place of each example's own.

    "shuffled" gives all examples of an image those of one other image of the split, a fixed one. The others put
    features [L, d] in the place of the frozen tower's: all 0, all 1, or standard normal noise, which is the same
    whenever a file of that name comes again. Examples whose own image is skipped as unreadable are skipped here too.

    Raises:
        ConfigError: there is no such control, or nothing to shuffle with.
    """

    def __init__(self, dataset: ExampleDataset, task: Task, control: str) -> None:
        check_choice("image_control", control, CONTROLS)
        self.dataset, self.control = dataset, control
        if control == "shuffled":
            self._other = another_image(dataset.split.images, dataset.split.name)
        else:
            self._shape = feature_shape(task)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        example = self.dataset.example(index)
        image = self.dataset.image(index, example)
        if self.dataset.on_bad_image == "skip" and self.dataset.picture(image) is None:
            return None
        return example | (self._stranger(image) if self.control == "shuffled" else self._features(image))

    def _stranger(self, image: ImageRecord) -> dict[str, Any]:
        """Another image, the next that can be read."""
        other = self._other[image]
        while (picture := self.dataset.picture(other)) is None:
            other = self._other[other]
        if other.key == image.key:
            raise ConfigError("image_control='shuffled' needs two images that can be read")
        return picture

    def _features(self, image: ImageRecord) -> dict[str, torch.Tensor]:
        if self.control == "noise":
            seed = hashlib.sha256(os.path.normpath(image.file_name).encode()).digest()[:7]
            generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
            return {"vision_features": torch.randn(self._shape, generator=generator)}
        return {"vision_features": torch.full(self._shape, float(self.control == "ones"))}


def another_image(images: list[ImageRecord], split: str) -> dict[ImageRecord, ImageRecord]:
    """Another one of ``images`` for each: the next in an order drawn once and for all."""
    distinct = {image.key: image for image in images}
    if len(distinct) < 2:
        raise ConfigError(f"image_control='shuffled' needs two images, and split {split!r} has {len(distinct)}")
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(0)).tolist()
    keys = list(distinct)
    following = {keys[i]: distinct[keys[j]] for i, j in zip(order, order[1:] + order[:1], strict=True)}
    return {image: following[image.key] for image in images}


@torch.inference_mode()
def feature_shape(task: Task) -> tuple[int, int]:
    """[L, d] of the features that the run's tower gives of an image."""
    model = task.model
    pixels = torch.zeros(1, 3, *task.preprocessor.size, device=model.device, dtype=model.dtype)
    return tuple(model.encode_images(pixels).shape[1:])
