"""Peak memory: of the running process, libraries and all (Linux, where /proc can reset it), and of a GPU's tensors."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

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


def _reset_peak() -> None:
    (PROC / "clear_refs").write_text("5")


def _peak_mib() -> float:
    lines = (PROC / "status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) / 1024
