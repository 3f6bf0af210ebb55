"""PNG plots of measured rows: speed-up, also by size, overhead over the frozen projection, memory, limits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from routingvl.kernels import ROUTINGS

from .results import Key, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# How lines are told apart: the routing function by colour, who computes it by strokes, the layer by marks.
_PALETTE = ("gray", "blue", "red", "green", "purple", "orange", "brown", "pink", "olive", "cyan")
COLOURS = {name: f"tab:{colour}" for name, colour in zip(ROUTINGS, itertools.cycle(_PALETTE), strict=False)}
STROKES = {"eager": "-", "triton": "-.", "compile": "--", "peft": ":", "closed": (0, (5, 1))}
STROKES |= {"closed_overhead": (0, (3, 1, 1, 1)), "addmm": (0, (1, 1)), "split": (0, (3, 1, 1, 1, 1, 1))}
MARKS = {"lora": "o", "merged_lora": "s", "adapter": "^"}

# What a speed-up is drawn against: the sizes of a row that are not it, how to read it off the row, its name.
AXES: dict[str, tuple[str, Callable[[Mapping], int], str]] = {
    "by_tokens": ("KNRL", lambda row: row["B"] * row["T"], "text tokens in the batch, M"),
    "by_rank": ("BTKNL", lambda row: row["R"], "rank of the bottleneck, R"),
    "by_visual_tokens": ("BTKNR", lambda row: row["L"], "visual tokens of an image, L"),
}


def _label(key: Key) -> str:
    return " ".join([*key[:3], *key.notes()])


def _speed_ups(found: Results, axes: Axes) -> int:
    """One bar per comparison, red where it is slower than the published chain."""
    bars = [(f"{_label(key)}: {who}", found.ratio(key, who)) for key, who in found.compared()]
    names, ratios = [name for name, _ in bars], [ratio for _, ratio in bars]
    axes.barh(names, ratios, color=["tab:red" if ratio < 1 else "tab:blue" for ratio in ratios])
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("speed-up over the published chain (red: slower)")
    return len(bars)


def _by_size(name: str) -> Callable[[Results, Axes], int]:
    """Speed-up of layers by one of AXES; a line joins the same layer at several sizes, of which it takes two."""
    others, size, label = AXES[name]

    def draw_lines(found: Results, axes: Axes) -> int:
        lines: dict[str, list[tuple[int, float]]] = {}
        styles: dict[str, dict] = {}
        for key, who in found.compared():
            row = found.whole(key, who)
            if "op" not in row:
                continue  # a whole model
            sizes = " ".join(f"{letter}{row[letter]}" for letter in others)
            line = " ".join([row.get("level", "layer"), row["op"], sizes, *_label(key).split()[1:], who])
            lines.setdefault(line, []).append((size(row), found.ratio(key, who)))
            styles[line] = {
                "color": COLOURS[key.routing],
                "linestyle": STROKES[who],
                "marker": MARKS[row["op"]],
                "alpha": 0.4 if key.dropout else 1.0,
            }
        lines = {line: points for line, points in lines.items() if len({at for at, _ in points}) > 1}
        for line, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), label=line, markersize=4, **styles[line])
        if not lines:
            return 0
        axes.axhline(1.0, color="black", linewidth=0.8)
        sizes = sorted({at for points in lines.values() for at, _ in points})
        axes.set(xscale="log", xlabel=label, ylabel="speed-up over the published chain")
        axes.set_xticks(sizes, labels=map(str, sizes))
        axes.set_xticks([], minor=True)
        axes.legend(fontsize=5, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        return len(lines) // 4

    return draw_lines


def _overhead(found: Results, axes: Axes) -> int:
    """Time above the frozen projection alone, in percent of it."""
    bars = []
    for key, rows in found.measured.items():
        if ("base", "fwdbwd") in rows:
            base = rows["base", "fwdbwd"]["ms_p50"]
            for who, mode in rows:
                if mode == "fwdbwd" and who != "base":
                    bars.append((f"{_label(key)}: {who}", 100 * (rows[who, mode]["ms_p50"] / base - 1)))
    axes.barh([name for name, _ in bars], [value for _, value in bars], color="tab:orange")
    axes.set_xlabel("time above the frozen projection, % of it, forward + backward")
    return len(bars)


def _bars_of(field: str, label: str) -> Callable[[Results, Axes], int]:
    def draw_bars(found: Results, axes: Axes) -> int:
        bars = []
        for key, rows in found.measured.items():
            for who in dict.fromkeys(who for who, _ in rows if who != "base"):
                row = found.whole(key, who)
                if row is not None and row.get(field) is not None:
                    bars.append((f"{_label(key)}: {who}", row[field]))
        axes.barh([name for name, _ in bars], [value for _, value in bars], color="tab:green")
        axes.set_xlabel(label)
        return len(bars)

    return draw_bars


PLOTS: dict[str, Callable[[Results, Axes], int]] = {
    "speed_up": _speed_ups,
    **{name: _by_size(name) for name in AXES},
    "overhead": _overhead,
    "saved": _bars_of("saved_mib", "MiB kept for the backward pass beside the inputs"),
    "peak": _bars_of("peak_mib", "peak MiB of a pass"),
    "limit": _bars_of("limit_percent", "% of the limit of the formula's operations or bytes"),
    "examples": _bars_of("examples_s", "examples per second"),
    "captions": _bars_of("captions_s", "captions per second"),
}


def draw(found: Results, folder: Path) -> list[Path]:
    """Write a PNG file for every plot that has something to show; their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    machines = "; ".join(found.machines)
    for name, plot in PLOTS.items():
        figure = Figure(figsize=(9, 5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        bars = plot(found, axes)
        if not axes.has_data():
            continue
        axes.tick_params(axis="y", labelsize=7)
        axes.set_title(machines, fontsize=6)
        figure.set_figheight(max(4.0, 0.16 * bars + 1.5))
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written
