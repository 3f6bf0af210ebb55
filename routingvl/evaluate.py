"""A run folder in; predictions in the form that servers take, and every metric that can run, out."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from routingvl.atomic_files import write_json
from routingvl.backbones.loading import hide_loading_bars
from routingvl.config import ConfigError, check_choice
from routingvl.config.schema import DataConfig, RunConfig, changed_settings, override
from routingvl.data.files import DataError
from routingvl.environment import environment
from routingvl.tasks.base import Task, load_task
from routingvl.tasks.controls import CONTROLS, ImageControl
from routingvl.tasks.predictions import predict_dataset
from routingvl.training.accelerator import make_accelerator
from routingvl.training.run_folder import RunFolder

# What evaluation may change; everything else was decided when the run was trained.
FREE_IN_EVALUATION = ("data.", "eval.", "device", "model.backend", "train.mixed_precision")
MOVED = ("vision", "text")  # backbones, by their settings of ``model``: other places are taken for the same content


def evaluate(
    run_dir: str | Path,
    split: str = "test",
    *,
    checkpoint: str = "best",
    output: str | Path | None = None,
    limit: int | None = None,
    image_control: str | None = None,
    log: str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Score a run on a split; nothing that the run was trained with is repeated.

    Writes ``metrics.json`` and the predictions, in the form that the task has for them, into ``output``, by default
    ``run_dir/eval-<split>``, with ``-<image_control>`` at its end where there is one.

    Args:
        run_dir: folder of a training run.
        split: name of the split, as in ``data.train_split``.
        checkpoint: "best" or "last".
        output: folder for the results.
        limit: only the first so many examples.
        image_control: "shuffled", "zeros", "ones" or "noise" puts something else in the place of each example's image,
            see :class:`routingvl.tasks.controls.ImageControl`.
        log: "quiet" shows no progress bar.
        **overrides: settings of ``data``, ``eval``, ``device`` or ``model.backend`` to change, by dotted name or last
            part (``num_beams=1``), and new places of backbones that have moved (``model.vision``, ``model.text``).

    Returns:
        The metrics (see :meth:`routingvl.tasks.base.Task.scores`), the same in every process, with ``split``,
        ``checkpoint``, ``image_control`` (where asked for), ``seconds``, ``examples_per_second``, ``skipped``
        (unreadable images left out) and ``predictions`` (path of the file).

    Raises:
        RunError: there is no such run or checkpoint.
        CheckpointError: a file of the run is damaged, or a backbone is another one than it was trained with.
        ConfigError: an override or control is unknown, the override is fixed by the run, ``limit`` is below 1, or
            ``output`` is no folder.
        OSError: nothing can be written into ``output``, which is tried before anything is computed.
    """
    folder = RunFolder(Path(run_dir))
    config = evaluation_config(folder, **overrides)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1; leave it out for all examples")
    if image_control is not None:
        check_choice("image_control", image_control, CONTROLS)
    config.check_files()
    name = f"eval-{split}" if image_control is None else f"eval-{split}-{image_control}"
    target = Path(output) if output is not None else folder.path / name
    for part in (folder.path, folder.checkpoint("best"), folder.checkpoint("last"), folder.state):
        if target.resolve() == part.resolve():
            raise ConfigError(f"{target} is a part of the run, whose files change with it; name another folder")
    check_place(target)
    hide_loading_bars(log == "quiet")
    task, accelerator = load_run(folder, checkpoint, config)
    loaded = task.load_split(split, limit)
    if not getattr(loaded, "split_in_file", True):
        check_other_file(config.data, folder.load_config().data, split)
    task.precompute(loaded.images)
    dataset = task.dataset(loaded, training=False)
    dataset.check_images()
    if image_control is not None:
        dataset = ImageControl(dataset, task, image_control)
    begin = time.perf_counter()
    progress = log != "quiet" and sys.stderr.isatty()
    predictions = predict_dataset(task, dataset, accelerator, num_beams=config.eval.num_beams, progress=progress)
    seconds = time.perf_counter() - begin
    metrics: dict[str, Any] = {"split": split, "checkpoint": checkpoint}
    if image_control is not None:
        metrics["image_control"] = image_control
    if accelerator.is_main_process:
        target.mkdir(parents=True, exist_ok=True)
        # Before scoring, so that no failure there costs the predictions.
        file = task.write_predictions(target, split, folder.path.name, predictions)
        try:
            metrics |= task.scores(loaded, predictions)
        except Exception as error:
            reason = f"scoring failed ({type(error).__name__}: {error}); the predictions are in {file}"
            metrics |= {"n": len(predictions), "missing": {"scores": reason}}
        metrics |= {
            "skipped": len(dataset) - len(predictions),
            "seconds": seconds,
            "examples_per_second": len(predictions) / seconds,
            "predictions": str(file),
        }
        write_json(target / "metrics.json", metrics | {"environment": environment()})
    return broadcast_object_list([metrics])[0]


def check_other_file(data: DataConfig, learned: DataConfig, split: str) -> None:
    """Raise :class:`DataError` when a file that names no split is to serve as another one than it was trained as."""
    known = split == learned.train_split or data.allow_shared_splits
    if not known and os.path.realpath(data.annotations) == os.path.realpath(learned.annotations):
        raise DataError(
            f"the run was trained on {data.annotations}, which names no splits, so it cannot serve as {split!r} too: "
            f"give data.annotations another file, --split {learned.train_split}, or data.allow_shared_splits=true"
        )


def check_place(folder: Path) -> None:
    """Raise ConfigError or OSError, naming it, unless files can be written into ``folder``; leaves nothing there."""
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        what = "a file" if there.exists() else "a link to nothing"
        raise ConfigError(f"{there} is {what}; choose another folder for the results")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def load_run(folder: RunFolder, checkpoint: str, config: RunConfig) -> tuple[Task, Accelerator]:
    """The task of a run with its model, under a config of :func:`evaluation_config`, and the accelerator it is on."""
    adapter, trained, accelerator = folder.adapter(checkpoint), folder.load_config().model, make_accelerator(config)
    folder.check_unchanged()
    places = {name: getattr(config.model, name) for name in MOVED}
    moved = {name: place for name, place in places.items() if place != getattr(trained, name)}
    return load_task(folder.path, adapter, config, accelerator.device, moved), accelerator


def evaluation_config(folder: RunFolder, **overrides: Any) -> RunConfig:
    """The config of a run with some settings of evaluation changed; raises ConfigError for one that training fixed."""
    trained = folder.load_config()
    config = override(trained, **overrides)
    for key in changed_settings(trained, config):
        if not key.startswith(FREE_IN_EVALUATION) and key not in [f"model.{name}" for name in MOVED]:
            raise ConfigError(f"{key} is fixed by the run {folder.path}; train another run to change it")
    return config
