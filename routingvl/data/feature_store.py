"""Features of many images: looked up in a cache, and computed by the frozen vision tower where it lacks them.

The cache is a folder (``data.feature_cache``) or, without one, memory. Several processes (``accelerate launch``) share
the work; they need a common file system for the folder.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from routingvl.backbones.vision import image_features
from routingvl.config import ConfigError
from routingvl.config.schema import DataConfig
from routingvl.data.feature_cache import (
    DTYPES,
    FeatureCache,
    FeatureCacheError,
    FileDigests,
    MemoryCache,
    Stat,
    StoredFeatures,
)
from routingvl.data.files import DataError
from routingvl.data.images import ImageDataset, ImagePreprocessor, ImageRecord
from routingvl.digests import settings_of, tensors_digest


def vision_key(
    vision: nn.Module, kind: str, preprocessor: ImagePreprocessor, layer: int | None = None
) -> dict[str, Any]:
    """Plain values of everything that decides an image's features: the key of a :class:`FeatureCache`.

    All weights and buffers count, bit for bit, with their dtypes; so does the config, but neither the folder it was
    loaded from nor the device.
    """
    key = {
        "weights": tensors_digest(vision.state_dict().items()),
        "config": settings_of(vision.config.to_dict()),
        "kind": kind,
        "preprocessing": preprocessor.to_dict(),
    }
    return key if layer is None else key | {"layer": layer}


class FeatureStore:
    """Gives the features of images, running the vision tower for each content at most once.

    Args:
        vision: the frozen tower; put into evaluation mode.
        kind: which of its outputs to keep, see :func:`routingvl.backbones.vision.image_features`.
        preprocessor: image file -> pixel values.
        settings: ``feature_cache``, ``feature_dtype``, ``feature_batch_size``, ``workers`` and ``on_bad_image`` count.
        layer: of the tower, see there.

    Attributes:
        found, computed: images that :meth:`load` took from the cache, and that it ran the tower for.

    Raises:
        FeatureCacheError: the folder cannot be used.
    """

    def __init__(
        self,
        vision: nn.Module | None,
        kind: str,
        preprocessor: ImagePreprocessor,
        settings: DataConfig,
        layer: int | None = None,
    ) -> None:
        if vision is None:
            raise ConfigError("features need a vision tower, and the model was built without one")
        self.vision, self.kind, self.layer = vision.eval(), kind, layer
        self.preprocessor, self.settings = preprocessor, settings
        self.device = next(vision.parameters()).device
        self.found = self.computed = 0
        self._lock = threading.Lock()
        self.files: FileDigests | None = None
        dtype = DTYPES[settings.feature_dtype]
        self.cache: FeatureCache | MemoryCache = MemoryCache(dtype)
        if settings.feature_cache is not None:
            shape = self.encode(torch.zeros(1, 3, *preprocessor.size)).shape[1:]
            key = vision_key(vision, kind, preprocessor, layer)
            self.cache = FeatureCache(settings.feature_cache, key, tuple(shape), dtype)
            # Digests of the two ways to read a file differ, and so they are remembered apart.
            self.files = FileDigests(Path(settings.feature_cache) / ("files-exif" if preprocessor.exif else "files"))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixel values [B, 3, H, W] -> features [B, L, d], on the tower's device and without gradients."""
        return image_features(self.vision, pixels.to(self.device), self.kind, self.layer)

    def load(
        self, images: Iterable[ImageRecord], *, on_bad_image: str | None = None, progress: bool = False
    ) -> StoredFeatures:
        """Features of each image; missing ones are computed and added to the cache first.

        Every row of the cache is checked against its checksum here; damaged ones are computed again. Skipped images are
        left out. Any thread may call it: one works at a time.

        Raises:
            ImageError: an image is unreadable and the policy is "fail"; what was computed before is kept.
            FeatureCacheError: features are not finite in the cache's dtype, or another process's are not to be seen.
            OSError: the disk is full or cannot be written.
        """
        with self._lock:
            return self._load(images, on_bad_image or self.settings.on_bad_image, progress)

    def _load(self, images: Iterable[ImageRecord], on_bad_image: str, progress: bool) -> StoredFeatures:
        unique = list({image.path: image for image in images}.values())
        if None in (image.path for image in unique):
            raise DataError("features need image files, but a split was loaded without an image folder")
        process = PartialState()
        before = self.computed
        mine = unique[process.process_index :: process.num_processes]
        own = self._fill_cache(mine, on_bad_image, progress)
        alone = process.num_processes == 1 or isinstance(self.cache, FeatureCache)
        rows = {} if alone else {digest: self.cache.rows[digest] for digest in own.values()}
        digests: dict[Path, bytes] = {}
        total = 0
        for theirs, count, new in gather_object([(own, self.computed - before, rows)]):
            digests |= theirs
            total += count
            if not alone:
                self.cache.rows |= new
        self.cache.refresh()
        self.computed = before + total
        self.found += len(digests) - total
        listed = self.cache.digests()
        if missing := [path for path, digest in digests.items() if digest not in listed]:
            raise FeatureCacheError(
                f"{self.settings.feature_cache}: features of image {missing[0]} were written but cannot be read; put "
                "the folder on a file system that all processes share, and start again to compute what is missing"
            )
        return StoredFeatures(self.cache, digests)

    def _fill_cache(self, images: Sequence[ImageRecord], on_bad_image: str, progress: bool) -> dict[Path, bytes]:
        """Add to the cache what it lacks of ``images``; the digest of each that is in it then, by path."""
        digests: dict[Path, bytes] = {}
        for image in images if self.files is not None else ():
            digest = self.files.known(image.path)
            if digest is not None and self.cache.find(digest) is not None:
                digests[image.path] = digest
        pending = [image for image in images if image.path not in digests]
        for _ in range(2):  # the second time for what the index lists, so that it was not decoded, but is damaged
            if pending:
                digests |= self._encode(pending, on_bad_image, progress)
                self.cache.refresh()
                read = [image for image in pending if image.path in digests]
                pending = [image for image in read if self.cache.find(digests[image.path]) is None]
        return digests

    def _encode(self, images: Sequence[ImageRecord], on_bad_image: str, progress: bool) -> dict[Path, bytes]:
        """Read ``images``, compute features of contents that the cache lacks, and return the digest of each image."""
        loader = DataLoader(
            ImageDataset(images, self.preprocessor, on_bad_image=on_bad_image, known=self.cache.digests()),
            self.settings.feature_batch_size,
            num_workers=self.settings.workers,
            collate_fn=list,
            # Its own generator: making an iterator would otherwise draw from the one dropout uses.
            generator=torch.Generator().manual_seed(0),
        )
        digests: dict[Path, bytes] = {}
        stats: dict[Path, tuple[Stat, bytes]] = {}
        try:
            for batch in tqdm(loader, desc="features", disable=not progress, leave=False, dynamic_ncols=True):
                items = [item for item in batch if item is not None]
                new = {item["digest"]: item["pixel_values"] for item in items if "pixel_values" in item}
                if new:
                    self.cache.add(list(new), self.encode(torch.stack(list(new.values()))))
                    self.computed += len(new)
                digests |= {item["path"]: item["digest"] for item in items}
                stats |= {i["path"]: (i["stat"], i["digest"]) for i in items if i["stat"] is not None}
        finally:
            if self.files is not None:
                self.files.remember(stats)
        return digests
