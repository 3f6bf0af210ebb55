"""The accelerator of a run: on which device it computes, in which precision, and what accelerate logs it with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration

from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig
from routingvl.kernels.dispatch import select_backend


def make_accelerator(config: RunConfig, trackers: Sequence[str] = ()) -> Accelerator:
    """The accelerator of a run, with the named trackers of accelerate, still to be started.

    Raises :class:`ConfigError` when this machine lacks its precision or backend.
    """
    precision = config.train.mixed_precision
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    if precision == "fp16" and on_cpu:
        raise ConfigError("train.mixed_precision='fp16' needs a GPU; use 'bf16' or 'no' here")
    try:
        select_backend("cpu" if on_cpu else "cuda", config.model.backend)
    except RuntimeError as error:
        raise ConfigError(f"model.backend: {error}") from error
    if not torch.distributed.is_initialized():
        # accelerate keeps one state per process and refuses a second run with another precision or device.
        AcceleratorState._reset_state(reset_partial_state=True)
    logs = ProjectConfiguration(logging_dir=str(Path(config.output_dir) / "tensorboard"))
    return Accelerator(
        mixed_precision=precision,
        cpu=config.device == "cpu",
        log_with=list(trackers) or None,
        project_config=logs,
    )
