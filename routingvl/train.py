"""Training from Python: ``train(config)``, what ``routingvl train`` calls.

Everything that can be wrong is checked here before the first step; the loop itself is routingvl/training/loop.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from routingvl.backbones.loading import hide_loading_bars
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig
from routingvl.tasks.base import build_task, find_task
from routingvl.training.accelerator import make_accelerator
from routingvl.training.compile import compiled, compiler_obstacle
from routingvl.training.log import Log, check_trackers
from routingvl.training.loop import Trainer, TrainResult
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
        config: the run; paths in it are checked before anything else happens.
        model: a model of this library to train in place of the one ``config.model`` describes.
        tokenizer: a tokenizer in place of the one ``config.model`` names.
        log: None shows messages (and progress bars on a terminal), "quiet" nothing; a function gets each record.
        resume: continue the run in ``config.output_dir`` from its last saved state, bit for bit.
        overwrite: replace the run folder when it is not empty.

    Raises:
        ConfigError: a path is missing or a setting cannot work here.
        RunError: the run folder is occupied, or cannot be resumed.
        FloatingPointError: the loss is no longer a number.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the state of the last complete step is saved.
    """
    if isinstance(log, str) and log != "quiet":
        raise ConfigError(f"log={log!r} must be None, 'quiet' or a function of one record")
    if resume and overwrite:
        raise ConfigError("resume continues a run and overwrite replaces it; choose one")
    find_task(config.task)
    config.check_files()
    config = config.absolute()
    folder = RunFolder(Path(config.output_dir))
    if resume:
        folder.check_resumable(config)
    else:
        folder.check_free(overwrite=overwrite)
    hide_loading_bars(log is not None)
    check_trackers(config.train.trackers)
    accelerator = make_accelerator(config, config.train.trackers)
    if config.train.compile and (reason := compiler_obstacle(accelerator.device)):
        raise ConfigError(f"train.compile=true: {reason}, or set train.compile=false")
    set_seed(config.train.seed)
    task = build_task(config, model=model, tokenizer=tokenizer, device=accelerator.device)
    # From here on everything has been read and fits; what stood in the folder may go.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not resume:
        folder.start(config)
        task.save_files(folder.path)
    through_compiler = compiled(task.model) if config.train.compile else nullcontext()
    with through_compiler, frozen_weights_lowered(task.model, accelerator, keep=model is not None):
        trainer = Trainer(config, task, accelerator, folder, log, resume)
        try:
            return trainer.fit()
        finally:
            trainer.log.close()
            # The caller's model object must not keep accelerate's wrappers.
            accelerator.unwrap_model(trainer.wrapped, keep_fp32_wrapper=False)
