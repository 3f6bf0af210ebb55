"""Run training jobs in worker processes; keep every finished result on disk, so that an interrupted demo goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from routingvl.atomic_files import write_text
from routingvl.data.coco import load_captions
from routingvl.demo.pool import worker_pool
from routingvl.demo.variants import SCORES, DemoSettings, Job
from routingvl.training.log import read_metrics

Record = dict[str, Any]
SAMPLES = 24  # test images whose predictions a record keeps for the report


class ResultStore:
    """Finished jobs of one output folder: one JSON line per job, written as it finishes, found again by its key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {record["key"]: record for record in read_metrics(path)}

    def add(self, record: Record) -> None:
        """Keep a record, on disk when this returns; the file is replaced as a whole, so no crash can tear a line."""
        self.records[record["key"]] = record
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.records.values()))


def run_jobs(
    jobs: Iterable[Job],
    settings: DemoSettings,
    work: Path,
    store: ResultStore,
    workers: int,
    say: Callable[[str], None] = print,
) -> list[Record]:
    """The records of ``jobs``, in order; those that ``store`` does not have yet are trained, ``workers`` at a time.

    A run's folder in ``work/runs`` is called after its job. What an interrupted job, or one with other settings, has
    left there is removed.

    Raises:
        RuntimeError: a job failed (its own error is the cause). Finished jobs stay in the store.
    """
    jobs = list(jobs)
    keys = [job.key(settings) for job in jobs]
    missing = {key: job for key, job in zip(keys, jobs, strict=True) if key not in store.records}
    if len(missing) < len(jobs):
        say(f"{len(jobs) - len(missing)} of {len(jobs)} runs are already in {store.path}")
    if missing:
        say(f"{len(missing)} runs to train, {min(workers, len(missing))} at a time")
    names = run_names(jobs)
    runs = {job: work / "runs" / names[job] for job in missing.values()}
    for done, (job, record) in enumerate(_train_all(runs, settings, work, workers), start=1):
        store.add(record)
        score = SCORES[job.variant.task]
        result = f"test {score} {record['test'][score]:.3f}, {record['seconds']['all']:.0f} s"
        say(f"[{done}/{len(missing)}] {job.title}: {result}")
    return [store.records[key] for key in keys]


def run_names(jobs: Sequence[Job]) -> dict[Job, str]:
    """The name of each job's folder; it has the learning rate where it would be another job's too without."""
    alike = Counter(job.name(with_rate=False) for job in set(jobs))
    return {job: job.name(with_rate=alike[job.name(with_rate=False)] > 1) for job in jobs}


def _train_all(
    runs: Mapping[Job, Path], settings: DemoSettings, work: Path, workers: int
) -> Iterator[tuple[Job, Record]]:
    """Jobs, each with its run folder in ``runs``, and their records, as they finish."""
    if not runs:
        return
    waiting = deque(runs)
    running: dict[Future[Record], Job] = {}
    with worker_pool(min(workers, len(runs))) as pool:
        while waiting or running:
            # Never more than run at once: after an error or Ctrl-C there is then none left for the pool to start.
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running[pool.submit(run_job, job, settings, str(work), str(runs[job]))] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if error := future.exception():
                    raise RuntimeError(f"demo run failed ({job.title}): {error}") from error
                yield job, future.result()


def run_job(job: Job, settings: DemoSettings, work: str, run_dir: str) -> Record:
    """Train one job into ``run_dir`` and evaluate it on the test split, as ``routingvl train`` and ``evaluate`` do.

    Returns:
        A record of plain values: the job, validation and test scores, the main one also with another example's image
        in the place of each ("shuffled"), learning curves, seconds, parameter counts, and some predictions.
    """
    from routingvl.evaluate import evaluate
    from routingvl.train import train

    started = time.perf_counter()
    folder = Path(run_dir).resolve()
    # Of an interrupted job, or of other settings: a finished job is not run again.
    shutil.rmtree(folder, ignore_errors=True)
    result = train(job.run_config(settings, Path(work).resolve(), folder), log="quiet")
    evaluating = time.perf_counter()
    metrics = evaluate(folder, split="test", log="quiet")
    score = SCORES[job.variant.task]
    only = {"metrics": [score]} if job.variant.task == "caption" else {}
    control = evaluate(folder, split="test", image_control="shuffled", log="quiet", **only)
    finished = time.perf_counter()
    scores, predictions = read_evaluation(job.variant.task, metrics, Path(work))
    return {
        "key": job.key(settings),
        **asdict(job),
        "steps": result.steps,
        "validation": result.best_metric,
        "test": scores,
        "shuffled": {score: control[score]},
        "curve": [[r["step"], r[result.metric]] for r in result.history if r["kind"] == "validation"],
        "losses": [[r["step"], round(r["loss"], 5)] for r in result.history if r["kind"] == "train"],
        "seconds": {
            "train": round(result.seconds, 2),
            "evaluate": round(finished - evaluating, 2),
            "all": round(finished - started, 2),
        },
        "trainable": result.trainable,
        "total": result.total,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "predictions": predictions,
    }


def read_evaluation(task: str, metrics: dict[str, Any], work: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the report needs of an evaluation: plain scores, and the predictions for the first images by their id.

    Captions get one more score, ``exact``: the share (0 to 1) that equals a reference word for word.
    """
    rows = json.loads(Path(metrics["predictions"]).read_text(encoding="utf-8"))
    if task == "vqa":
        predictions = {row["question_id"]: row["answer"] for row in rows}
        scores = {name: metrics[name] for name in ("accuracy", "per_answer_type", "per_question_type")}
    else:
        predictions = {row["image_id"]: row["caption"] for row in rows}
        references = load_captions(work / "annotations", "test").references
        exact = sum(predictions[image_id] in texts for image_id, texts in references.items()) / len(references)
        scores = {name: metrics[name] for name in ("CIDEr", "BLEU-4", "ROUGE_L")} | {"exact": exact}
    first_images = sorted({_image_id(task, number) for number in predictions})[:SAMPLES]
    return scores, {str(n): text for n, text in predictions.items() if _image_id(task, n) in first_images}


def _image_id(task: str, number: int) -> int:
    return number // 1000 if task == "vqa" else number
