"""The study's rows: kept as they are made, chosen from by validation, and made into tables.

A line of results.jsonl is one trained run with its validation score ("kind" is "run"), or the test of a run that was
chosen by it ("test"): the score with each example's own picture, and with another example's.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.study.arms import ARMS, STUDIES, Arm, Job, Study, find_arm
from routingvl.atomic_files import append_text

Row = dict[str, Any]
COMMITTED = Path(__file__).with_name("results.jsonl")


class Rows:
    """The rows of one file, each found again by its kind and key.

    A line that a crash has cut off is left out, and its run is made again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = {(row["kind"], row["key"]): row for row in read_rows(path)}

    def get_or_make(self, kind: str, key: str, make: Callable[[], Row]) -> Row:
        """The row, made and written unless it is there."""
        if (kind, key) not in self.known:
            row = {"kind": kind, "key": key, **make()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_text(self.path, f"{'' if self._ends_a_line() else chr(10)}{json.dumps(row)}\n")
            self.known[kind, key] = row
        return self.known[kind, key]

    def _ends_a_line(self) -> bool:
        """False where a crash cut the last line off."""
        return not self.path.is_file() or self.path.read_bytes()[-1:] in (b"", b"\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, none where there is no file, without a line that was cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def best_rate(rows: Iterable[Row]) -> float:
    """The learning rate of the run with the highest validation score; of equal ones the lower."""
    return max(rows, key=lambda row: (row["validation"], -row["lr"]))["lr"]


@dataclass(frozen=True)
class Result:
    """What a study found of one arm, at the learning rate that validation chose.

    Attributes:
        tests: the rows of kind "test", by seed.
        lr: the learning rate.
        at_the_edge: whether it is the lowest or highest that was tried.
        parameters: how many train.
        minutes: of processor time that training took, the median of its runs.
    """

    arm: Arm
    tests: list[Row]
    lr: float
    at_the_edge: bool
    parameters: int
    minutes: float

    def values(self, name: str) -> list[float]:
        """ "test" or "shuffled", one for each seed."""
        return [row[name] for row in self.tests]


def results(rows: Iterable[Row], study: Study) -> list[Result]:
    """Of every arm that was tested, in the order of ``ARMS``; rows of other settings than today's do not count."""
    by_arm = {arm.name: [] for arm in ARMS}
    for row in rows:
        if row["study"] == study.name and row["arm"] in by_arm:
            job = Job(find_arm(row["arm"]), row["lr"], row["seed"])
            if study.key(job, row["data"]) == row["key"]:
                by_arm[row["arm"]].append(row)
    found = []
    for name, own in by_arm.items():
        runs = [row for row in own if row["kind"] == "run" and row["seed"] == study.seeds[0]]
        lr, tried = best_rate(runs) if runs else None, {row["lr"] for row in runs}
        tests = [row for row in own if row["kind"] == "test" and row["lr"] == lr]  # others were best in a smaller grid
        tests.sort(key=lambda row: row["seed"])
        if tests:
            edge = len(tried) > 1 and lr in (min(tried), max(tried))
            minutes = statistics.median(row["cpu_seconds"] for row in own if row["kind"] == "run") / 60
            found.append(Result(find_arm(name), tests, lr, edge, runs[0]["trainable"], minutes))
    return found


def spread(values: Sequence[float], decimals: int) -> str:
    """Mean ± sample standard deviation; of one value, that alone."""
    mean = f"{statistics.fmean(values):.{decimals}f}"
    return f"{mean} ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else mean


def against(result: Result, other: Result, decimals: int) -> str:
    """The difference of mean test scores, and whether all seeds of one are above all of the other."""
    ours, theirs = result.values("test"), other.values("test")
    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    if min(len(ours), len(theirs)) < 2:
        return f"{difference:+.{decimals}f}"
    apart = min(ours) > max(theirs) or max(ours) < min(theirs)
    return f"{difference:+.{decimals}f}, ranges {'apart' if apart else 'overlap'}"


def digits(study: Study) -> int:
    """Decimals of a score in tables."""
    return 1 if study.score == "accuracy" else 3


def study_table(rows: Iterable[Row], study: Study) -> str:
    """A study's results in Markdown, one line per arm."""
    decimals = digits(study)
    found = results(rows, study)
    plain = {result.arm.name: result for result in found if result.arm.name in ("lora-none", "adapter-none")}
    lines = [
        f"| arm | trained | learning rate | {study.unit}, own picture | another's | against none | seeds | minutes |",
        "|---|---:|---:|---:|---:|---|---:|---:|",
    ]
    for result in found:
        other = plain.get(f"{result.arm.name.split('-')[0]}-none")
        cells = (
            result.arm.title,
            f"{result.parameters:,}",
            f"{result.lr:g}{' (edge)' if result.at_the_edge else ''}",
            spread(result.values("test"), decimals),
            spread(result.values("shuffled"), decimals),
            "" if other in (None, result) else against(result, other, decimals),
            str(len(result.tests)),
            f"{result.minutes:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def made_with(rows: Iterable[Row]) -> str:
    """The commits, versions and machines that rows were made with, in one sentence."""
    names = ("torch", "transformers")
    versions = [", ".join(f"{name} {row['versions'][name]}" for name in names) for row in rows]
    commits = [row["git"]["commit"][:7] + (" with changes" if row["git"]["dirty"] else "") for row in rows]
    found = (commits, versions, [row["machine"] for row in rows])
    return f"Made with {'; '.join(' and '.join(sorted(set(each))) for each in found)}."


def tables(rows: Sequence[Row]) -> str:
    """Every study's table under its title, and what its rows were made with."""
    parts = []
    for study in STUDIES:
        if found := results(rows, study):
            tests = [row for result in found for row in result.tests]
            parts.append(f"**{study.title}**\n\n{study_table(rows, study)}\n\n{made_with(tests)}")
    return "\n\n".join(parts)
