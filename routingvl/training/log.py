"""What a run reports: metrics.jsonl and train.log, accelerate's trackers, the terminal or the caller's function."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tqdm import tqdm

from routingvl.atomic_files import write_text
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig, flatten
from routingvl.training.run_folder import RunFolder

Log = str | Callable[[dict[str, Any]], None] | None


def check_trackers(names: Sequence[str]) -> None:
    """Raise :class:`ConfigError` when one of the named trackers of accelerate is not installed."""
    found = set(map(str, get_available_trackers()))
    for name in names:
        if name not in found:
            raise ConfigError(f"train.trackers: {name} is not installed; pip install {name} or leave it out")


class RunLog:
    """Records of a run, from its first process.

    Args:
        config: what the trackers are told of the run.
        accelerator: has the trackers, which are started here; only its main process records.
        log: "quiet" prints nothing, a function is called with each record, None prints messages.
        resume_step: keep earlier records up to this step; None starts a new log.
    """

    def __init__(
        self, folder: RunFolder, config: RunConfig, accelerator: Accelerator, log: Log, resume_step: int | None = None
    ) -> None:
        self.folder, self.accelerator, self.active = folder, accelerator, accelerator.is_main_process
        self.callback = log if callable(log) else None
        self.quiet = log == "quiet" or not self.active
        self.history: list[dict[str, Any]] = []
        if not self.active:
            return
        if resume_step is not None:
            # What an interrupted run logged after its last saved state will be logged again.
            self.history = [r for r in read_metrics(folder.metrics_file) if r["step"] <= resume_step]
        write_text(folder.metrics_file, "".join(json.dumps(record) + "\n" for record in self.history))
        wandb = {"name": folder.path.name, "dir": str(folder.path), "config": flatten(config)}
        accelerator.init_trackers("routingvl", init_kwargs={"wandb": wandb})

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one record, for instance ``record("train", 50, {"loss": 0.7})``."""
        if not self.active:
            return
        record = {"kind": kind, "step": step, **values}
        self.history.append(record)
        with self.folder.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)
        if self.callback:
            self.callback(record)

    def message(self, text: str) -> None:
        """Add a line to train.log, and to the terminal unless quiet."""
        if not self.active:
            return
        with self.folder.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if not self.quiet and self.callback is None:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the trackers' runs. (``Accelerator.end_training`` would end the process group too.)"""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; an empty list when there is none. A last line cut off by a crash is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
