"""Clocks, the time of a call by each of them, and the file that the rows of a run go to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .kernel_times import events_of_each, total

CLOCKS = ("cpu", "wall", "gpu")
COLD_BYTES = 256 * 2**20  # more than any GPU's cache


def default_clock(device: torch.device, threads: int) -> str:
    """CPU time for one thread of a CPU, wall time for several or for a GPU."""
    return "cpu" if device.type == "cpu" and threads == 1 else "wall"


class Spent(NamedTuple):
    """Seconds of a call; ``host``: until it has returned, where the device goes on by itself and it was measured."""

    seconds: float
    host: float | None = None


class Timer:
    """Seconds of a call.

    The clock is "cpu" (CPU time of this thread, which other processes on the machine do not lengthen), "wall" (from an
    idle device until it is idle again, so that launches count), or "gpu" (the durations of its kernels, added up by
    :meth:`all`). On a GPU its cache is overwritten first. One call alone by "gpu" is timed between two events on the
    device, which is right for what has no host time to hide: one large kernel, or the replay of a CUDA graph.
    """

    def __init__(self, device: torch.device, threads: int, clock: str | None = None) -> None:
        self.device = device
        self.clock = clock or default_clock(device, threads)
        if self.clock == "gpu" and device.type != "cuda":
            raise ValueError(f"--clock gpu needs a CUDA device, not {device}: use 'cpu' or 'wall'")
        self._read = time.thread_time if self.clock == "cpu" else time.perf_counter
        self._cold = torch.empty(COLD_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self, call: Callable[[], Tensor | None]) -> tuple[float, Tensor | None]:
        if self._cold is not None:
            self._cold.zero_()
        if self.clock == "gpu":
            return self._between_events(call)
        spent, result = self._from_idle_to_idle(call)
        return spent.seconds, result

    def all(self, calls: Iterable[Callable[[], object]]) -> list[Spent]:
        """What each call takes, in order; each is made before the next is drawn.

        Raises:
            KernelTimesError: by the clock "gpu", where the profiler has not seen what ran.
        """
        if self.clock == "gpu":
            return [Spent(total(events)) for events in events_of_each(calls, self._cold)]
        return self.walls(calls)

    def walls(self, calls: Iterable[Callable[[], object]]) -> list[Spent]:
        """The same by CPU or wall time whatever the clock, with the host's share on a GPU."""
        found = []
        for call in calls:
            if self._cold is not None:
                self._cold.zero_()
            found.append(self._from_idle_to_idle(call)[0])
        return found

    def _from_idle_to_idle(self, call: Callable[[], Tensor | None]) -> tuple[Spent, Tensor | None]:
        self._synchronise()
        start = self._read()
        result = call()
        returned = self._read()
        if self._cold is None:
            return Spent(returned - start), result
        self._synchronise()
        return Spent(self._read() - start, returned - start), result

    def _between_events(self, call: Callable[[], Tensor | None]) -> tuple[float, Tensor | None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = call()
        end.record()
        self._synchronise()
        return start.elapsed_time(end) / 1e3, result

    def _synchronise(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def quantiles(values: Sequence[float], name: str = "ms", scale: float = 1e3) -> dict[str, float]:
    """``name``_p20, _p50 and _p80 of measured values, times ``scale``: by default milliseconds of seconds."""
    measured = torch.tensor(values, dtype=torch.float64)
    return {f"{name}_p{part}": round(measured.quantile(part / 100).item() * scale, 4) for part in (20, 50, 80)}


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """torch on ``count`` CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def append_rows(path: Path | None, rows: Sequence[dict]) -> None:
    """Append ``rows`` to a file of JSON lines, all in one write; None: nowhere."""
    if path is None:
        return
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())
