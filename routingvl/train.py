"""Training from Python: ``train(config)``, what ``routingvl train`` calls.

Everything that can be wrong is checked here before the first step; the loop itself is routingvl/training/loop.py.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from routingvl.backbones.loading import hide_loading_bars
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig
from routingvl.interrupts import stop_request
from routingvl.tasks.base import build_task, find_task
from routingvl.training.accelerator import in_first_process, make_accelerator
from routingvl.training.compile import compiled, compiler_obstacle
from routingvl.training.log import Log, check_trackers
from routingvl.training.loop import Trainer, TrainResult
from routingvl.training.opening import Opening, try_example
from routingvl.training.precision import frozen_weights_lowered
from routingvl.training.run_folder import RunFolder

__all__ = ["TrainResult", "train"]


def train(
    config: RunConfig,
    *,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    log: Log = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainResult:
    """Train the bottlenecks of ``config`` and leave a complete run folder at ``config.output_dir``.

    Args:
        config: the run; all that it needs is read and tried before the run folder is touched.
        model: a model of this library to train in place of the one ``config.model`` describes.
        tokenizer: a tokenizer in place of the one ``config.model`` names.
        log: None shows messages (and progress bars on a terminal), "quiet" nothing; a function gets each record.
        resume: continue the run in ``config.output_dir`` from its last saved state, bit for bit; refused when data,
            backbones or settings that decide its result are not those it began with.
        overwrite: replace the run in the folder, once this one has saved; files that no run wrote stay.

    Raises:
        ConfigError: a path is missing or a setting cannot work here.
        RunError: the run folder is occupied, in use by another process, or cannot be resumed; or a data worker died.
        FloatingPointError: the loss or a weight is no longer finite; what was saved before stays.
        OSError: a file cannot be written (full disk).
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once the state of the last complete step is saved.
    """
    if isinstance(log, str) and log != "quiet":
        raise ConfigError(f"log={log!r} must be None, 'quiet' or a function of one record")
    if resume and overwrite:
        raise ConfigError("resume continues a run and overwrite replaces it; choose one")
    find_task(config.task)
    config.check_files()
    config = config.absolute()
    folder = RunFolder(Path(config.output_dir))
    check = partial(folder.check_resumable if resume else partial(folder.check_free, overwrite=overwrite), config)
    hide_loading_bars(log is not None)
    check_trackers(config.train.trackers)
    accelerator = make_accelerator(config, config.train.trackers)
    if config.train.compile and (reason := compiler_obstacle(accelerator.device)):
        raise ConfigError(f"train.compile=true: {reason}, or set train.compile=false")
    with ExitStack() as held:

        def lock() -> None:
            held.enter_context(folder.locked())
            check()  # again, because another run may have been here since

        def lock_if_there() -> bool:
            check()
            if there := folder.path.is_dir():
                lock()
            return there

        locked = in_first_process(accelerator, lock_if_there)  # before anything is loaded
        set_seed(config.train.seed)
        task = build_task(config, model=model, tokenizer=tokenizer, device=accelerator.device)
        example = try_example(task, accelerator)
        opening = Opening(folder, config, task, resume)
        run = in_first_process(accelerator, partial(opening.identify, accelerator.num_processes))
        if config.train.compile:
            held.enter_context(compiled(task.model))
        held.enter_context(frozen_weights_lowered(task.model, accelerator, keep=model is not None))
        trainer = Trainer(config, task, accelerator, folder, example)
        # The caller's model object must not keep accelerate's wrappers.
        held.callback(accelerator.unwrap_model, trainer.wrapped, keep_fp32_wrapper=False)
        # From here on everything has been read and fits: the folder appears, and what stood in it may go.
        with stop_request() as stop:
            if not locked:
                in_first_process(accelerator, lock)
            try:
                history = trainer.set_state(run, resume)
                notes = in_first_process(accelerator, opening.begin)
                trainer.open_log(log, history, notes)
                return trainer.fit(stop)
            finally:
                if accelerator.is_main_process and trainer.saved_step is None:
                    folder.put_back()  # the older run, if there was one
                trainer.close()
