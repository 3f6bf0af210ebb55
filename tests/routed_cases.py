"""What the tests of the routed operations run through: functions, layouts, dtypes, random operands, and a recorder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from routingvl.kernels import ROUTINGS
from routingvl.kernels.reference import reference_lora

FORMS = [(name, relu) for name, row in ROUTINGS.items() for relu in (False, True)[: 1 + row.supports_relu]]
# Routing, ReLU and number of visual tokens.
CASES = [
    (*form, tokens) for form in FORMS for tokens in ((1, 3, 9) if ROUTINGS[form[0]].max_visual_tokens is None else (1,))
]
# The same for the kernels, with rows of text: 2 tokens are cheaper one by one, 70 as a matrix of inner products.
KERNEL_CASES = [
    (*form, *sizes)
    for form in FORMS
    for sizes in ((1, 37), (2, 5), (70, 37))[: 3 if ROUTINGS[form[0]].max_visual_tokens is None else 1]
]
# Groups, columns (in units of the group's width n) and width of base in the same unit.
LAYOUTS = {"plain": (1, None, 1), "grouped": (2, None, 2), "c_attn": (2, (0, 2), 3), "slice": (1, (1,), 3)}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensors(
    tokens: int = 1, layout: str = "plain", *, sizes: tuple[int, ...] = (3, 5, 6, 4, 3), seed: int = 0
) -> dict[str, Tensor]:
    """x, v, weight, bias, a, b of a layer in float64; sizes are B, T, K, n, R."""
    torch.manual_seed(seed)
    batch, text, width, n, rank = sizes
    groups, _, units = LAYOUTS[layout]
    return {
        "x": torch.randn(batch, text, width, dtype=torch.float64),
        "v": torch.randn(batch, tokens, width, dtype=torch.float64),
        "weight": torch.randn(units * n, width, dtype=torch.float64) / width**0.5,
        "bias": torch.randn(units * n, dtype=torch.float64),
        "a": torch.randn(groups * rank, width, dtype=torch.float64) / width**0.5,
        "b": torch.randn(groups * n, rank, dtype=torch.float64) / rank**0.5,
    }


def options(name: str, relu: bool, layout: str = "plain", n: int = 4, **more) -> dict:
    groups, units, _ = LAYOUTS[layout]
    columns = None if units is None else tuple(unit * n for unit in units)
    return {"routing": name, "relu": relu, "groups": groups, "columns": columns, "scaling": 1.7, **more}


def defined_linear(x, v, weight, bias, a, b, *, weight_layout: str = "nk", **more) -> Tensor:
    """The definition of routed_lora_linear."""
    base = F.linear(x, weight if weight_layout == "nk" else weight.t(), bias)
    return reference_lora(x, v, a, b, base=base, **more)


class ShapeRecorder(TorchDispatchMode):
    """Records the shape of every tensor that an operation returns in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for item in tree_leaves(result):
            if isinstance(item, Tensor) and item.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(item.shape))
        return result
