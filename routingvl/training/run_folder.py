"""The run folder: what is in it, and how it is opened, locked, replaced and put back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from routingvl.atomic_files import is_leftover, naming, recover, remove, write_json, write_text
from routingvl.config.files import config_of, config_to_yaml, read_settings
from routingvl.config.schema import RunConfig
from routingvl.digests import file_digest
from routingvl.json_files import read_json
from routingvl.training.folder_lock import FolderLock
from routingvl.training.identity import Identity, ImageFile, changed_settings, from_lines, to_lines

# What a run and its evaluation write, beside the files of its task, which run.json lists.
WRITTEN = (
    "state/training_state.* run.json images.jsonl config.yaml environment.json metrics.jsonl train.log "
    "best/adapter_model.safetensors best/adapter_config.json last/adapter_model.safetensors last/adapter_config.json "
    "tensorboard/**/* wandb/**/* eval-*/metrics.json eval-*/*results.json* "
    "eval-*/*results.csv"
).split()
PARTS = ("", "best", "last", "state", "tokenizer")  # folders in which a killed run may leave temporary files
MADE_BY = {"made_by": "routingvl", "format": 1}


class RunError(ValueError):
    """A run folder is missing, occupied or incomplete; the message names it and the fix."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; ``routingvl evaluate RUN`` needs nothing else."""

    path: Path

    config_file = property(lambda self: self.path / "config.yaml")
    environment_file = property(lambda self: self.path / "environment.json")
    identity_file = property(lambda self: self.path / "run.json")
    images_file = property(lambda self: self.path / "images.jsonl")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    log_file = property(lambda self: self.path / "train.log")
    state = property(lambda self: self.path / "state")
    # An older run, until the one that replaces it has saved once; and the same while its files are being moved.
    previous = property(lambda self: self.path / ".previous")
    moving = property(lambda self: self.path / ".previous.moving")

    def checkpoint(self, name: str) -> Path:
        """Folder of the adapter called ``name`` ("best" or "last"), whether it is there or not."""
        return self.path / name

    def adapter(self, name: str) -> Path:
        """Folder of the adapter called ``name``; raises :class:`RunError` when the run has none."""
        path = self.checkpoint(name)
        if not path.is_dir():
            raise RunError(f"{self.path} has no adapter {name!r}; train it further, or choose another --checkpoint")
        return path

    def load_config(self) -> RunConfig:
        """The config the run was started with; raises :class:`RunError` when a part of it is gone."""
        if not self.config_file.is_file():
            raise RunError(
                f"{self.path} has no config.yaml, so it is no run folder; give the output_dir of a training run"
            )
        settings = read_settings(self.config_file)
        config = config_of(settings, self.config_file)
        if lost := self._recorded_settings().keys() - settings.keys():
            few = ", ".join(sorted(lost)[:3])
            raise RunError(f"{self.config_file} lacks {few}: it was cut off or edited; put back the file of this run")
        return config

    def _recorded_settings(self) -> dict[str, Any]:
        recorded = self.read_identity().get("config") if self.identity_file.is_file() else None
        return recorded if isinstance(recorded, dict) else {}

    # ---------------------------------------------------------------------------------- checks that change nothing

    def check_free(self, config: RunConfig, *, overwrite: bool) -> None:
        """Raise :class:`RunError` when the folder holds anything, or with ``overwrite`` anything but a run."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; choose another output_dir")
        if not self.path.is_dir() or all(e.name == ".lock" or is_leftover(e) for e in self.path.iterdir()):
            return
        adapters = [name for name in ("best", "last") if self.checkpoint(name).is_dir()]
        if self.identity_file.is_file() and not (adapters or self.has_state() or self.untidy()):
            overwrite = True  # a run that ended before it saved anything
        if not overwrite:
            with suppress(OSError):  # a folder that may not be read or written says so later
                self.acquire().release()
            raise RunError(
                f"run folder {self.path} is not empty; choose another output_dir, "
                "continue it with --resume, or replace it with --overwrite"
            )
        if not self.untidy():
            self.read_identity()
        data, model, here = config.data, config.model, self.path.resolve()
        inputs = (data.annotations, data.images, data.answers, data.feature_cache)
        for name in filter(None, (*inputs, model.vision, model.text, model.tokenizer)):
            place = Path(name).resolve()
            if place == here or here in place.parents:
                for file in self.written():
                    if place == file.resolve() or place in file.resolve().parents:
                        raise RunError(f"--overwrite would replace {file}, which the new run needs ({name})")

    def check_resumable(self, config: RunConfig) -> None:
        """Raise :class:`RunError` when there is no run here, nothing to resume, or one with other settings."""
        if (old := self.state / "training_state.pt").is_file() and not self.has_state():
            raise RunError(f"{old} was written by an older version of routingvl and is not read; start the run anew")
        if not self.has_state() and not self.untidy():
            raise RunError(f"{self.path} has no saved state in {self.state.name}/, so there is nothing to resume")
        if self.has_state():
            began = self.identity()
            changes = dict.fromkeys([*began.changed_settings(self.load_config()), *began.changed_settings(config)])
            if changes:
                raise RunError(f"cannot resume {self.path} with other settings: {'; '.join(changes)}; change them back")

    def check_unchanged(self) -> None:
        """Raise :class:`RunError` when what predictions depend on was edited or deleted since the run began."""
        if not self.identity_file.is_file():
            return
        if not (recorded := self._recorded_settings()):
            raise RunError(f"{self.identity_file} is damaged (config); start the run anew")
        changes = [f"{name} was edited or deleted" for name in self.changed_files() if name != "environment.json"]
        changes += [
            change
            for change in changed_settings(recorded, self.load_config())
            if change.startswith(("task", "model.", "routing.", "data."))
        ]
        if changes:
            raise RunError(f"{self.path} is no longer what was trained: {'; '.join(changes)}; put the files back")

    def has_state(self) -> bool:
        """Whether a run here has saved once."""
        return any(self.state.glob("training_state.[js]*"))

    def untidy(self) -> bool:
        """Whether a killed run left something that :meth:`tidy` may make a run of, which it does under the lock."""
        left = (self.previous, self.moving)
        return self.path.is_dir() and any(entry in left or is_leftover(entry) for entry in self.path.iterdir())

    def written(self) -> list[Path]:
        """The files here that a run wrote; no others, wherever they are."""
        try:
            listed = self.read_identity()["files"]
        except RunError:
            listed = []
        found = [file for pattern in WRITTEN for file in sorted(self.path.glob(pattern))]
        found += [self.path / name for name in listed]
        return [file for file in dict.fromkeys(found) if file.is_file() or file.is_symlink()]

    # ------------------------------------------------------------------------------------------ one writer at a time

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process, tidied up after killed ones; made for it, and removed if left empty.

        Raises :class:`RunError` naming the holder when another process has it.
        """
        with ExitStack() as undo:
            for folder in [folder for folder in (*reversed(self.path.parents), self.path) if not folder.exists()]:
                undo.callback(_remove_if_empty, folder)
            self.path.mkdir(parents=True, exist_ok=True)
            undo.callback(self.acquire().release)
            self.tidy()
            yield

    def acquire(self) -> FolderLock:
        """The lock of the folder, in hand. Raises :class:`RunError` naming the holder when another process has it."""
        lock = FolderLock(self.path / ".lock")
        if (holder := lock.acquire()) is not None:
            raise RunError(f"run folder {self.path} is in use by {holder}; wait for its end, or stop it")
        return lock

    def tidy(self) -> None:
        """Remove what killed runs left, and put an older run back that was to be replaced but was not."""
        for name in PARTS:
            recover(self.path / name)
        if self.moving.is_dir() or not self.has_state():
            self.put_back()
        self.forget()

    def move_aside(self) -> None:
        """Move the files of an older run into a folder of their own; files of others stay where they are."""
        _move(self.written(), self.path, self.moving)
        if self.moving.is_dir():
            os.replace(self.moving, self.previous)

    def put_back(self) -> None:
        """Undo :meth:`move_aside`: the older run's files take the place of the newer one's."""
        if self.previous.is_dir():
            for file in self.written():
                file.unlink()
            os.replace(self.previous, self.moving)
        _move([file for file in self.moving.rglob("*") if not file.is_dir()], self.moving, self.path)
        remove(self.moving)

    def forget(self) -> None:
        """Remove the older run: the new one has saved."""
        remove(self.previous)

    # --------------------------------------------------------------------------------------------- what a run is of

    def start(self, config: RunConfig, identity: Identity, save_files: Callable[[Path], None]) -> None:
        """Begin a run here: its identity, config, environment, and the files of its task; all of it or nothing."""
        self.move_aside()
        before = set(self.path.rglob("*"))
        try:
            self._write_start(config, identity, save_files)
        except BaseException:
            for entry in sorted(set(self.path.rglob("*")) - before, reverse=True):
                _remove_if_empty(entry) if entry.is_dir() else entry.unlink()
            raise

    def _write_start(self, config: RunConfig, identity: Identity, save_files: Callable[[Path], None]) -> None:
        write_json(self.identity_file, MADE_BY | {"files": {}})
        before = set(self.path.rglob("*"))
        with naming(self.path):
            save_files(self.path)
        new = [file for file in sorted(set(self.path.rglob("*")) - before) if file.is_file()]
        write_json(self.environment_file, identity.environment)
        files = {file.relative_to(self.path).as_posix(): file_digest(file) for file in (*new, self.environment_file)}
        self.write_images(identity.images)
        write_text(self.config_file, config_to_yaml(config))
        values = asdict(identity)
        del values["images"]
        write_json(self.identity_file, MADE_BY | values | {"files": files})

    def write_images(self, images: list[ImageFile]) -> None:
        """Remember which content each image file had."""
        write_text(self.images_file, to_lines(images))

    def read_identity(self) -> dict[str, Any]:
        """What :meth:`start` recorded. Raises :class:`RunError` when that is missing, damaged or of another program."""
        advice = "choose another output_dir"
        if not self.identity_file.exists():
            raise RunError(
                f"{self.path} has no run.json, so it is no run folder, or one of an older version, and is not "
                f"overwritten or resumed; {advice}"
            )
        values = read_json(self.identity_file, RunError, dict, fix=advice)
        if {key: values.get(key) for key in MADE_BY} != MADE_BY:
            raise RunError(f"{self.identity_file} was not written by this version of routingvl; {advice}")
        files = values.get("files")
        if not isinstance(files, dict) or any(".." in (p := PurePosixPath(f)).parts or p.is_absolute() for f in files):
            raise RunError(f"{self.identity_file} is damaged (files); {advice}")
        return values

    def identity(self) -> Identity:
        """The identity of the run here. Raises :class:`RunError`, also when its config.yaml was edited since."""
        values = self.read_identity()
        del values["files"], values["made_by"], values["format"]
        images: list[ImageFile] = []
        with suppress(OSError, ValueError, TypeError):
            images = from_lines(self.images_file.read_text(encoding="utf-8"))
        try:
            found = Identity(**values, images=images)
            found.check()
        except (TypeError, ValueError) as error:
            raise RunError(f"{self.identity_file} is damaged ({error}); start the run anew") from error
        return found

    def changed_files(self) -> list[str]:
        """Names of the task's files that were edited or deleted since the run began."""
        changed = []
        for name, digest in self.read_identity()["files"].items():
            try:
                same = file_digest(self.path / name) == digest
            except OSError:
                same = False
            if not same:
                changed.append(name)
        return changed


def _move(files: list[Path], source: Path, target: Path) -> None:
    """Move files to the same names below another folder, and remove the folders that are left empty."""
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    folders = {parent for file in files for parent in file.relative_to(source).parents} - {Path()}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        _remove_if_empty(source / folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
