"""Image processors of transformers by the class that a ``preprocessor_config.json`` names, on Pillow and NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

PLAIN = "ViTImageProcessor"  # resizes to a fixed height and width, rescales, normalises; what a file without a class is
LARGEST_SIDE = 4096  # pixels that a tower is given per side


def processor_name(config: Mapping[str, Any]) -> str:
    """The class that a config names, an old or a fast form as the one of today."""
    name = config.get("image_processor_type") or config.get("feature_extractor_type") or PLAIN
    return str(name).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")


def make_processor(config: Mapping[str, Any]) -> Any:
    """The image processor of a config. Raises ValueError when there is none for it that does without torchvision."""
    import transformers
    from transformers.image_processing_backends import PilBackend

    from routingvl.data.dinov3 import DINOv3ViTImageProcessorPil

    name = processor_name(config)
    found = DINOv3ViTImageProcessorPil if name == "DINOv3ViTImageProcessor" else None
    if found is None and name.isidentifier():
        found = getattr(transformers, f"{name}Pil", None)
    if not (isinstance(found, type) and issubclass(found, PilBackend)):
        raise ValueError(f"image_processor_type={name!r} is no image processor that works without torchvision")
    processor = found.from_dict(dict(config))
    for key in ("size", "crop_size", "pad_size"):
        sides = dict(getattr(processor, key, None) or {})
        if not all(side is None or (type(side) is int and 0 < side <= LARGEST_SIDE) for side in sides.values()):
            raise ValueError(f"{key}={config.get(key)!r:.80} must have sides from 1 to {LARGEST_SIDE}")
    return processor


def probes(processor: Any) -> list[Tensor]:
    """What a processor makes of a wide and a high picture of noise."""
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((37, 53), (70, 45))]
    return [processor(picture, return_tensors="pt")["pixel_values"][0] for picture in pictures]


def fixed_size(found: list[Tensor]) -> tuple[int, int]:
    """Height and width of what :func:`probes` gave. Raises ValueError unless all pictures get the same."""
    shapes = {tuple(pixels.shape) for pixels in found}
    shape = shapes.pop()
    if shapes or len(shape) != 3 or shape[0] != 3:
        raise ValueError(
            "only preprocessing to a fixed height and width is supported; this gives pixel values of shape "
            f"{list(shape)}" + "".join(f" or {list(other)}" for other in shapes)
        )
    return shape[1:]
