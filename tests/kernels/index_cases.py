"""Text that names its image token by token, by the definition: a loop over the images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from routed_cases import LAYOUTS, options
from torch import Tensor

from routingvl.kernels import ROUTINGS
from routingvl.kernels.reference import reference_adapter, reference_lora

IMAGES = 3
# [B, T]: packed texts, several images in a row in any order, one that nobody reads (none here has 1).
INDEX = torch.tensor([[0, 0, 2, 2, 2], [2, 0, 2, 0, 0]])
ROUTED = [
    (name, relu) for name, row in ROUTINGS.items() if row.uses_image for relu in (False, True)[: 1 + row.supports_relu]
]


def by_loop(op, x: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
    """``op(x, v, base)`` of each image's own tokens alone, put together."""
    rows = {i: (i == INDEX).nonzero(as_tuple=True) for i in INDEX.unique().tolist()}
    pieces = {i: op(x[at][None], v[i][None], None if base is None else base[at][None])[0] for i, at in rows.items()}
    y = x.new_zeros(*INDEX.shape, next(iter(pieces.values())).shape[1])
    for i, at in rows.items():
        y = y.index_put(tuple(place.to(y.device) for place in at), pieces[i])
    return y


def lora_tensors(layout: str) -> dict[str, Tensor]:
    """Of routed_lora_linear with IMAGES images."""
    draws = torch.Generator().manual_seed(3)
    groups, _, units = LAYOUTS[layout]
    shapes = {"x": (*INDEX.shape, 6), "v": (IMAGES, 1, 6), "weight": (units * 4, 6), "bias": (units * 4,)}
    shapes |= {"a": (groups * 3, 6), "b": (groups * 4, 3)}
    return {name: torch.randn(shape, dtype=torch.float64, generator=draws) for name, shape in shapes.items()}


def adapter_tensors() -> dict[str, Tensor]:
    """Of routed_adapter with IMAGES images."""
    draws = torch.Generator().manual_seed(4)
    shapes = {"x": (*INDEX.shape, 6), "v": (IMAGES, 1, 6), "down_weight": (4, 6), "down_bias": (4,)}
    shapes |= {"up_weight": (6, 4), "up_bias": (6,)}
    return {name: torch.randn(shape, dtype=torch.float64, generator=draws) for name, shape in shapes.items()}


def looped_lora(name: str, relu: bool, layout: str, placement: str = "bottleneck"):
    """The definition of routed_lora_linear with INDEX."""
    chosen = options(name, relu, layout, placement=placement)

    def run(x, v, weight, bias, a, b):
        base = F.linear(x, weight, bias)
        return by_loop(lambda x, v, base: reference_lora(x, v, a, b, base=base, **chosen), x, v, base)

    return run


def looped_adapter(name: str, relu: bool, residual: bool):
    """The definition of routed_adapter with INDEX."""
    chosen = {"routing": name, "relu": relu, "activation": "gelu", "residual": residual}

    def run(x, v, down_weight, down_bias, up_weight, up_bias):
        weights = (down_weight, down_bias, up_weight, up_bias)
        return by_loop(lambda x, v, _: reference_adapter(x, v, *weights, **chosen), x, v)

    return run
