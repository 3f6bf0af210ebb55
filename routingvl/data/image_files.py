"""Image files, read with Pillow, whatever their mode, with errors that name them."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

# What is opened, whatever a file's name says. No other decoder of Pillow starts (EPS runs a program).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION_MARKS = (b"Exif", b"eXIf", b"EXIF", b"exif", b"tiff:Orientation")
MOST_FILE_BYTES = 1 << 30  # of an image file


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


def is_turned(data: bytes) -> bool:
    """Whether the EXIF orientation of an image file asks for another picture than its pixels give."""
    # Without opening the many that have none: TIFF files begin so, in others the orientation is behind one of these.
    if not data.startswith((b"II", b"MM")) and not any(mark in data for mark in _ORIENTATION_MARKS):
        return False
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # no image, or damaged EXIF data: load_image says which
        return False
