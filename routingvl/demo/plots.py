"""The report's figures, as PNG bytes."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from routingvl.kernels import ROUTINGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One colour per routing function, in every figure: gray, then Okabe and Ito's palette, which colour-blind readers tell
# apart too.
_PALETTE = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442")
ROUTING_COLOURS = dict(zip(ROUTINGS, itertools.cycle(_PALETTE), strict=False))

Bars = Mapping[
    str, tuple[Sequence[float], float | None]
]  # routing -> (one value per seed of the search, this run's value)
Curves = Mapping[str, Sequence[tuple[int, float]]]  # routing -> (step, score)


def bars(panels: Mapping[str, tuple[str, Bars]]) -> bytes:
    """Search means as bars with every seed as a dot, and this run's value as a diamond.

    Args:
        panels: title -> (name of the score, bars).
    """
    figure, axes = _axes(len(panels), height=3.3)
    for axis, (title, (score, values)) in zip(axes, panels.items(), strict=True):
        for place, (routing, (seeds, current)) in enumerate(values.items()):
            colour = ROUTING_COLOURS[routing]
            if seeds:
                axis.bar(place, sum(seeds) / len(seeds), color=colour, alpha=0.55, width=0.7)
                axis.scatter([place] * len(seeds), seeds, color=colour, s=16, zorder=3)
            if current is not None:
                axis.scatter([place], [current], marker="D", color="black", s=26, zorder=4)
        axis.set_xticks(range(len(values)), list(values))
        axis.set_title(title, fontsize=10)
        axis.set_ylabel(score)
    return _png(figure)


def curves(panels: Mapping[str, tuple[str, Curves]]) -> bytes:
    """Validation scores over steps, one line per routing function.

    Args:
        panels: title -> (name of the score, curves).
    """
    figure, axes = _axes(len(panels), height=3.3)
    for axis, (title, (score, lines)) in zip(axes, panels.items(), strict=True):
        for routing, points in lines.items():
            steps, scores = zip(*points, strict=True)
            colour = ROUTING_COLOURS[routing]
            axis.plot(steps, scores, marker="o", markersize=3, label=routing, color=colour)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel(f"validation {score}")
        axis.legend(fontsize=8, frameon=False)
    return _png(figure)


def _axes(count: int, height: float) -> tuple[Figure, list]:
    # The object interface: pyplot would look for a screen and keep every figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 3.4 * count), height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, list(axes)


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
