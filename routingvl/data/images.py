"""The datasets' way to a picture: its features, or its file read and preprocessed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from routingvl.config import check_choice
from routingvl.config.schema import ON_BAD_IMAGE
from routingvl.data.feature_cache import StoredFeatures, file_stat
from routingvl.data.files import DataError
from routingvl.data.image_files import ImageError, check_image_file, is_turned, load_image, read_image_file
from routingvl.data.preprocessing import ImagePreprocessor

logger = logging.getLogger(__name__)

Features = Mapping[int | str, Tensor] | Callable[[Any], Tensor]
_WORKER_SLOTS = 257  # of the counter of skipped images: the main process, then one per DataLoader worker


@dataclass(frozen=True)
class ImageRecord:
    """One image of a split: its id (COCO's, or its name) and file name and, when an image root is known, its path.

    The path is resolved, and it is what tells images apart: ids are only unique within a split, if there.
    """

    image_id: int | str
    file_name: str
    path: Path | None = None

    @property
    def key(self) -> Path | int | str:
        """The path or, without an image root, the id."""
        return self.path or self.image_id


class PictureSource:
    """What gives pictures: stored features when there are any, else the preprocessed files.

    Args:
        preprocessor: turns an image file into pixel values; may be None when ``features`` is given.
        features: image id -> [L, d], a mapping or a function; images are then never opened.
        on_bad_image: "fail" raises :class:`ImageError` (or :class:`DataError` for an id that ``features`` lacks);
            "skip" returns None instead, logs the reason and counts it in :attr:`skipped`.

    Attributes:
        features_by_id: whether the features are the caller's, by image id, and not those of a FeatureStore, by path.
    """

    def __init__(
        self,
        preprocessor: ImagePreprocessor | None = None,
        features: Features | None = None,
        on_bad_image: str = "fail",
    ):
        if preprocessor is None and features is None:
            raise ValueError("give a preprocessor (to read image files) or features (image id -> [L, d])")
        check_choice("on_bad_image", on_bad_image, ON_BAD_IMAGE)
        self.preprocessor, self.features, self.on_bad_image = preprocessor, features, on_bad_image
        self.features_by_id = features is not None and not isinstance(features, StoredFeatures)
        # In shared memory, so that what DataLoader workers skip is seen by the process that started them. Each adds to
        # its own slot: an addition to a shared number is not atomic.
        self._skipped = torch.zeros(_WORKER_SLOTS, dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> int:
        """Examples skipped so far, in every worker together."""
        return int(self._skipped.sum())

    def picture(self, image: ImageRecord) -> dict[str, Any] | None:
        """``{"vision_features": [L, d]}`` or ``{"pixel_values": [3, H, W]}``; None for a skipped image."""
        try:
            return self._read(image)
        except (ImageError, DataError) as error:
            if self.on_bad_image == "fail":
                raise
            logger.warning("skipped: %s", error)
            worker = torch.utils.data.get_worker_info()
            self._skipped[0 if worker is None else 1 + worker.id % (_WORKER_SLOTS - 1)] += 1
            return None

    def pictures(self, images: Sequence[ImageRecord]) -> dict[str, Any] | None:
        """As :meth:`picture`; of several images in one tensor, [N, L, d] or [N, 3, H, W]. None if one is skipped."""
        found = []
        for image in images:
            if (picture := self.picture(image)) is None:
                return None
            found.append(picture)
        return stack_pictures(found)

    def _read(self, image: ImageRecord) -> dict[str, Any]:
        if self.features is not None:
            try:
                get = self.features if callable(self.features) else self.features.__getitem__
                return {"vision_features": get(image.image_id if self.features_by_id else image.path)}
            except KeyError as error:
                raise DataError(f"no stored features for image {image.image_id} ({image.file_name})") from error
        if image.path is None:
            raise DataError(f"image {image.file_name} is needed, but its split was loaded without an image folder")
        return self._from_file(image.path)

    def _from_file(self, path: Path) -> dict[str, Any]:
        return {"pixel_values": self.preprocessor(path)}


def stack_pictures(pictures: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The pictures of one example as its input: a single one as it is, several stacked in their order."""
    if len(pictures) == 1:
        return pictures[0]
    return {name: torch.stack([picture[name] for picture in pictures]) for name in pictures[0]}


class ImageDataset(PictureSource, Dataset):
    """One item per image, or None for a skipped one; made for running the frozen tower once over a split's images.

    Items are ``{"image_id": id, "path": Path, "digest": 32 bytes, "stat": as of file_stat or None when the file changed
    meanwhile, "pixel_values": float32 [3, H, W]}``. The digest is the SHA-256 of the very bytes that are decoded, and
    another one where the orientation turned the picture. An image whose digest is in ``known`` is not decoded: it has
    no ``pixel_values``.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        preprocessor: ImagePreprocessor,
        on_bad_image: str = "fail",
        known: Collection[bytes] = (),
    ):
        super().__init__(preprocessor, on_bad_image=on_bad_image)
        self.records, self.known = list(records), known

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        record = self.records[index]
        picture = self.picture(record)
        return None if picture is None else {"image_id": record.image_id, "path": record.path, **picture}

    def _from_file(self, path: Path) -> dict[str, Any]:
        check_image_file(path)
        try:
            before, data, after = file_stat(path), read_image_file(path), file_stat(path)
        except OSError as error:  # deleted meanwhile
            raise ImageError(f"image {path} cannot be read: {error}") from error
        digest = hashlib.sha256(data)
        if self.preprocessor.exif and is_turned(data):
            digest.update(b"turned by its EXIF orientation")
        item: dict[str, Any] = {"digest": digest.digest(), "stat": after if before == after else None}
        if item["digest"] not in self.known:
            item["pixel_values"] = self.preprocessor(load_image(path, data, exif=self.preprocessor.exif), path)
        return item
