"""A process of its own for the emulator, one an architecture: Triton is no interpreter there, and launches go nowhere
else. It imports nothing, so that a process can start with it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_SETTINGS = ("TRITON_INTERPRET", "ROUTINGVL_BACKEND", "ROUTINGVL_TILES", "ROUTINGVL_LAUNCH")  # of the tests around


def _begin() -> None:
    """Before anything imports triton or torch."""
    for name in _SETTINGS:
        os.environ.pop(name, None)


class Children:
    """Runs functions in such processes, which start when they are first needed."""

    def __init__(self) -> None:
        self._pools: dict[int, ProcessPoolExecutor] = {}

    def __call__(self, arch: int, function: Callable[..., Any], *args: Any) -> Any:
        """``function(arch, *args)`` in the process of sm_``arch``; raises what it raises."""
        if arch not in self._pools:
            context = multiprocessing.get_context("spawn")
            self._pools[arch] = ProcessPoolExecutor(1, context, initializer=_begin)
        return self._pools[arch].submit(function, arch, *args).result()

    def end(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.shutdown()
