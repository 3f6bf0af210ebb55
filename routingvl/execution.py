"""Where and how a process computes: device, precision, and the state of its random generators."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from routingvl.config import ConfigError
from routingvl.kernels.launch import select_backend
from routingvl.run_config import RunConfig


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
