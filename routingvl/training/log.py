"""What a run reports: metrics.jsonl and train.log, accelerate's trackers, the terminal or the caller's function."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from tqdm import tqdm

from routingvl.atomic_files import append_text, write_text
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig, flatten
from routingvl.training.run_folder import RunFolder

logger = logging.getLogger(__name__)
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
        folder: the run.
        config: what the trackers are told of it.
        accelerator: has the trackers, which are started here; only its main process records.
        log: "quiet" prints nothing, a function is called with each record, None prints messages.
        history: the records of a resumed run up to its saved state. What it logged after that will be logged again.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        accelerator: Accelerator,
        log: Log,
        history: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.folder, self.accelerator, self.active = folder, accelerator, accelerator.is_main_process
        self.callback = log if callable(log) else None
        self.quiet = log == "quiet" or not self.active
        self.history = list(history)
        if not self.active:
            return
        if self.history and read_metrics(folder.metrics_file)[: len(self.history)] != self.history:
            self.warn(f"{folder.metrics_file.name} was edited or deleted: its records up to here are written again")
        write_text(folder.metrics_file, "".join(json.dumps(record) + "\n" for record in self.history))
        wandb = {"name": folder.path.name, "dir": str(folder.path), "config": flatten(config)}
        accelerator.init_trackers("routingvl", init_kwargs={"wandb": wandb})

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one record, for instance ``record("train", 50, {"loss": 0.7})``."""
        if not self.active:
            return
        record = {"kind": kind, "step": step, **values}
        self.history.append(record)
        append_text(self.folder.metrics_file, json.dumps(record) + "\n")
        numbers = {f"{kind}/{name}": value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)
        if self.callback:
            self.callback(record)

    def message(self, text: str) -> None:
        """Add a line to train.log, and to the terminal unless quiet."""
        if not self.active:
            return
        append_text(self.folder.log_file, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if not self.quiet and self.callback is None:
            tqdm.write(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """A message that "quiet" does not silence."""
        self.message(text)
        if self.active and (self.quiet or self.callback):
            logger.warning("%s", text)

    def close(self) -> None:
        """End the trackers' runs. (``Accelerator.end_training`` would end the process group too.)"""
        for tracker in self.accelerator.trackers:
            tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; an empty list when there is none. It ends where a crash cut it off."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records
