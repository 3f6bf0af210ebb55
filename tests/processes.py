"""Two processes with torch.distributed over gloo on the CPU, for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PROCESSES = 2
needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="a torch without gloo")
SECONDS = 150  # for all of it, imports included


def run_in_processes(work: Callable[[int, Path], None], folder: Path) -> None:
    """Call ``work(rank, folder)`` in each of two processes of one group, and wait; the first error is raised here.

    The processes find one another through a file in ``folder``, so no port can be taken. One that waits in vain for
    the other is ended.
    """
    context = mp.start_processes(_enter, (work, folder), nprocs=PROCESSES, join=False, start_method="spawn")
    deadline = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{work.__name__} took more than {SECONDS} s in {PROCESSES} processes")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _enter(rank: int, work: Callable[[int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / f"rendezvous-{work.__name__}").as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=timedelta(seconds=60),
    )
    try:
        work(rank, folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()
