"""Training through torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from routingvl.models.base import RoutedVLModel

BACKEND = "inductor"


def compiler_obstacle(device: torch.device) -> str | None:
    """Why torch.compile cannot make code for ``device``, and what would mend it; None where it can."""
    try:
        importlib.import_module("torch._inductor.compile_fx")
    except ImportError as error:  # torch 2.6 and 2.7 import what triton 3.4 no longer has
        return (
            f"the compiler of torch {torch.__version__} does not work with the triton that is installed ({error}); "
            "install torch 2.8 or newer"
        )
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "torch.compile needs a C++ compiler on a CPU: install g++ or name one in the variable CXX"
    return None


@contextmanager
def compiled(model: RoutedVLModel) -> Iterator[None]:
    """Calls of ``model`` inside the block run through torch.compile; its parameters keep their names."""
    import torch._inductor.config

    model.compile(backend=BACKEND)
    options = {}
    if model.device.type == "cpu":
        # Inductor's own random numbers are drawn one component at a time; torch's are those of a run without it.
        options["fallback_random"] = True
        # tanh by one exponential: off by some 1e-7, which is nothing in GPT-2's GELU, and faster.
        if hasattr(torch._inductor.config.cpp, "use_decompose_tanh"):
            options["cpp.use_decompose_tanh"] = True
    try:
        with torch._inductor.config.patch(options):
            yield
    finally:
        model._compiled_call_impl = None


def compiled_inputs(model: RoutedVLModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs`` of a training step for a compiled ``model``.

    The frozen ViT runs here, uncompiled. The length of the text [B, T] is marked as one that changes, so that the
    batches of all lengths share one compilation.
    """
    inputs = dict(inputs)
    if (images := inputs.pop("pixel_values", None)) is not None:
        inputs["vision_features"] = model.encode_images(images)
    for name in ("input_ids", "attention_mask", "labels"):
        value = inputs.get(name)
        if value is not None and value.shape == inputs["input_ids"].shape:  # the labels of VQA are [B, answers]
            torch._dynamo.maybe_mark_dynamic(value, 1)
    return inputs
