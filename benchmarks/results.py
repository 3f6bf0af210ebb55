"""Rows of result files, read and sorted by what they measure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MODES = {"fwd": "fwd", "bwd": "bwd", "fwdbwd": "fwd+bwd", "step": "whole step", "generate": "beam search"}
WHOLE = ("fwdbwd", "step", "generate")  # of the modes of a case, the one that it is about


class Key(NamedTuple):
    """What is measured; ``graphs``: replayed from a CUDA graph; ``pure``: without autocast."""

    case: str
    routing: str
    dtype: str
    dropout: float
    clock: str
    graphs: bool = False
    pure: bool = False

    def notes(self) -> list[str]:
        """What distinguishes this from the usual measurement, in words."""
        notes = [f"dropout {self.dropout:g}"] if self.dropout else []
        notes += [f"{self.clock} time"] if self.clock != "cpu" else []
        notes += ["without autocast"] if self.pure else []
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
        key = Key(
            row["case"],
            row["routing"],
            row["dtype"],
            row.get("dropout", 0.0),
            clock,
            row.get("graphs", False),
            row.get("pure", False),
        )
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


def read_rows(files: Iterable[Path], fields: Iterable[str] = ("case", "routing", "gate")) -> list[dict]:
    """Rows of result files, in order; every one has these ``fields``.

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
            if row is not None and not (isinstance(row, dict) and set(fields) <= row.keys()):
                raise ValueError(f"{file}, line {number}: not a row of this benchmark; give files of --output")
            rows += [row] if row is not None else []
    return rows
