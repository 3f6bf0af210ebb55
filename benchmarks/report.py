"""Draw tables and plots from measured rows; nothing is measured here.

python -m benchmarks.report benchmarks/results/cpu_layers.jsonl
python -m benchmarks.report results.jsonl --plots plots/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

COLUMNS = (
    *("case", "routing", "dtype", "reference ms", "ours ms", "fwd", "bwd", "fwd+bwd", "overhead", "saved MiB"),
    *("peak MiB", "% of limit"),
)
MODEL_COLUMNS = (
    *("case", "routing", "provider", "dtype", "published ms", "ours ms", "fwd", "bwd", "whole", "published a second"),
    *("ours a second", "saved MiB", "peak MiB"),
)
NOTE = """\
reference: the published chain of operations; ours: the eager backend unless a provider is named. Times are medians of
forward + backward; fwd, bwd and fwd+bwd are reference / ours, above 1 when ours is faster; overhead is that ratio for
the time above the frozen projection alone, - where ours takes no longer than that. Saved is what autograd keeps beside
the inputs, peak the most that a pass takes (GPU only), reference and ours. % of limit is the time that the formula's
operations or bytes would take at the device's measured rates, of the time measured, reference and ours; above 100 the
formula is not computed as written, or not by the library of those rates."""
MODEL_NOTE = """\
Whole models: published is the same model with the published layers, at level train the published recipe's step in
float32. Times are medians of forward + backward (level step), a training step (train), a beam search (generate), and
"whole" is their ratio, above 1 when ours is faster. A second: examples, of generation captions. Saved is what autograd
keeps beside weights and inputs, peak the most that it takes, published and ours."""

MODES = {"fwd": "fwd", "bwd": "bwd", "fwdbwd": "fwd+bwd", "step": "whole step", "generate": "beam search"}
WHOLE = ("fwdbwd", "step", "generate")  # of the modes of a case, the one that it is about


class Key(NamedTuple):
    """What is measured; ``graphs``: replayed from a CUDA graph."""

    case: str
    routing: str
    dtype: str
    dropout: float
    clock: str
    graphs: bool = False

    def notes(self) -> list[str]:
        """What distinguishes this from the usual measurement, in words."""
        notes = [f"dropout {self.dropout:g}"] if self.dropout else []
        notes += [f"{self.clock} time"] if self.clock != "cpu" else []
        return notes + (["CUDA graph"] if self.graphs else [])


@dataclass
class Results:
    """Rows sorted by what they measure; of several of the same thing the last one counts.

    Attributes:
        measured: by case, routing, dtype, dropout and clock, then by provider and mode.
        failed: by the same and the provider, what missed the gate.
        skipped: by provider and reason, how many measurements were left out.
        machines: what was measured on, in words, in order.
    """

    measured: dict[Key, dict[tuple[str, str], Mapping]] = field(default_factory=dict)
    failed: dict[tuple[Key, str], str] = field(default_factory=dict)
    skipped: dict[tuple[str, str], int] = field(default_factory=dict)
    machines: dict[str, None] = field(default_factory=dict)

    def whole(self, key: Key, provider: str) -> Mapping | None:
        """A provider's row of the mode that a case is about; None where it was not measured."""
        found = (self.measured[key].get((provider, mode)) for mode in WHOLE)
        return next((row for row in found if row is not None), None)

    def ratio(self, key: Key, provider: str, mode: str | None = None) -> float | None:
        """Time of the reference over the provider's in a mode, by default the one that the case is about; None where
        one of them was not measured.
        """
        rows = self.measured[key]
        if mode is None:
            row = self.whole(key, provider)
            if row is None:
                return None
            mode = row["mode"]
        if ("reference", mode) not in rows or (provider, mode) not in rows:
            return None
        return rows["reference", mode]["ms_p50"] / rows[provider, mode]["ms_p50"]

    def compared(self) -> list[tuple[Key, str]]:
        """Every measurement and provider that has a reference beside it."""
        return [
            (key, provider)
            for key, rows in self.measured.items()
            for provider in dict.fromkeys(name for name, _ in rows if name not in ("reference", "base"))
            if self.ratio(key, provider) is not None
        ]


def collect(rows: Iterable[Mapping]) -> Results:
    """Sort rows by what they measure."""
    found = Results()
    for row in rows:
        clock = row.get("clock", "cpu")
        key = Key(row["case"], row["routing"], row["dtype"], row.get("dropout", 0.0), clock, row.get("graphs", False))
        provider = row.get("provider", "reference")
        machine = f"{row['device']}, {row['threads']} thread(s), {clock} time, torch {row['torch']}"
        machine += f", commit {row['commit']}" + (" (changed since)" if row["dirty"] else "")
        found.machines[machine] = None
        if row["gate"] == "skipped":
            why = (provider, row["skipped"])
            found.skipped[why] = found.skipped.get(why, 0) + 1
        elif row["gate"] == "failed":
            kept = found.measured.pop(key, {})
            if provider != "reference":  # without it there is nothing to compare with
                found.measured[key] = {place: one for place, one in kept.items() if place[0] != provider}
            found.failed[key, provider] = "; ".join(row["gate_missed"])
        else:
            found.failed.pop((key, provider), None)
            found.measured.setdefault(key, {})[provider, row["mode"]] = row
    return found


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
    pairs = [_pair(found, key, ours, *field) for field in (("saved_mib", 2), ("peak_mib", 1), ("limit_percent", 0))]
    milliseconds = [f"{value:.2f}" for value in times]
    return _cells(key.case, _label(key, ours), key.dtype, *milliseconds, *_ratios(found, key, ours), overhead, *pairs)


def _model_line(found: Results, key: Key, ours: str) -> str:
    """The line of a whole model."""
    both = [found.whole(key, provider) for provider in ("reference", ours)]
    milliseconds = [f"{row['ms_p50']:.1f}" for row in both]
    rates = [f"{row['captions_s' if row['level'] == 'generate' else 'examples_s']:.2f}" for row in both]
    pairs = [_pair(found, key, ours, name, 1) for name in ("saved_mib", "peak_mib")]
    provider = ", ".join([ours, *key.notes()])
    ratios = _ratios(found, key, ours)
    return _cells(key.case, key.routing, provider, key.dtype, *milliseconds, *ratios, *rates, *pairs)


def _slower(found: Results) -> list[str]:
    """A line a provider of ours that took longer than the published chain, the worst first."""
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


def read_rows(files: Iterable[Path]) -> list[dict]:
    """Rows of result files, in order.

    Raises:
        ValueError: a line is not JSON, or not a row of this benchmark; it names the file and the line.
    """
    rows = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error.msg}); give files of --output") from None
            if row is not None and not (isinstance(row, dict) and {"case", "routing", "gate"} <= row.keys()):
                raise ValueError(f"{file}, line {number}: not a row of this benchmark; give files of --output")
            rows += [row] if row is not None else []
    return rows


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
        from .plots import draw

        for file in draw(collect(rows), args.plots):
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
