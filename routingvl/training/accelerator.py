"""The accelerator of a run: on which device it computes, in which precision, and what accelerate logs it with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list

from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig
from routingvl.kernels.dispatch import select_backend

Result = TypeVar("Result")


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


def in_first_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What ``work`` returns in the first process, in every process; so is its error, where the others would wait."""
    outcome: list[Result | Exception] = [RuntimeError("the first process has ended")]
    if accelerator.is_main_process:
        try:
            outcome = [work()]
        except Exception as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        outcome = broadcast_object_list(outcome)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]
