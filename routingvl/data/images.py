"""Images: reading with Pillow, preprocessing as the frozen ViT expects, and the datasets' way to a picture.

Reading is ours, because transformers' image processors take RGB only, and errors have to name the file. torchvision is
never needed. EXIF rotation is not applied.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from routingvl.config import check_choice
from routingvl.config.schema import ON_BAD_IMAGE
from routingvl.data.feature_cache import file_stat
from routingvl.data.files import DataError, read_json

logger = logging.getLogger(__name__)

Features = Mapping[int | str, Tensor] | Callable[[Any], Tensor]
PREPROCESSOR_FILE = "preprocessor_config.json"
_WORKER_SLOTS = 257  # of the counter of skipped images: the main process, then one per DataLoader worker


class ImageError(ValueError):
    """An image is missing or cannot be decoded; the message names the file."""


def load_image(path: str | os.PathLike[str], data: bytes | None = None) -> Image.Image:
    """Read and decode an image completely, as RGB, whatever its mode (grey, 16-bit, palette, alpha, CMYK).

    ``data`` is the content of the file when it has been read already.

    Raises :class:`ImageError`, naming the file, when it is missing, truncated or not an image.
    """
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            image.load()
            return to_rgb(image)
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"image {path} cannot be read: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB; alpha is dropped, 16-bit grey is scaled to 8 bits (Pillow would clip it to white)."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # "I;16" and its byte orders; "I" is what some formats give for 16 bits
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImagePreprocessor:
    """Read an image and let transformers' ``ViTImageProcessorPil`` resize, rescale and normalise it.

    Each channel becomes ``(pixel * rescale - mean) / std``.

    Attributes:
        size: height and width in pixels; one integer for a square.
        mean, std: of each channel, in rescaled intensities.
        resample: Pillow's filter number (2 is bilinear, 3 bicubic).
        rescale: factor on the 8-bit intensities.
    """

    size: int | tuple[int, int] = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = 2
    rescale: float = 1 / 255
    _processor: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"size={self.size!r} must be a positive integer or (height, width)")
        for name in ("mean", "std"):
            values = getattr(self, name)
            values = (values,) * 3 if isinstance(values, (int, float)) else tuple(values)
            if len(values) != 3:
                raise ValueError(f"{name}={getattr(self, name)!r} must have one value for each of R, G and B")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if not all(self.std):
            raise ValueError(f"std={self.std!r} must not contain zero")
        object.__setattr__(self, "size", size)
        # Here, because importing it takes seconds; this class by its name, because others ask for torchvision.
        from transformers import ViTImageProcessorPil

        object.__setattr__(self, "_processor", ViTImageProcessorPil.from_dict(self.to_dict()))

    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> Tensor:
        """Preprocess an image, or the file at a path, to float32 [3, H, W]. Raises :class:`ImageError`."""
        image = to_rgb(image) if isinstance(image, Image.Image) else load_image(image)
        return self._processor(image, return_tensors="pt")["pixel_values"][0]

    def to_dict(self) -> dict[str, Any]:
        """The settings as transformers writes them to ``preprocessor_config.json``."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.size[0], "width": self.size[1]},
            "resample": self.resample,
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], source: str = PREPROCESSOR_FILE) -> ImagePreprocessor:
        """Build from a ``preprocessor_config.json``, old (``feature_extractor_type``, one integer as size) or new.

        Raises :class:`DataError`, opening with ``source``, for steps that would not give a fixed size.
        """
        size = config.get("size", 224)
        if isinstance(size, Mapping):
            size = (size.get("height"), size.get("width"))
        if (
            not config.get("do_resize", True)
            or config.get("do_center_crop", False)
            or (isinstance(size, tuple) and None in size)
        ):
            raise DataError(
                f"{source}: only resizing to a fixed height and width is supported, not size={config.get('size')!r}, "
                f"do_resize={config.get('do_resize', True)}, do_center_crop={config.get('do_center_crop', False)}"
            )
        normalize = config.get("do_normalize", True)
        try:
            return cls(
                size=size if isinstance(size, int) else tuple(size),
                mean=config.get("image_mean") or cls.mean if normalize else (0.0, 0.0, 0.0),
                std=config.get("image_std") or cls.std if normalize else (1.0, 1.0, 1.0),
                resample=config.get("resample", cls.resample),
                rescale=config.get("rescale_factor", cls.rescale) if config.get("do_rescale", True) else 1.0,
            )
        except (TypeError, ValueError) as error:
            raise DataError(f"{source}: {error}") from error

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike[str]) -> ImagePreprocessor:
        """Read the preprocessing that belongs to a ViT, from its local folder or by its hub name.

        A model without ``preprocessor_config.json`` gets ``image_size`` of its ``config.json`` with mean and standard
        deviation 0.5 (what the published ViT checkpoints use), and a log line says so. Raises :class:`DataError` when
        neither file is found.
        """
        if (path := _pretrained_file(name_or_dir, PREPROCESSOR_FILE)) is not None:
            return cls.from_dict(read_json(path), source=str(path))
        path = _pretrained_file(name_or_dir, "config.json")
        image_size = None if path is None else read_json(path).get("image_size")
        if image_size is None:
            raise DataError(
                f"{name_or_dir} has neither {PREPROCESSOR_FILE} nor a config.json with image_size; give the folder or "
                f"hub name of a ViT, or save ImagePreprocessor(...).to_dict() as {PREPROCESSOR_FILE}"
            )
        logger.warning("%s has no %s: taking size %s, mean and std 0.5", name_or_dir, PREPROCESSOR_FILE, image_size)
        return cls(size=image_size if isinstance(image_size, int) else tuple(image_size))


def _pretrained_file(name_or_dir: str | os.PathLike[str], file_name: str) -> Path | None:
    """A file of a model, from its folder or by hub name through transformers' cache; None when it has no such file."""
    from transformers.utils import cached_file

    try:
        found = cached_file(os.fspath(name_or_dir), file_name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{name_or_dir} is neither a local folder nor a reachable hub name: {error}") from error
    return None if found is None else Path(found)


@dataclass(frozen=True)
class ImageRecord:
    """One image of a split: its id (COCO's, or its name), its file name and, when an image root is known, its path."""

    image_id: int | str
    file_name: str
    path: Path | None = None


class PictureSource:
    """What gives pictures: stored features when there are any, else the preprocessed files.

    Args:
        preprocessor: turns an image file into pixel values; may be None when ``features`` is given.
        features: image id -> [L, d], a mapping or a function; images are then never opened.
        on_bad_image: "fail" raises :class:`ImageError` (or :class:`DataError` for an id that ``features`` lacks);
            "skip" returns None instead, logs the reason and counts it in :attr:`skipped`.
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

    def _read(self, image: ImageRecord) -> dict[str, Any]:
        if self.features is not None:
            try:
                get = self.features if callable(self.features) else self.features.__getitem__
                return {"vision_features": get(image.image_id)}
            except KeyError as error:
                raise DataError(f"no stored features for image {image.image_id} ({image.file_name})") from error
        if image.path is None:
            raise DataError(f"image {image.file_name} is needed, but its split was loaded without an image folder")
        return self._from_file(image.path)

    def _from_file(self, path: Path) -> dict[str, Any]:
        return {"pixel_values": self.preprocessor(path)}


class ImageDataset(PictureSource, Dataset):
    """One item per image, or None for a skipped one; made for running the frozen tower once over a split's images.

    Items are ``{"image_id": int, "digest": SHA-256 of the file, "stat": as of file_stat or None when the file changed
    meanwhile, "pixel_values": float32 [3, H, W]}``. The file is read once, so the digest belongs to the very bytes that
    are decoded. An image whose digest is in ``known`` is not decoded: it has no ``pixel_values``.
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
        picture = self.picture(self.records[index])
        return None if picture is None else {"image_id": self.records[index].image_id, **picture}

    def _from_file(self, path: Path) -> dict[str, Any]:
        try:
            before, data, after = file_stat(path), path.read_bytes(), file_stat(path)
        except FileNotFoundError as error:
            raise ImageError(f"image {path} does not exist") from error
        except OSError as error:
            raise ImageError(f"image {path} cannot be read: {error}") from error
        item: dict[str, Any] = {"digest": hashlib.sha256(data).digest(), "stat": after if before == after else None}
        if item["digest"] not in self.known:
            item["pixel_values"] = self.preprocessor(load_image(path, data))
        return item
