"""Durations of the kernels that a call puts on a CUDA device, by torch's profiler: without launches and gaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

COLD = "bitwise_not"  # in the name of the kernel that overwrites the cache, and of no other here

Event = tuple[str, float, float]  # name, start and duration in microseconds


class KernelTimesError(RuntimeError):
    """The profiler has not seen what ran."""


def device_events(profile: torch.profiler.profile) -> list[Event]:
    """What ran on the device, in order."""
    events = [
        (event.name, event.time_range.start, event.time_range.end - event.time_range.start)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return sorted(events, key=lambda event: event[1])


def between(events: Sequence[Event], mark: str) -> list[list[Event]]:
    """The events after each one whose name has ``mark`` in it, up to the next."""
    pieces: list[list[Event]] = []
    for event in events:
        if mark in event[0]:
            pieces.append([])
        elif pieces:
            pieces[-1].append(event)
    return pieces


def events_of_each(calls: Iterable[Callable[[], object]], cold: Tensor) -> list[list[Event]]:
    """The device's events during each call; ``cold`` is overwritten before it, as a mark and for a cold cache, and
    after it. Each call is made before the next is drawn.

    Raises:
        KernelTimesError: the profiler has not seen every mark.
    """
    made = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for call in calls:
            cold.bitwise_not_()
            call()
            cold.bitwise_not_()
            made += 1
        torch.cuda.synchronize()
    pieces = between(device_events(profile), COLD)
    if len(pieces) != 2 * made:
        raise KernelTimesError(f"the profiler saw {len(pieces)} of {2 * made} marks between {made} calls")
    return pieces[::2]


def total(events: Sequence[Event], only: str = "") -> float:
    """Seconds of the events whose name has ``only`` in it."""
    return sum(length for name, _, length in events if only in name) / 1e6
