"""The run folder: what is in it, and how it is opened."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from routingvl.atomic_files import write_json, write_text
from routingvl.config import ConfigError
from routingvl.config.files import config_to_yaml, load_config
from routingvl.config.schema import RunConfig, changed_settings, flatten
from routingvl.environment import environment

# Settings that say where and how fast, not what: a resumed run may change them and stays the same run.
FREE_ON_RESUME = (
    "output_dir device data.annotations data.images data.answers data.workers data.feature_batch_size "
    "data.feature_cache model.backend train.compile train.log_every train.save_every train.trackers"
).split()


class RunError(ValueError):
    """A run folder is missing, occupied or incomplete; the message names it and the fix."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; ``routingvl evaluate RUN`` needs nothing else."""

    path: Path

    config_file = property(lambda self: self.path / "config.yaml")
    environment_file = property(lambda self: self.path / "environment.json")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    log_file = property(lambda self: self.path / "train.log")
    state_file = property(lambda self: self.path / "state" / "training_state.pt")
    tokenizer = property(lambda self: self.path / "tokenizer")
    preprocessor = property(lambda self: self.path / "preprocessor_config.json")
    answers = property(lambda self: self.path / "label2ans.json")

    def checkpoint(self, name: str) -> Path:
        """Folder of the adapter called ``name`` ("best" or "last"), whether it is there or not."""
        return self.path / name

    def adapter(self, name: str) -> Path:
        """Folder of the adapter called ``name``; raises :class:`RunError` when the run has none."""
        path = self.checkpoint(name)
        if not path.is_dir():
            raise RunError(f"{self.path} has no adapter {name!r}; train it further, or choose another --checkpoint")
        return path

    def check_free(self, *, overwrite: bool) -> None:
        """Raise :class:`RunError` when the folder holds anything, or with ``overwrite`` anything but a run."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another output_dir")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not overwrite:
            raise RunError(
                f"run folder {self.path} is not empty; choose another output_dir, "
                "continue it with --resume, or replace it with --overwrite"
            )
        if not self.config_file.is_file():
            raise RunError(f"{self.path} has no config.yaml, so it is no run folder and is not overwritten")

    def start(self, config: RunConfig) -> None:
        """Make the folder, in place of an older run there, and write its config and environment."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)
        write_text(self.config_file, config_to_yaml(config))
        write_json(self.environment_file, environment())

    def check_resumable(self, config: RunConfig) -> None:
        """Check that the run here can be continued under ``config``; raises :class:`RunError` naming what differs."""
        if not self.state_file.is_file():
            raise RunError(
                f"{self.path} has no {self.state_file.relative_to(self.path)}, so there is nothing to resume"
            )
        changed = changed_settings(self.load_config(), config)
        wrong = {key: values for key, values in changed.items() if key not in FREE_ON_RESUME}
        if wrong:
            what = ", ".join(f"{key} was {old!r} and is now {new!r}" for key, (old, new) in wrong.items())
            raise RunError(f"cannot resume {self.path} with other settings: {what}")

    def load_config(self) -> RunConfig:
        """The config the run was started with."""
        if not self.config_file.is_file():
            raise RunError(
                f"{self.path} has no config.yaml, so it is no run folder; give the output_dir of a training run"
            )
        return load_config(self.config_file)


class RunLog:
    """Records of a run: metrics.jsonl and train.log always, and TensorBoard, W&B, the terminal or a function if asked.

    Args:
        folder: the run.
        config: names the trackers.
        log: "quiet" prints nothing, a function is called with each record, None prints messages.
        resume_step: keep earlier records up to this step; None starts a new log.
        active: False makes an instance that records nothing (processes other than the first).
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        log: str | Callable[[dict[str, Any]], None] | None = None,
        resume_step: int | None = None,
        active: bool = True,
    ) -> None:
        self.folder, self.active = folder, active
        self.callback = log if callable(log) else None
        self.quiet = log == "quiet" or not active
        self.history: list[dict[str, Any]] = []
        self._trackers = []
        if not active:
            return
        if resume_step is not None:
            # What an interrupted run logged after its last saved state will be logged again.
            self.history = [row for row in read_metrics(folder.metrics_file) if row["step"] <= resume_step]
        write_text(folder.metrics_file, "".join(json.dumps(row) + "\n" for row in self.history))
        self._trackers = [_TRACKERS[name](folder, config) for name in config.train.trackers]

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Append one record, for instance ``record("train", 50, {"loss": 0.7})``."""
        if not self.active:
            return
        row = {"kind": kind, "step": step, **values}
        self.history.append(row)
        with self.folder.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for tracker in self._trackers:
            tracker(kind, step, {k: v for k, v in values.items() if isinstance(v, (int, float))})
        if self.callback:
            self.callback(row)

    def message(self, text: str) -> None:
        """Add a line to train.log, and to the terminal unless quiet."""
        if not self.active:
            return
        with self.folder.log_file.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if not self.quiet and self.callback is None:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl; an empty list when there is none. A last line cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _tensorboard(folder: RunFolder, config: RunConfig) -> Callable[[str, int, Mapping[str, float]], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "train.trackers: tensorboard is not installed; pip install tensorboard or leave it out"
        ) from error
    writer = SummaryWriter(str(folder.path / "tensorboard"))

    def write(kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{kind}/{name}", value, step)
        writer.flush()

    return write


def _wandb(folder: RunFolder, config: RunConfig) -> Callable[[str, int, Mapping[str, float]], None]:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("train.trackers: wandb is not installed; pip install wandb or leave it out") from error
    run = wandb.init(project="routingvl", name=folder.path.name, dir=str(folder.path), config=flatten(config))
    return lambda kind, step, values: run.log({f"{kind}/{name}": v for name, v in values.items()}, step=step)


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
