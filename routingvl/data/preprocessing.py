"""Preprocessing of images as a frozen vision tower expects them, read from the file that belongs to it.

Reading is ours, because transformers' image processors take RGB only, and errors have to name the file. torchvision is
never needed.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from routingvl.backbones.loading import BackboneError, find_source, loading
from routingvl.data.files import DataError, read_json
from routingvl.data.image_files import ImageError, load_image, to_rgb
from routingvl.data.processors import LARGEST_SIDE, PLAIN, fixed_size, make_processor, probes, processor_name

logger = logging.getLogger(__name__)

PREPROCESSOR_FILE = "preprocessor_config.json"
LONGEST = 500  # times its height that a picture may be wide, or the other way, where its shorter side is resized


@dataclass(frozen=True)
class ImagePreprocessor:
    """Read an image and let transformers' ``ViTImageProcessorPil`` resize, rescale and normalise it.

    Each channel becomes ``(pixel * rescale - mean) / std``. What else a tower's file asks for, as a centre crop, the
    image processor that it names does, as ``settings`` say.

    Attributes:
        size: height and width in pixels; one integer for a square.
        mean, std: of each channel, in rescaled intensities.
        resample: Pillow's filter number (2 is bilinear, 3 bicubic).
        rescale: factor on the 8-bit intensities.
        exif: turn files as their EXIF orientation says; a matter of the files, so :meth:`to_dict` leaves it out.
        settings: a whole ``preprocessor_config.json``, which is then what counts; None for what is said above.
    """

    size: int | tuple[int, int] = 224
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: int = 2
    rescale: float = 1 / 255
    exif: bool = False
    settings: Mapping[str, Any] | None = field(default=None, hash=False)
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
        object.__setattr__(self, "_processor", make_processor(self.to_dict()))  # here: transformers takes seconds

    def __call__(self, image: Image.Image | str | os.PathLike[str], name: str | os.PathLike[str] = "given") -> Tensor:
        """Preprocess an image, or the file at a path, to float32 [3, H, W].

        Raises :class:`ImageError` with the path, or the ``name`` of an image, also for one that is over 500 times as
        long as wide where the shorter side would be resized: it could fill the memory.
        """
        if not isinstance(image, Image.Image):
            name, image = image, load_image(image, exif=self.exif)
        image = to_rgb(image)
        if self.settings is not None and max(image.size) > LONGEST * min(image.size):
            raise ImageError(f"image {name} cannot be resized: it has {image.size[0]} x {image.size[1]} pixels")
        return self._processor(image, return_tensors="pt")["pixel_values"][0].float()

    def to_dict(self) -> dict[str, Any]:
        """The settings as transformers writes them to ``preprocessor_config.json``."""
        if self.settings is not None:
            return dict(self.settings)
        return {
            "image_processor_type": PLAIN,
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

        Raises :class:`DataError`, opening with ``source``, for steps that would not give a fixed size, and for a class
        of image processor that needs torchvision.
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
        plain = processor_name(config) == PLAIN and config.get("do_resize", True) and not config.get("do_center_crop")
        try:
            if not plain or (isinstance(size, tuple) and None in size):
                return cls._of_processor(config)
            normalize = config.get("do_normalize", True)
            return cls(
                size=size if isinstance(size, int) else tuple(size),
                mean=config.get("image_mean") or cls.mean if normalize else (0.0, 0.0, 0.0),
                std=config.get("image_std") or cls.std if normalize else (1.0, 1.0, 1.0),
                resample=config.get("resample", cls.resample),
                rescale=config.get("rescale_factor", cls.rescale) if config.get("do_rescale", True) else 1.0,
            )
        except (ArithmeticError, AttributeError, ImportError, KeyError, MemoryError, TypeError, ValueError) as error:
            raise DataError(f"{source}: {error}") from error

    @classmethod
    def _of_processor(cls, config: Mapping[str, Any]) -> ImagePreprocessor:
        """What the image processor that ``config`` names does; without ``settings`` where a plain one does the same."""
        processor = make_processor(config)
        normalize, resample = processor.do_normalize, processor.resample
        values = {
            "mean": processor.image_mean if normalize else (0.0, 0.0, 0.0),
            "std": processor.image_std if normalize else (1.0, 1.0, 1.0),
            "resample": int(resample) if isinstance(resample, Image.Resampling) else resample,
            "rescale": processor.rescale_factor if processor.do_rescale else 1.0,
        }
        cls(size=1, **values)  # their checks, before anything is computed with them
        found = probes(processor)
        plain = cls(size=fixed_size(found), **values)
        if all(map(torch.equal, probes(plain._processor), found)):
            return plain
        settings = {key: _as_json(value) for key, value in processor.to_dict().items()}
        return dataclasses.replace(plain, settings=settings)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike[str]) -> ImagePreprocessor:
        """Read the preprocessing that belongs to a vision tower, from its local folder or by its hub name.

        It is in ``preprocessor_config.json`` or, of CLIP and the like, in ``processor_config.json``. A ViT without gets
        ``image_size`` of its ``config.json`` with mean and standard deviation 0.5 (what the published ViT checkpoints
        use), and a log line says so. Raises :class:`DataError` when there is nothing to go by.
        """
        path = _pretrained_file(name_or_dir, "config.json")
        model = {} if path is None else read_json(path, kind=dict)
        image_size = model.get("image_size")
        kind = model.get("model_type")
        config, own = _own_config(name_or_dir)
        if config is not None:
            if kind not in (None, "vit") and not config.keys() & {"image_processor_type", "feature_extractor_type"}:
                raise DataError(f"{own} lacks image_processor_type: take the file that belongs to the {kind}")
            found = cls.from_dict(config, source=str(own))
            if kind == "vit" and image_size not in (found.size[0], list(found.size)):
                raise DataError(
                    f"{own} gives images of {found.size[0]} x {found.size[1]} pixels, but {path} is of a ViT for "
                    f"{image_size}; is it of another model?"
                )
            return found
        if image_size is None:
            raise DataError(
                f"{name_or_dir} has neither {PREPROCESSOR_FILE} nor a config.json with image_size; give the folder or "
                f"hub name of a vision tower, or save ImagePreprocessor(...).to_dict() as {PREPROCESSOR_FILE}"
            )
        if kind not in (None, "vit"):
            raise DataError(f"{name_or_dir} has no {PREPROCESSOR_FILE}: take the one that belongs to the {kind}")
        logger.warning("%s has no %s: taking size %s, mean and std 0.5", name_or_dir, PREPROCESSOR_FILE, image_size)
        return cls.from_dict({"size": image_size}, source=str(path))


def _own_config(name_or_dir: str | os.PathLike[str]) -> tuple[Mapping[str, Any] | None, Path | None]:
    """The settings of a model's image processor and the file that they are in; None and None when it has none."""
    if (path := _pretrained_file(name_or_dir, PREPROCESSOR_FILE)) is not None:
        return read_json(path, kind=dict), path
    if (path := _pretrained_file(name_or_dir, "processor_config.json")) is not None:
        inner = read_json(path, kind=dict).get("image_processor")
        if isinstance(inner, Mapping):
            return inner, path
    return None, None


def _as_json(value: Any) -> Any:
    """A setting of an image processor as its file has it."""
    if isinstance(value, Mapping):
        return {key: side for key, side in value.items() if side is not None}
    if isinstance(value, Image.Resampling):
        return int(value)
    return list(value) if isinstance(value, tuple) else value


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
