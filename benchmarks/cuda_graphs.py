"""Forward and backward pass replayed from a CUDA graph, so that launching kernels takes no time.

The capture follows torch's documentation of torch.cuda.CUDAGraph: inputs stay where they are, passes on a side stream
first, and no gradients before the capture, so that the backward pass makes them in the graph's own memory and every
replay writes them there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .gate import CAPS, relative_rms
from .passes import Checked, Pass, attempt, turns
from .timing import Timer

WARM_UP = 3


def capture(whole: Pass, device: torch.device) -> torch.cuda.CUDAGraph:
    """A graph of one pass.

    Raises:
        RuntimeError: the pass does what cannot be captured, such as waiting for the device.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            whole.clear()
            whole.run()
    torch.cuda.current_stream(device).wait_stream(side)
    whole.clear()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            whole.run()
    except Exception as error:
        free_generators()
        raise (error.__context__ or error) from None  # leaving a block that failed fails again and hides why
    return graph


def free_generators() -> None:
    """Let the GPUs' generators draw again: a capture that failed leaves them waiting for its end."""
    for generator in torch.cuda.default_generators:
        generator.graphsafe_set_state(generator.clone_state())


@dataclass
class Replay:
    """A graph, with the pass whose tensors it reads and writes: they have to live as long as the graph does."""

    graph: torch.cuda.CUDAGraph
    whole: Pass

    def __call__(self) -> None:
        self.graph.replay()


def gated_graph(whole: Pass, dtype: torch.dtype, dropout: bool, device: torch.device) -> tuple[Replay | None, Checked]:
    """What replays a pass, and how far its gradients are from those of the pass as it was gated.

    With ``dropout`` the two draw other masks, so that finite gradients have to do. What cannot be captured has raised.
    """
    whole.clear()
    whole.run()
    want = [gradient.clone() for gradient in whole.gradients()]
    graph, found = attempt(lambda: capture(whole, device), device)
    if graph is None:
        return None, found
    got = whole.gradients()
    for gradient in got:
        gradient.fill_(torch.nan)  # until the replay writes it
    graph.replay()
    torch.cuda.synchronize(device)
    if dropout:
        found.missed = [] if all(gradient.isfinite().all() for gradient in got) else ["replayed gradients not finite"]
        return Replay(graph, whole), found
    errors = [relative_rms(*pair) for pair in zip(got, want, strict=True)]
    found.worst_error = max(errors)
    if not all(error <= CAPS[dtype] for error in errors):
        found.missed = [f"replayed gradients relative RMS error {found.worst_error:.2e} is above {CAPS[dtype]:.2e}"]
    return Replay(graph, whole), found


def measure_replays(replays: Mapping[str, Replay], timer: Timer, repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    for name, counts in turns(replays, repeats):
        spent, _ = timer(replays[name])
        if counts:
            seconds[name].append(spent)
    return seconds
