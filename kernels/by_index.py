"""Text that names its image token by token: several texts packed into one row, several images in one text.

The kernels and the eager backend give all rows of one batch entry the same image. So each token of the text becomes an
entry of its own, with a copy of what its image came to in the bottleneck (R numbers), and everything else is as ever.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .image_code import ImageCode
from .inputs import check_shape
from .routing import Routing


def check_index(
    image_index: Tensor | None, x: Tensor, v: Tensor | None, routing: Routing, relu: bool, width: int | None = None
) -> None:
    """Raise ``ValueError`` unless image_index [B, T] fits x [B, T, K] and v [I, 1, K]; its values are not looked at.

    ``width`` is that of v where it is not K.
    """
    if v is None:
        raise ValueError("image_index says which image a token reads: v has to be given")
    check_shape("x", x, ("B", "T", "K"))
    check_shape("v", v, ("I", "L", width or x.shape[2]))
    routing.check(v.shape[1], relu)
    if routing.mixes_text:
        raise ValueError(f"routing {routing.name!r} takes each text whole: there is no image_index for it")
    if v.shape[1] != 1:
        raise ValueError(
            f"image_index goes with one visual token per image, got L={v.shape[1]}: pool first, v.mean(1, keepdim=True)"
        )
    check_shape("image_index", image_index, x.shape[:2])
    if image_index.dtype != torch.int64 or image_index.device != x.device:
        have = f"{image_index.dtype} on {image_index.device}"
        raise ValueError(f"image_index must be torch.int64 on {x.device}, got {have}")


def each_token(x: Tensor | None) -> Tensor | None:
    """x [B, T, K] as [B*T, 1, K]."""
    return None if x is None else x.flatten(0, 1).unsqueeze(1)


def of_each_token(per_image: Tensor, image_index: Tensor) -> Tensor:
    """per_image [I, 1, R] for each token of the text, [B*T, 1, R], differentiable.

    Through an embedding, whose backward pass adds up in a fixed order, and in float32 at least.
    """
    table = per_image.squeeze(1)
    wide = table if table.dtype == torch.float64 else table.float()
    return F.embedding(image_index.flatten(), wide).to(table.dtype).unsqueeze(1)


def code_of_each_token(code: ImageCode, image_index: Tensor) -> ImageCode:
    """The code's u for each token; factors as wide as x and y would cost more than they save, so there are none."""
    return ImageCode(of_each_token(code.u, image_index))
