"""Draw tables and plots from measured rows; nothing is measured here.

python -m benchmarks.report benchmarks/results/cpu_layers.jsonl
python -m benchmarks.report results.jsonl --plots plots/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from .plots import draw
from .results import MODES, Key, Results, collect, read_rows

COLUMNS = (
    *("case", "routing", "dtype", "reference ms", "ours ms", "fwd", "bwd", "fwd+bwd", "overhead", "saved MiB"),
    *("peak MiB", "% of limit", "host ms"),
)
MODEL_COLUMNS = (
    *("case", "routing", "provider", "dtype", "published ms", "ours ms", "fwd", "bwd", "whole", "published per second"),
    *("ours per second", "saved MiB", "peak MiB", "host ms"),
)
NOTE = """\
reference: the published chain of operations; ours: the eager backend unless a provider is named. Times are medians of
forward + backward; fwd, bwd and fwd+bwd are reference / ours, above 1 when ours is faster; overhead is that ratio for
the time above the frozen projection alone, - where ours takes no longer than that. Saved is what autograd keeps beside
the inputs, peak the most that a pass takes (GPU only), reference and ours. % of limit is the time that the formula's
operations or bytes would take at the device's measured rates, of the time measured, reference and ours; above 100 the
formula is not computed as written, or not by the library of those rates. Host ms is what the CPU takes to launch it
(GPU only), reference and ours."""
MODEL_NOTE = """\
Whole models: published is the same model with the published layers, at level train the published recipe's step in
float32. Times are medians of forward + backward (level step), a training step (train), a beam search (generate), and
"whole" is their ratio, above 1 when ours is faster. Per second: examples, of generation captions. Saved is what
autograd keeps beside weights and inputs, peak the most that it takes, host ms what the CPU takes to launch it (GPU
only), published and ours."""


def _ratio(top: float, bottom: float) -> str:
    return f"{top / bottom:.2f}x" if bottom > 0 else "-"


def _pair(found: Results, key: Key, ours: str, name: str, digits: int) -> str:
    values = [found.whole(key, provider).get(name) for provider in ("reference", ours)]
    return "-" if None in values else ", ".join(f"{value:.{digits}f}" for value in values)


def _label(key: Key, provider: str) -> str:
    notes = ([] if provider == "eager" else [provider]) + key.notes()
    return f"{key.routing} ({', '.join(notes)})" if notes else key.routing


def _ratios(found: Results, key: Key, ours: str) -> list[str]:
    ratios = [found.ratio(key, ours, mode) for mode in ("fwd", "bwd", None)]
    return ["-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _line(found: Results, key: Key, ours: str) -> str:
    """The line of a layer."""
    rows, times = found.measured[key], [found.whole(key, provider)["ms_p50"] for provider in ("reference", ours)]
    overhead = "-"
    if ("base", "fwdbwd") in rows:
        base = rows["base", "fwdbwd"]["ms_p50"]
        overhead = _ratio(times[0] - base, times[1] - base)
    fields = (("saved_mib", 2), ("peak_mib", 1), ("limit_percent", 0), ("host_ms_p50", 2))
    pairs = [_pair(found, key, ours, *field) for field in fields]
    milliseconds = [f"{value:.2f}" for value in times]
    return _cells(key.case, _label(key, ours), key.dtype, *milliseconds, *_ratios(found, key, ours), overhead, *pairs)


def _model_line(found: Results, key: Key, ours: str) -> str:
    """The line of a whole model."""
    both = [found.whole(key, provider) for provider in ("reference", ours)]
    milliseconds = [f"{row['ms_p50']:.1f}" for row in both]
    rates = [f"{row['captions_s' if row['level'] == 'generate' else 'examples_s']:.2f}" for row in both]
    pairs = [_pair(found, key, ours, *field) for field in (("saved_mib", 1), ("peak_mib", 1), ("host_ms_p50", 1))]
    provider = ", ".join([ours, *key.notes()])
    ratios = _ratios(found, key, ours)
    return _cells(key.case, key.routing, provider, key.dtype, *milliseconds, *ratios, *rates, *pairs)


def _slower(found: Results) -> list[str]:
    """One line per provider of ours that took longer than the published chain, the worst first."""
    slower = []
    for key, provider in found.compared():
        for mode in MODES:
            ratio = found.ratio(key, provider, mode)
            if ratio is not None and ratio < 1:
                slower.append((ratio, f"{key.case} {_label(key, provider)} {key.dtype}, {MODES[mode]}: {ratio:.2f}x"))
    return [line for _, line in sorted(slower)]


def _tables(found: Results) -> Iterator[str]:
    """The lines of the table of layers and of that of whole models, each where it has something to show."""
    layers, models = [], []
    for key, provider in found.compared():
        whole = "task" in found.whole(key, provider)
        (models if whole else layers).append((_model_line if whole else _line)(found, key, provider))
    for columns, lines, note in ((COLUMNS, layers, NOTE), (MODEL_COLUMNS, models, MODEL_NOTE)):
        if lines:
            yield from (_cells(*columns), "|---" * len(columns) + "|", *lines, "", note, "")


def summarise(rows: Iterable[Mapping]) -> str:
    """Markdown tables of speed-ups over the published chain, of layers and of whole models, then what was slower than
    it, a line for every provider that missed the gate or was left out, and the machines.
    """
    found = collect(rows)
    lines = list(_tables(found))
    if slower := _slower(found):
        lines += ["Slower than the published chain:", *(f"- {line}" for line in slower), ""]
    for (key, provider), what in found.failed.items():
        lines += [f"GATE FAILED, not timed: {' '.join(key[:3])}: {provider}: {what}", ""]
    for (provider, why), count in found.skipped.items():
        lines += [f"Not measured, {count} time(s): {provider}: {why}", ""]
    return "\n".join([*lines, *(f"Measured on {machine}." for machine in found.machines)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of one or more result files, and draw their plots where asked to."""
    parser = argparse.ArgumentParser(description="Draw tables and plots from benchmark results (JSON lines).")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write PNG files into this folder")
    args = parser.parse_args(argv)
    try:
        rows = read_rows(args.files)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(summarise(rows))
    if args.plots:
        for file in draw(collect(rows), args.plots):
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
