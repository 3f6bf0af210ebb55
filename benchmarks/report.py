"""Draw a table from measured rows; nothing is measured here.

python -m benchmarks.report benchmarks/results/cpu_layers.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

COLUMNS = ("case", "routing", "dtype", "reference ms", "ours ms", "fwd", "bwd", "fwd+bwd", "overhead", "saved MiB")
NOTE = """\
reference: the published chain of operations. Times are medians of forward + backward; fwd, bwd and fwd+bwd are
reference / ours, above 1 when ours is faster; overhead is that ratio for the time above the frozen projection alone.
Saved is what autograd keeps beside the inputs, reference and ours."""


def _ratio(top: float, bottom: float) -> str:
    return f"{top / bottom:.2f}x" if bottom > 0 else "-"


def _line(rows: Mapping[tuple[str, str], Mapping], case: str, routing: str, dtype: str, ours: str) -> str:
    def ms(provider: str, mode: str) -> float:
        return rows[provider, mode]["ms_p50"]

    ratios = [_ratio(ms("reference", mode), ms(ours, mode)) for mode in ("fwd", "bwd", "fwdbwd")]
    overhead = "-"
    if ("base", "fwdbwd") in rows:
        base = ms("base", "fwdbwd")
        overhead = _ratio(ms("reference", "fwdbwd") - base, ms(ours, "fwdbwd") - base)
    saved = ", ".join(f"{rows[name, 'fwdbwd']['saved_mib']:.2f}" for name in ("reference", ours))
    times = [f"{ms(name, 'fwdbwd'):.2f}" for name in ("reference", ours)]
    label = routing if ours == "eager" else f"{routing} ({ours})"
    return "| " + " | ".join([case, label, dtype, *times, *ratios, overhead, saved]) + " |"


def summarise(rows: Iterable[Mapping]) -> str:
    """A Markdown table of speed-ups over the published chain, and a line for every case whose gate was not passed.

    Of several measurements of the same thing the last one counts.
    """
    groups: dict[tuple[str, str, str], dict[tuple[str, str], Mapping]] = {}
    failed: dict[tuple[str, str, str], str] = {}
    machines: dict[str, None] = {}
    for row in rows:
        key = (row["case"], row["routing"], row["dtype"])
        machine = f"{row['device']}, {row['threads']} thread(s), torch {row['torch']}, commit {row['commit']}"
        machines[machine + (" (changed since)" if row["dirty"] else "")] = None
        if row["gate"] == "failed":
            groups.pop(key, None)
            failed[key] = "; ".join(row["gate_missed"])
        else:
            failed.pop(key, None)
            groups.setdefault(key, {})[row["provider"], row["mode"]] = row
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for key, measured in groups.items():
        others = dict.fromkeys(provider for provider, _ in measured if provider not in ("reference", "base"))
        lines += [_line(measured, *key, ours) for ours in others]
    lines += [f"\nGATE FAILED, not timed: {' '.join(key)}: {what}" for key, what in failed.items()]
    return "\n".join([*lines, "", NOTE, *(f"Measured on {machine}." for machine in machines)])


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of one or more result files."""
    parser = argparse.ArgumentParser(description="Draw a table from benchmark results (JSON lines).")
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args(argv)
    rows = [json.loads(line) for file in args.files for line in file.read_text(encoding="utf-8").splitlines() if line]
    print(summarise(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
