"""The learning-rate search behind the demo: the same rates for every variant, chosen on validation, then more seeds.

``routingvl demo --full`` runs it; its result, ``search.json`` beside this file, is committed, and every other run of
the demo takes each variant at the rate found there.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from routingvl.atomic_files import write_text
from routingvl.demo.jobs import Record
from routingvl.demo.variants import SCORES, VARIANTS, DemoSettings, Job, Variant, settings_to_dict
from routingvl.environment import environment

COMMITTED = Path(__file__).with_name("search.json")
RunJobs = Callable[[Sequence[Job]], list[Record]]


def variant_of(record: Record) -> Variant:
    """The variant that a record is of."""
    return Variant(**record["variant"])


def search(settings: DemoSettings, run_jobs: RunJobs, variants: Iterable[Variant] = VARIANTS) -> list[Record]:
    """Choose a learning rate for every variant and repeat it with the other seeds.

    1. Every variant runs at every rate of its task, with the first seed.
    2. While the best rate of some variant lies on the edge of its task's grid, the grid grows by one rate on that side,
       for all variants of the task, up to ``settings.max_rates``. (A variant without prefix and routing sees no image:
       its best rate means nothing and grows no grid.)
    3. Every variant runs with the remaining seeds, at its best rate.

    "Best" is the validation score; test scores choose nothing.
    """
    variants = list(variants)
    rates = {task: tuple(settings.rates[task]) for task in dict.fromkeys(variant.task for variant in variants)}
    while True:
        grid = [Job(variant, lr, settings.seeds[0]) for variant in variants for lr in rates[variant.task]]
        records = run_jobs(grid)
        wider = {task: widen(task, rates[task], records, settings.max_rates) for task in rates}
        if wider == rates:
            break
        rates = wider
    best = best_rates(records)
    return records + run_jobs(
        [Job(variant, best[variant], seed) for seed in settings.seeds[1:] for variant in variants]
    )


def widen(task: str, rates: tuple[float, ...], records: Iterable[Record], max_rates: int) -> tuple[float, ...]:
    """The grid of a task with one rate more (twice or half the last) on each side where a variant's best rate lies."""
    chosen = {lr for variant, lr in best_rates(records).items() if variant.task == task and not is_blind(variant)}
    if rates[-1] in chosen and len(rates) < max_rates:
        rates = (*rates, 2 * rates[-1])
    if rates[0] in chosen and len(rates) < max_rates:
        rates = (rates[0] / 2, *rates)
    return rates


def at_the_edge(records: Iterable[Record]) -> list[Variant]:
    """Variants whose best rate is the lowest or highest that was tried, and that so might gain from going further."""
    records = list(records)
    tried = defaultdict(set)
    for record in records:
        tried[variant_of(record).task].add(record["lr"])
    return [
        variant
        for variant, lr in best_rates(records).items()
        if lr in (min(tried[variant.task]), max(tried[variant.task])) and not is_blind(variant)
    ]


def is_blind(variant: Variant) -> bool:
    """Whether no path leads from the image to the text."""
    return variant.routing == "none" and not variant.prefix


def best_rates(records: Iterable[Record]) -> dict[Variant, float]:
    """Each variant's learning rate with the highest validation score, among the runs with its first seed."""
    records = list(records)
    first_seed = min(record["seed"] for record in records)
    runs = defaultdict(list)
    for record in records:
        if record["seed"] == first_seed:
            runs[variant_of(record)].append(record)
    return {variant: max(group, key=lambda record: record["validation"])["lr"] for variant, group in runs.items()}


def summarise(records: Iterable[Record], scores: Sequence[str]) -> dict[Variant, dict[str, Any]]:
    """Mean and sample standard deviation over seeds of test ``scores``, for each variant at its best rate.

    Returns:
        variant -> {"lr", "n", "values": {score: [one per seed]}, "mean": {...}, "std": {...} (None for one seed)}
    """
    records = list(records)
    result = {}
    for variant, lr in best_rates(records).items():
        runs = [record for record in records if variant_of(record) == variant and record["lr"] == lr]
        values = {score: [run["test"][score] for run in runs if score in run["test"]] for score in scores}
        values = {score: numbers for score, numbers in values.items() if numbers}
        result[variant] = {
            "lr": lr,
            "n": len(runs),
            "values": values,
            "mean": {score: statistics.fmean(numbers) for score, numbers in values.items()},
            "std": {
                score: statistics.stdev(numbers) if len(numbers) > 1 else None for score, numbers in values.items()
            },
        }
    return result


@dataclass(frozen=True)
class Comparison:
    """A variant's mean score in the search relative to none's (+0.2 is a fifth more), and what the seeds say of it.

    ``apart``: every seed of one lies beyond every seed of the other; None when either has one seed only. Three seeds
    carry no fine test, but this they show plainly.
    """

    gain: float
    apart: bool | None

    def __str__(self) -> str:
        seeds = {True: "ranges apart", False: "ranges overlap", None: "one seed"}[self.apart]
        return f"{100 * self.gain:+.1f} %, {seeds}"


def against_none(variant: Variant, searched: Mapping[Variant, dict[str, Any]]) -> Comparison | None:
    """Compare a variant with the same method without routing; None for that one itself and where a side is missing."""
    baseline = replace(variant, routing="none")
    if variant == baseline or variant not in searched or baseline not in searched:
        return None
    score = SCORES[variant.task]
    ours, theirs = searched[variant]["values"][score], searched[baseline]["values"][score]
    mean = statistics.fmean(theirs)
    if not mean:
        return None
    several = min(len(ours), len(theirs)) > 1
    apart = min(ours) > max(theirs) or max(ours) < min(theirs)
    return Comparison(statistics.fmean(ours) / mean - 1, apart if several else None)


def write_search(path: Path, records: Iterable[Record], settings: DemoSettings, quality: dict[str, Any]) -> None:
    """Write a search result: settings, machine, versions, commit, the backbones' quality and every run.

    Predictions and training losses stay behind: they would be most of the file, and every demo makes its own.
    """
    left_out = ("predictions", "losses")
    runs = [{key: value for key, value in record.items() if key not in left_out} for record in records]
    unique = {run["key"]: run for run in runs}
    content = {
        "about": "Learning-rate search of the embedded demo, written by `routingvl demo --full` (docs/demo.md)",
        "environment": environment(),
        "settings": settings_to_dict(settings),
        "backbones": quality,
    }
    # One run per line, so that the file can be read and compared by people.
    lines = ",\n".join(json.dumps(run) for run in unique.values())
    write_text(path, f'{json.dumps(content, indent=1)[:-2]},\n "runs": [\n{lines}\n]\n}}\n')


def load_search(path: Path = COMMITTED) -> dict[str, Any]:
    """Read a search result.

    Raises:
        ValueError: the file is missing or holds no runs.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: run `routingvl demo --full`, whose result belongs there")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not content.get("runs"):
        raise ValueError(f"{path} holds no runs: write it again with `routingvl demo --full`")
    return content
