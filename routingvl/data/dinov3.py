"""DINOv3's preprocessing without torchvision, which transformers' own class of it needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

MODES = {PILImageResampling.BILINEAR: "bilinear", PILImageResampling.BICUBIC: "bicubic"}


class DINOv3ViTImageProcessorPil(PilBackend):
    """Rescale, then resize in float32 with antialiasing, then normalise: the order in which DINOv3 was trained."""

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 224, "width": 224}  # noqa: RUF012 - read by transformers' constructor
    do_resize = True
    do_rescale = True
    do_normalize = True

    def resize(self, image: np.ndarray, size: Any, resample: int | None = None, **kwargs: Any) -> np.ndarray:
        """[3, H, W] -> [3, height, width]; ValueError for a filter that torch does not have."""
        if resample not in MODES:
            raise ValueError(f"resample={resample!r} is not one of {[*map(int, MODES)]}")
        pixels = torch.as_tensor(image)[None].float()
        pixels = interpolate(pixels, (size.height, size.width), mode=MODES[resample], antialias=True)
        return pixels[0].numpy()

    def _preprocess(
        self, images: list[np.ndarray], do_rescale: bool, do_resize: bool, rescale_factor: float, **options: Any
    ) -> Any:
        if do_rescale:
            images = [self.rescale(image, rescale_factor) for image in images]
        options |= {"do_rescale": False, "rescale_factor": rescale_factor, "do_resize": do_resize}
        return super()._preprocess(images, **options)
