"""Draw tables and plots from measured rows; nothing is measured here.

python -m benchmarks.report benchmarks/results/cpu_layers.jsonl
python -m benchmarks.report results.jsonl --plots plots/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = (
    *("case", "routing", "dtype", "reference ms", "ours ms", "fwd", "bwd", "fwd+bwd", "overhead", "saved MiB"),
    *("peak MiB", "% of limit"),
)
NOTE = """\
reference: the published chain of operations; ours: the eager backend unless a provider is named. Times are medians of
forward + backward; fwd, bwd and fwd+bwd are reference / ours, above 1 when ours is faster; overhead is that ratio for
the time above the frozen projection alone. Saved is what autograd keeps beside the inputs, peak the most that a pass
takes (GPU only), reference and ours. % of limit is the time that the formula's operations or bytes would take at the
device's measured rates, of the time measured, reference and ours; above 100 the formula is not computed as written."""

MODES = {"fwd": "fwd", "bwd": "bwd", "fwdbwd": "fwd+bwd"}
Key = tuple[str, str, str, float, str]  # case, routing, dtype, dropout, clock


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

    def ratio(self, key: Key, provider: str, mode: str = "fwdbwd") -> float | None:
        """Time of the reference over the provider's; None where one of them was not measured."""
        rows = self.measured[key]
        if ("reference", mode) not in rows or (provider, mode) not in rows:
            return None
        return rows["reference", mode]["ms_p50"] / rows[provider, mode]["ms_p50"]

    def compared(self) -> list[tuple[Key, str]]:
        """Every measurement and provider that has a reference beside it."""
        return [
            (key, provider)
            for key, rows in self.measured.items()
            for provider in dict.fromkeys(name for name, _ in rows if name not in ("reference", "base"))
            if ("reference", "fwdbwd") in rows
        ]


def collect(rows: Iterable[Mapping]) -> Results:
    """Sort rows by what they measure."""
    found = Results()
    for row in rows:
        clock = row.get("clock", "cpu")
        key = (row["case"], row["routing"], row["dtype"], row.get("dropout", 0.0), clock)
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


def _pair(rows: Mapping[tuple[str, str], Mapping], ours: str, name: str, digits: int) -> str:
    values = [rows[provider, "fwdbwd"].get(name) for provider in ("reference", ours)]
    return "-" if None in values else ", ".join(f"{value:.{digits}f}" for value in values)


def _label(key: Key, provider: str) -> str:
    _, routing, _, dropout, clock = key
    notes = ([] if provider == "eager" else [provider]) + ([f"dropout {dropout:g}"] if dropout else [])
    notes += [f"{clock} time"] if clock == "gpu" else []
    return f"{routing} ({', '.join(notes)})" if notes else routing


def _line(rows: Mapping[tuple[str, str], Mapping], key: Key, ours: str) -> str:
    def ms(provider: str, mode: str) -> float:
        return rows[provider, mode]["ms_p50"]

    ratios = [_ratio(ms("reference", mode), ms(ours, mode)) for mode in ("fwd", "bwd", "fwdbwd")]
    overhead = "-"
    if ("base", "fwdbwd") in rows:
        base = ms("base", "fwdbwd")
        overhead = _ratio(ms("reference", "fwdbwd") - base, ms(ours, "fwdbwd") - base)
    pairs = [_pair(rows, ours, name, digits) for name, digits in (("saved_mib", 2), ("peak_mib", 1))]
    limit = _pair(rows, ours, "limit_percent", 0)
    times = [f"{ms(name, 'fwdbwd'):.2f}" for name in ("reference", ours)]
    return "| " + " | ".join([key[0], _label(key, ours), key[2], *times, *ratios, overhead, *pairs, limit]) + " |"


def _slower(found: Results) -> list[str]:
    """A line a provider of ours that took longer than the published chain, the worst first."""
    slower = []
    for key, provider in found.compared():
        for mode in MODES:
            ratio = found.ratio(key, provider, mode)
            if ratio is not None and ratio < 1:
                slower.append((ratio, f"{key[0]} {_label(key, provider)} {key[2]}, {MODES[mode]}: {ratio:.2f}x"))
    return [line for _, line in sorted(slower)]


def summarise(rows: Iterable[Mapping]) -> str:
    """A Markdown table of speed-ups over the published chain, then what was slower than it, and a line for every
    provider that missed the gate or was left out.
    """
    found = collect(rows)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += [_line(found.measured[key], key, provider) for key, provider in found.compared()]
    if slower := _slower(found):
        lines += ["", "Slower than the published chain:", *(f"- {line}" for line in slower)]
    for (key, provider), what in found.failed.items():
        lines.append(f"\nGATE FAILED, not timed: {' '.join(key[:3])}: {provider}: {what}")
    for (provider, why), count in found.skipped.items():
        lines.append(f"\nNot measured, {count} time(s): {provider}: {why}")
    return "\n".join([*lines, "", NOTE, *(f"Measured on {machine}." for machine in found.machines)])


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
