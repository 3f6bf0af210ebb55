"""The regression gate: what a later run of the benchmark does worse than an earlier one, beyond the noise of both.

    python -m benchmarks.compare base.jsonl head.jsonl
    python -m benchmarks.compare base.jsonl head.jsonl --all --allow 0.1

Both files come from the same device: of ``routingvl benchmark`` or of ``benchmarks.targets``. A time of ours is taken
as a multiple of the published chain's in the same mode, where both runs have it, because the two took turns and a
machine that has become slower does not change it. It is worse when it has grown by more than ``--allow`` and the noise:
half of what lies between the 20th and the 80th percentile, relative to the median, added up over all times involved.
What autograd keeps for the backward pass does not vary, so any growth past ``--allow`` counts. So does a provider that
no longer passes its gate or no longer runs.

Exit status: 0 nothing is worse, 1 something is, 2 the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .layer_providers import COMPETITORS
from .results import Key, Results, collect, read_rows

ALLOWED = 0.05
NOT_OURS = ("reference", "base", *COMPETITORS)
MACHINE = ("device", "threads")
VERSIONS = ("torch", "triton", "transformers")


class NotComparableError(ValueError):
    """The files measure other things, or on other machines; the message says which and what to do."""


class Place(NamedTuple):
    """One number of a run; ``mode`` "saved" is the memory, "" the gate."""

    key: Key
    provider: str
    mode: str

    def __str__(self) -> str:
        notes = f" ({', '.join(self.key.notes())})" if self.key.notes() else ""
        return f"{self.key.case} {self.key.routing} {self.key.dtype}{notes} | {self.provider} | {self.mode}"


@dataclass(frozen=True)
class Change:
    """How a number has changed.

    Attributes:
        base, head: of the earlier and of the later run, in ms or MiB.
        ratio: how much it has grown, beside the published chain where that was measured.
        allowed: the most that the ratio may be.
    """

    place: Place
    base: float
    head: float
    ratio: float
    allowed: float

    @property
    def is_worse(self) -> bool:
        return self.ratio > self.allowed

    def cells(self) -> str:
        """A line of the table."""
        verdict = "WORSE" if self.is_worse else "ok"
        return (
            f"| {self.place} | {self.base:.4g} | {self.head:.4g} | {self.ratio:.3f} | {self.allowed:.3f} | {verdict} |"
        )


def spread(row: Mapping) -> float:
    """Half of what lies between the 20th and the 80th percentile, relative to the median."""
    return (row["ms_p80"] - row["ms_p20"]) / (2 * row["ms_p50"]) if row["ms_p50"] > 0 else 0.0


def flattened(rows: Iterable[Mapping]) -> Iterator[Mapping]:
    """Rows of the benchmark as they are; one of benchmarks.targets becomes a row for each clock and mode.

    Raises:
        NotComparableError: a row is of neither.
    """
    for row in rows:
        if "side" not in row:
            if row.get("gate", "passed") == "passed" and not {"mode", "ms_p20", "ms_p50", "ms_p80"} <= row.keys():
                raise NotComparableError(
                    f"the row of {row['case']} has no mode or no quantiles: give files of routingvl benchmark or of "
                    "benchmarks.targets"
                )
            yield row
            continue
        shared = {**row, "provider": row["side"]}
        if row.get("gate", "passed") != "passed":
            yield shared
            continue
        for name, (low, middle, high) in row.get("us", {}).items():
            clock, _, mode = name.partition("_")
            times = {"ms_p20": low / 1e3, "ms_p50": middle / 1e3, "ms_p80": high / 1e3}
            yield {**shared, "gate": "passed", "clock": clock, "mode": mode, **times}


def read(path: Path) -> tuple[Results, dict[str, set]]:
    """The results of a file, and the machines and versions that its rows name."""
    rows = list(flattened(read_rows([path], ("case", "routing"))))
    named = {name: {row.get(name) for row in rows} for name in (*MACHINE, *VERSIONS)}
    return collect(rows), named


def refuse_other_machines(base: Mapping[str, set], head: Mapping[str, set]) -> list[str]:
    """What differs and is only worth a note: versions.

    Raises:
        NotComparableError: device or threads differ, or a file has several.
    """
    for name in MACHINE:
        if len(base[name] | head[name]) != 1:
            sides = " and ".join(", ".join(map(str, sorted(map(str, side[name])))) for side in (base, head))
            raise NotComparableError(
                f"the runs have {name} {sides}: times of one machine say nothing of another; measure both on the same"
            )
    return [
        f"note: {name} {', '.join(map(str, base[name]))} against {', '.join(map(str, head[name]))}"
        for name in VERSIONS
        if base[name] != head[name]
    ]


def times(base: Results, head: Results, allow: float) -> Iterator[Change]:
    """Every time and memory of ours that both runs have."""
    for key, rows in base.measured.items():
        later = head.measured.get(key, {})
        for (provider, mode), row in rows.items():
            new = later.get((provider, mode))
            if provider in NOT_OURS or new is None:
                continue
            involved, ratio = [row, new], new["ms_p50"] / row["ms_p50"]
            published = rows.get(("reference", mode)), later.get(("reference", mode))
            if None not in published:
                involved += published
                ratio *= published[0]["ms_p50"] / published[1]["ms_p50"]
            allowed = 1 + allow + sum(map(spread, involved))
            yield Change(Place(key, provider, mode), row["ms_p50"], new["ms_p50"], ratio, allowed)
        for provider in dict.fromkeys(name for name, _ in rows if name not in NOT_OURS):
            kept = [next((r.get("saved_mib") for (name, _), r in rows.items() if name == provider), None)
                    for rows in (rows, later)]  # fmt: skip
            if None not in kept and kept[0] > 0:
                yield Change(Place(key, provider, "saved"), *kept, kept[1] / kept[0], 1 + allow)


def lost(base: Results, head: Results) -> Iterator[str]:
    """Providers of ours that were measured before and, in a case that was measured again, are not now."""
    again = {*head.measured, *(key for key, _ in head.failed)}
    for key, rows in base.measured.items():
        if key not in again:
            continue
        now = {name for name, _ in head.measured.get(key, {})}
        for provider in dict.fromkeys(name for name, _ in rows if name not in NOT_OURS):
            if provider not in now:
                yield f"{Place(key, provider, '')} {head.failed.get((key, provider), 'no longer measured')}"


def compare(base_file: Path, head_file: Path, allow: float = ALLOWED) -> tuple[list[Change], list[str], list[str]]:
    """Every change, what was lost, and notes.

    Raises:
        NotComparableError: other machines, or nothing in common.
        ValueError, OSError: a file cannot be read, or is none of results.
    """
    (base, of_base), (head, of_head) = read(base_file), read(head_file)
    notes = refuse_other_machines(of_base, of_head)
    changes, gone = list(times(base, head, allow)), list(lost(base, head))
    if not changes and not gone:
        raise NotComparableError(f"{base_file} and {head_file} have no measurement of ours in common")
    return changes, gone, notes


def table(changes: Sequence[Change]) -> str:
    """Markdown, the worst first."""
    head = "| case | provider | mode | base ms | head ms | ratio | allowed | |\n|---|---|---|---:|---:|---:|---:|---|"
    worst_first = sorted(changes, key=lambda change: change.allowed - change.ratio)
    return "\n".join([head, *(change.cells() for change in worst_first)])


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; the exit status is in the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("base", type=Path, help="rows of the earlier run (JSON lines)")
    parser.add_argument("head", type=Path, help="rows of the later run")
    parser.add_argument("--allow", type=float, default=ALLOWED, help="growth beyond the noise (default 0.05)")
    parser.add_argument("--all", action="store_true", help="list what is no worse, too")
    args = parser.parse_args(argv)
    try:
        changes, gone, notes = compare(args.base, args.head, args.allow)
    except (OSError, ValueError) as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    worse = [change for change in changes if change.is_worse]
    if args.all or worse:
        print(table(changes if args.all else worse))
    print(*notes, *(f"LOST: {what}" for what in gone), sep="\n", end="\n" if notes or gone else "")
    print(f"{len(changes)} numbers compared, {len(worse)} worse, {len(gone)} lost")
    return 1 if worse or gone else 0


if __name__ == "__main__":
    sys.exit(main())
