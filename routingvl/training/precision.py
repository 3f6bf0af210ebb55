"""Where and how a process computes: device, precision, and the state of its random generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from routingvl.bottlenecks.layers import RoutedLoRALinear, is_conv1d
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig
from routingvl.kernels.dispatch import select_backend


def hush_transformers(quiet: bool) -> None:
    """Hide the bars that transformers draws while it loads models, when output is not wanted or goes to a file."""
    from transformers.utils import logging

    if quiet or not sys.stderr.isatty():
        logging.disable_progress_bar()


def make_accelerator(config: RunConfig) -> Accelerator:
    """The accelerator of a run; raises :class:`ConfigError` when this machine lacks its precision or backend."""
    precision = config.train.mixed_precision
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if precision == "fp16" and on_cpu:
        raise ConfigError("train.mixed_precision='fp16' needs a GPU; use 'bf16' or 'no' here")
    try:
        select_backend("cpu" if on_cpu else "cuda", config.model.backend)
    except RuntimeError as error:
        raise ConfigError(f"model.backend: {error}") from error
    if not torch.distributed.is_initialized():
        # accelerate keeps one state a process and refuses a second run with another precision or device.
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision=precision, cpu=config.device == "cpu")


def lower_frozen_weights(model: nn.Module, dtype: torch.dtype, keep: bool = True) -> Callable[[], None]:
    """Hold the frozen weights of the matrix products in ``model`` in ``dtype``, for use under autocast to that type.

    Autocast casts a frozen float32 weight anew at every use; this casts it once. The results are the same to the bit,
    because these products ran in ``dtype`` before. Trained parameters, norms and embeddings stay as they are; a head
    that shares its weight with the embedding gets a cast copy.

    Args:
        model: with projections as nn.Linear, transformers' Conv1D or RoutedLoRALinear.
        dtype: bfloat16 or float16.
        keep: keep the float32 weights, so that they can be put back; False frees their memory.

    Returns:
        A function that puts the float32 weights back; with ``keep=False`` it does so for shared weights only.
    """
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    undo: list[Callable[[], None]] = []
    lowered: set[int] = set()
    for module in filter(_is_product, model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad or parameter.dtype != torch.float32 or id(parameter) in lowered:
                continue
            if not all(map(_is_product, owners[id(parameter)])):
                delattr(module, name)  # a plain tensor in its place, which is no parameter of the model
                setattr(module, name, parameter.detach().to(dtype))
                undo.append(partial(_put_back, module, name, parameter))
                continue
            if keep:
                undo.append(partial(setattr, parameter, "data", parameter.data))
            parameter.data = parameter.data.to(dtype)
            lowered.add(id(parameter))

    def restore() -> None:
        for action in undo:
            action()
        undo.clear()

    return restore


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, RoutedLoRALinear)) or is_conv1d(module)


def _put_back(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    delattr(module, name)
    module.register_parameter(name, parameter)


def rng_state() -> dict[str, Any]:
    """State of every random generator, as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": list(random.getstate()[1]),
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` read."""
    random.setstate((3, tuple(state["python"]), None))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
