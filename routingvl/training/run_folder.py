"""The run folder: what is in it, and how it is opened."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from routingvl.atomic_files import write_json, write_text
from routingvl.config.files import config_to_yaml, load_config
from routingvl.config.schema import RunConfig, changed_settings
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
