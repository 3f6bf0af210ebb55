"""Images: reading with Pillow, preprocessing as the frozen ViT expects, and the datasets' way to a picture.

Reading is ours, because transformers' image processors take RGB only, and errors have to name the file. torchvision is
never needed.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from routingvl.backbones.loading import BackboneError, find_source, loading
from routingvl.config import check_choice
from routingvl.config.schema import ON_BAD_IMAGE
from routingvl.data.feature_cache import StoredFeatures, file_stat
from routingvl.data.files import DataError, read_json

logger = logging.getLogger(__name__)

Features = Mapping[int | str, Tensor] | Callable[[Any], Tensor]
PREPROCESSOR_FILE = "preprocessor_config.json"
# What is opened, whatever a file's name says. No other decoder of Pillow starts (EPS runs a program).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION_MARKS = (b"Exif", b"eXIf", b"EXIF", b"exif", b"tiff:Orientation")
MOST_FILE_BYTES = 1 << 30  # of an image file
LARGEST_SIDE = 4096  # pixels that a ViT is given per side
_WORKER_SLOTS = 257  # of the counter of skipped images: the main process, then one per DataLoader worker


class ImageError(ValueError):
    """An image is missing or cannot be decoded; the message names the file."""


def check_image_file(path: str | os.PathLike[str]) -> None:
    """Raise :class:`ImageError` unless there is a regular file, not a pipe, device or folder, of a bearable size."""
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise ImageError(f"image {path} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"image {str(path)!r:.300} cannot be read: {reason}") from error
    if not stat.S_ISREG(found.st_mode):
        raise ImageError(f"image {path} cannot be read: it is not a regular file")
    if found.st_size > MOST_FILE_BYTES:
        raise ImageError(f"image {path} cannot be read: it has more than {MOST_FILE_BYTES >> 20} MiB")


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """The content of an image file. Raises :class:`ImageError`, naming the file."""
    check_image_file(path)
    try:
        return Path(path).read_bytes()
    except (OSError, MemoryError) as error:
        raise ImageError(f"image {path} cannot be read: {error}") from error


def load_image(path: str | os.PathLike[str], data: bytes | None = None, *, exif: bool = False) -> Image.Image:
    """Read and decode an image completely, as RGB, whatever its mode (grey, 16-bit, float, palette, alpha, CMYK).

    Formats are JPEG, PNG, WebP, GIF (its first frame), BMP and TIFF (its first page).

    Args:
        path: of the file.
        data: its content, when it has been read already.
        exif: turn the picture as its EXIF orientation says.

    Raises:
        ImageError: the file is missing, no regular file, of another format, truncated, not an image, or a
            decompression bomb (Pillow's limit, 179 million pixels); the message names it.
    """
    data = read_image_file(path) if data is None else data
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return to_rgb(_turned(image) if exif else image)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        reason = f"it is none of {', '.join(FORMATS)}" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ImageError(f"image {path} cannot be read: {reason}") from error


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data tell no orientation
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """``image`` in mode RGB; alpha is dropped, and what has more than 8 bits is scaled, as Pillow would clip it.

    16-bit grey keeps its upper 8 bits. 32-bit and float grey is taken for values up to 1 (float only), 255 or 65535,
    the least that holds them all; beyond, and where values are negative, its own range becomes 0 to 255.

    Raises ValueError for values that are not finite.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    if not np.isfinite(grey).all():
        raise ValueError("it holds values that are not finite")
    low, high = float(grey.min()), float(grey.max())
    if grey.dtype.kind == "i" and 255 < high <= 65535 and low >= 0:
        return (grey >> 8).astype(np.uint8)
    limits = (1, 255, 65535) if grey.dtype.kind == "f" else (255,)
    limit = next((limit for limit in limits if low >= 0 and high <= limit), None)
    shift, width = (0.0, float(limit)) if limit else (low, high - low or 1.0)
    return ((grey.astype(np.float64) - shift) * (255 / width)).round().astype(np.uint8)


@dataclass(frozen=True)
class ImagePreprocessor:
    """Read an image and let transformers' ``ViTImageProcessorPil`` resize, rescale and normalise it.

    Each channel becomes ``(pixel * rescale - mean) / std``.

    Attributes:
        size: height and width in pixels; one integer for a square.
        mean, std: of each channel, in rescaled intensities.
        resample: Pillow's filter number (2 is bilinear, 3 bicubic).
        rescale: factor on the 8-bit intensities.
        exif: turn files as their EXIF orientation says; a matter of the files, so :meth:`to_dict` leaves it out.
    """

    size: int | tuple[int, int] = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = 2
    rescale: float = 1 / 255
    exif: bool = False
    _processor: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if len(size) != 2 or not all(type(side) is int and 0 < side <= LARGEST_SIDE for side in size):
            raise ValueError(f"size={self.size!r} must be an integer from 1 to {LARGEST_SIDE} or (height, width)")
        for name in ("mean", "std"):
            values = getattr(self, name)
            values = (values,) * 3 if isinstance(values, (int, float)) else tuple(values)
            if len(values) != 3 or not all(map(_is_number, values)):
                raise ValueError(f"{name}={getattr(self, name)!r} must have one number for each of R, G and B")
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if not min(self.std) > 0:
            raise ValueError(f"std={self.std!r} must be above zero")
        if not _is_number(self.rescale) or not self.rescale > 0:
            raise ValueError(f"rescale={self.rescale!r} must be a number above zero")
        if type(self.resample) is not int or self.resample not in set(Image.Resampling):
            raise ValueError(f"resample={self.resample!r} is none of Pillow's filters, {[*map(int, Image.Resampling)]}")
        object.__setattr__(self, "size", size)
        # Here, because importing it takes seconds; this class by its name, because others ask for torchvision.
        from transformers import ViTImageProcessorPil

        object.__setattr__(self, "_processor", ViTImageProcessorPil.from_dict(self.to_dict()))

    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> Tensor:
        """Preprocess an image, or the file at a path, to float32 [3, H, W]. Raises :class:`ImageError`."""
        image = to_rgb(image) if isinstance(image, Image.Image) else load_image(image, exif=self.exif)
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
        if not isinstance(config, Mapping):
            raise DataError(f"{source} must hold an object with size, image_mean and image_std")
        for key in ("do_resize", "do_center_crop", "do_normalize", "do_rescale", "do_flip_channel_order"):
            if not isinstance(config.get(key), bool | None):
                raise DataError(f"{source}: {key} must be true or false, not {config[key]!r:.60}")
        if config.get("do_flip_channel_order"):
            raise DataError(f"{source}: do_flip_channel_order (channels in the order BGR) is not supported")
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
        path = _pretrained_file(name_or_dir, "config.json")
        model = {} if path is None else read_json(path, kind=dict)
        image_size = model.get("image_size")
        if (own := _pretrained_file(name_or_dir, PREPROCESSOR_FILE)) is not None:
            found = cls.from_dict(read_json(own, kind=dict), source=str(own))
            if model.get("model_type") == "vit" and image_size not in (found.size[0], list(found.size)):
                raise DataError(
                    f"{own} gives images of {found.size[0]} x {found.size[1]} pixels, but {path} is of a ViT for "
                    f"{image_size}; is it of another model?"
                )
            return found
        if image_size is None:
            raise DataError(
                f"{name_or_dir} has neither {PREPROCESSOR_FILE} nor a config.json with image_size; give the folder or "
                f"hub name of a ViT, or save ImagePreprocessor(...).to_dict() as {PREPROCESSOR_FILE}"
            )
        logger.warning("%s has no %s: taking size %s, mean and std 0.5", name_or_dir, PREPROCESSOR_FILE, image_size)
        return cls.from_dict({"size": image_size}, source=str(path))


def _pretrained_file(name_or_dir: str | os.PathLike[str], file_name: str) -> Path | None:
    """A file of a model, from its folder or by hub name through transformers' cache; None when it has no such file."""
    from transformers.utils import cached_file

    try:
        source, local = find_source(os.fspath(name_or_dir))
        if local:
            return path if (path := Path(source, file_name)).exists() else None
        with loading(source, local):
            needed = file_name == "config.json"  # which every model has: without it there is no model, or no network
            found = cached_file(source, file_name, _raise_exceptions_for_missing_entries=needed)
    except BackboneError as error:
        raise DataError(str(error)) from error
    return None if found is None else Path(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class ImageRecord:
    """One image of a split: its id (COCO's, or its name) and file name and, when an image root is known, its path.

    The path is resolved, and it is what tells images apart: ids are only unique within a split, if there.
    """

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
        if self.preprocessor.exif and _is_turned(data):
            digest.update(b"turned by its EXIF orientation")
        item: dict[str, Any] = {"digest": digest.digest(), "stat": after if before == after else None}
        if item["digest"] not in self.known:
            item["pixel_values"] = self.preprocessor(load_image(path, data, exif=self.preprocessor.exif))
        return item


def _is_turned(data: bytes) -> bool:
    """Whether the EXIF orientation of an image file asks for another picture than its pixels give."""
    # Without opening the many that have none: TIFF files begin so, in others the orientation is behind one of these.
    if not data.startswith((b"II", b"MM")) and not any(mark in data for mark in _ORIENTATION_MARKS):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # no image, or damaged EXIF data: load_image says which
        return False
