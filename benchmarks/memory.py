"""Peak memory: of the running process, libraries and all (Linux, where /proc can reset it), and of tensors; and what
autograd keeps for the backward pass.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from routingvl.training.estimate import saved_mib as saved_mib

PROC = Path("/proc/self")


def can_measure() -> bool:
    """Whether this system lets a process reset and read its own peak."""
    try:
        _reset_peak()
        return _peak_mib() > 0
    except (OSError, StopIteration, ValueError):
        return False


def process_peak(call: Callable[[], object]) -> float:
    """MiB that this process occupies at its peak during ``call``, with all that it holds before.

    Raises:
        OSError: this system has no /proc/self/clear_refs, see :func:`can_measure`.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # glibc keeps freed memory for later; what was needed before does not count here
    _reset_peak()
    call()
    return _peak_mib()


def cuda_peak(call: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors on a CUDA device at the peak of ``call``, beyond those that were there before."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def tensor_peak(call: Callable[[], object], device: torch.device) -> float:
    """MiB of tensors at the peak of ``call``, beyond those that were there before; on a CPU as the profiler counts."""
    if device.type == "cuda":
        return cuda_peak(call, device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else torch 2.13 logs every start and stop of a profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events]).max(initial=0), 0) / 2**20


def _reset_peak() -> None:
    (PROC / "clear_refs").write_text("5")


def _peak_mib() -> float:
    lines = (PROC / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
