"""``routingvl demo``: make data and backbones, train every variant, and write a report.

Three sizes share one code path: ``--quick`` (two variants a task), the default (every variant once, at the learning
rate that the committed search found) and ``--full`` (the search itself).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routingvl.config import ConfigError
from routingvl.data.prepare import prepare_coco, prepare_vqa
from routingvl.demo.backbones import build_backbones
from routingvl.demo.jobs import Record, ResultStore, run_jobs
from routingvl.demo.report import write_report
from routingvl.demo.search import best_rates, load_search, search, write_search
from routingvl.demo.shapes import ShapesConfig, write_shapes
from routingvl.demo.variants import QUICK_VARIANTS, VARIANTS, DemoSettings, Job, Variant
from routingvl.environment import environment


@dataclass(frozen=True)
class DemoOptions:
    """What the command line chooses.

    Attributes:
        output: folder of everything the demo makes; finished work in it is kept and used again.
        quick: only captioning and VQA with LoRA and Adapters, without routing and with mul.
        full: the whole learning-rate search, three seeds.
        fresh: remove the output folder first.
        workers: training processes at a time.
        seed: of the bottlenecks' initial values and the order of examples (--full has its own seeds).
    """

    output: str = "runs/demo"
    quick: bool = False
    full: bool = False
    fresh: bool = False
    workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.quick and self.full:
            raise ConfigError("--quick and --full exclude each other: choose one")
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} must be at least 1")


def run(
    options: DemoOptions,
    settings: DemoSettings | None = None,
    *,
    committed: dict[str, Any] | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run the demo and return the folder of its report (``report.html``, ``report.md``).

    Args:
        options: size and place.
        settings: what decides the numbers; the default is what the committed search was run with.
        committed: a search result in place of the committed one.
        say: receives one line at a time.

    Raises:
        ConfigError, ValueError: the output folder or the committed search cannot be used.
        RuntimeError: a training run failed; finished ones are kept.
    """
    started = time.perf_counter()
    settings = settings or DemoSettings()
    work = Path(options.output)
    prepare_folder(work, options.fresh)
    if not options.full:
        committed = committed or load_search()
    say(f"data: {settings.data.train_images} training images of coloured shapes, with captions and questions")
    write_data(work, settings.data)
    data_seconds = time.perf_counter() - started
    say("backbones: a ViT on images, a RoBERTa and a GPT-2 on text, one modality each")
    quality = build_backbones(work / "backbones", settings.backbones)
    backbone_seconds = time.perf_counter() - started - data_seconds
    store = ResultStore(work / "results.jsonl")

    def train_jobs(jobs: Sequence[Job]) -> list[Record]:
        return run_jobs(jobs, settings, work, store, options.workers, say)

    if options.full:
        records = search(settings, train_jobs)
        write_search(work / "search.json", records, settings, quality)
        committed = load_search(work / "search.json")
    else:
        variants = QUICK_VARIANTS if options.quick else VARIANTS
        rates = rates_of(committed, settings, variants)
        records = train_jobs([Job(variant, lr, options.seed) for variant, lr in rates.items()])
    report = write_report(
        work,
        settings=settings,
        mode="full" if options.full else "quick" if options.quick else "default",
        records=records,
        committed=committed,
        quality=quality,
        environment=environment(),
        seconds={
            "data": data_seconds,
            "backbones": backbone_seconds,
            "all": time.perf_counter() - started,
        },
    )
    say(report.table)
    say(f"report: {report.html} (also {report.markdown})")
    return work


def rates_of(committed: dict[str, Any], settings: DemoSettings, variants: Sequence[Variant]) -> dict[Variant, float]:
    """The learning rate that the search found for each variant; its task's default for one that it has not tried."""
    best = best_rates(committed["runs"])
    return {variant: best.get(variant, settings.default_rate(variant.task)) for variant in variants}


def prepare_folder(work: Path, fresh: bool) -> None:
    """Make the output folder; ``fresh`` empties it first. A folder that no demo made is left alone.

    Raises:
        ConfigError: the folder holds something else.
    """
    mark = work / ".routingvl-demo"
    if work.exists() and not mark.is_file() and (not work.is_dir() or any(work.iterdir())):
        raise ConfigError(f"{work} is not empty and no demo made it: choose another --output")
    if fresh and work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    mark.touch()


def write_data(work: Path, config: ShapesConfig) -> None:
    """Make the official files under ``work/data`` and derive the rest from them, as ``routingvl prepare-data`` does."""
    data, derived = work / "data", work / "annotations"
    stamp = (data / "shapes.json").read_bytes() if (data / "shapes.json").is_file() else None
    write_shapes(data, config)
    if stamp == (data / "shapes.json").read_bytes() and (derived / "vqa_manifest.json").is_file():
        return
    karpathy = data / "dataset_coco.json"
    subsets = ("train2014", "val2014")
    prepare_coco(karpathy, derived)
    prepare_vqa(
        [data / f"v2_OpenEnded_mscoco_{subset}_questions.json" for subset in subsets],
        [data / f"v2_mscoco_{subset}_annotations.json" for subset in subsets],
        karpathy,
        derived,
    )
