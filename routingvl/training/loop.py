"""One training loop for every task, on accelerate.

A step is one optimiser update over ``train.batch_size`` examples, however many processes and micro-batches share them.
The order of examples is a pure function of (seed, step), so a resumed run continues where it stood without replaying
data; and the loss of a step is the mean over all its supervised items, so accumulation changes memory but not the
gradient.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from routingvl.atomic_files import replacing
from routingvl.config.schema import RunConfig
from routingvl.tasks.base import Task
from routingvl.tasks.predictions import predict_dataset
from routingvl.training.compile import compiled_inputs
from routingvl.training.log import Log, RunLog
from routingvl.training.resume import ResumableState
from routingvl.training.run_folder import RunFolder
from routingvl.training.schedule import BatchOrder, learning_rate_schedule, total_steps


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves in memory; the same is in its folder.

    Attributes:
        metric, best_metric, best_step: the validation metric that chose the best checkpoint, its best value (None
            without validation), and when.
        steps: optimiser steps done, those before a resume included.
        history: every record of metrics.jsonl, in order.
        seconds: wall time of this call, from the first step to the last save.
        trainable, total: number of parameters that train, and of all in the language model and its head.
        skipped_images: unreadable images that were left out.
    """

    run_dir: Path
    metric: str
    best_metric: float | None
    best_step: int
    steps: int
    history: list[dict[str, Any]] = field(repr=False)
    seconds: float
    trainable: int
    total: int
    skipped_images: int


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into a set event, so that a step is never torn; a second one acts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def request(number: int, frame: Any) -> None:
        event.set()
        restore()

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        restore()


class Trainer:
    """State and steps of one run; :func:`routingvl.train.train` is the way in."""

    def __init__(
        self, config: RunConfig, task: Task, accelerator: Accelerator, folder: RunFolder, log: Log, resume: bool
    ) -> None:
        self.config, self.settings, self.task = config, config.train, task
        self.accelerator, self.folder = accelerator, folder
        self.model = task.model.to(accelerator.device)
        self.trainable = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.steps = total_steps(self.settings, len(task.train_set))
        optimizer = torch.optim.AdamW(
            self.trainable.values(),
            **{name: getattr(self.settings, name) for name in ("lr", "betas", "eps", "weight_decay")},
            # Bottlenecks are many small tensors: on a CPU the fused update saves several calls for each.
            fused=accelerator.device.type == "cpu" or None,
        )
        self.schedule = learning_rate_schedule(optimizer, self.settings, self.steps)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.state = ResumableState(folder.state_file, accelerator, self.trainable, self.optimizer, self.schedule)
        self.step, self.saved_step, self.logged_step, self.best_step = 0, -1, 0, 0
        self.best: float | None = None
        # Sum of the losses since the last line of the log; it stays on the device until then.
        self.loss = torch.zeros((), device=accelerator.device)
        self.grad_norm: torch.Tensor | None = None
        set_seed(self.settings.seed)
        if resume:
            self.resume()
        self.logged_time = time.perf_counter()
        self.log = RunLog(folder, config, accelerator, log, self.step if resume else None)
        self.progress = not self.log.quiet and self.log.callback is None and sys.stderr.isatty()

    def fit(self) -> TrainResult:
        """Run the remaining steps."""
        begin = time.perf_counter()
        report = self.task.model.report
        self.log.message(
            f"{self.config.task}: {len(self.task.train_set)} examples, {self.steps} steps of "
            f"{self.settings.batch_size} on {self.accelerator.num_processes} x {self.accelerator.device}; "
            f"{report.trainable:,} of {report.total:,} parameters train; run folder {self.folder.path}"
        )
        bar = tqdm(total=self.steps, initial=self.step, desc="train", disable=not self.progress, dynamic_ncols=True)
        with stop_request() as stop, bar:
            batches = iter(self.loader())
            while self.step < self.steps:
                self.train_step([next(batches) for _ in range(self.settings.accumulation)])
                bar.update()
                last, every = self.step == self.steps, self.settings.save_every
                validate = last or self.validation_due()
                save = validate or (every is not None and self.step % every == 0)
                if save or self.step % self.settings.log_every == 0:
                    self.log_losses(bar)  # before saving, because it stops a run whose loss is no number
                if validate:
                    self.validate()
                if save:
                    self.save()
                if not last and self.stop_wanted(stop):
                    self.save()
                    self.log.message(f"stopped at step {self.step}; continue with --resume {self.folder.path}")
                    raise KeyboardInterrupt
        return self.result(time.perf_counter() - begin)

    def loader(self) -> DataLoader:
        """Micro-batches of the remaining steps for this process."""
        data, own = self.task.train_set, (self.accelerator.process_index, self.accelerator.num_processes)
        order = BatchOrder(len(data), self.settings, self.step, self.steps, *own, data.tokens.lengths)
        return self.task.loader(data, order)

    def train_step(self, micro_batches: list[dict[str, Any] | None]) -> None:
        """One optimiser update; reads nothing back from the device."""
        if not self.model.training:  # at the start and after each validation
            self.wrapped.train()
        processes = self.accelerator.num_processes
        # One may be None, where on_bad_image="skip" dropped all its examples.
        counted = [(batch, self.task.supervised_items(batch)) for batch in micro_batches if batch is not None]
        own = sum(count for _, count in counted)
        items: int | torch.Tensor = max(1, own)
        if processes > 1:
            if not counted:
                raise RuntimeError("every image of a batch is unreadable; repair the image folder")
            # Nothing goes to the device for one process: the copy would wait for it.
            items = self.accelerator.reduce(torch.tensor(own, device=self.accelerator.device)).clamp_(min=1)
        for i, (batch, count) in enumerate(counted, start=1):
            synchronise = i == len(counted)
            with nullcontext() if synchronise else self.accelerator.no_sync(self.wrapped):
                # Several processes average their gradients, so each weight is scaled back up to a sum.
                weight = count * processes / items
                inputs = self.task.training_inputs(batch, self.accelerator.device)
                if self.settings.compile:
                    inputs = compiled_inputs(self.model, inputs)
                loss = self.wrapped(**inputs).loss * weight
                self.accelerator.backward(loss)
                self.loss += loss.detach() / processes
        if counted:
            if self.settings.max_grad_norm is not None:
                self.grad_norm = self.accelerator.clip_grad_norm_(self.trainable.values(), self.settings.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.step += 1

    def log_losses(self, bar: tqdm) -> None:
        """Read the losses since the last line back from the device and record their mean."""
        steps, now = self.step - self.logged_step, time.perf_counter()
        loss = self.accelerator.reduce(self.loss).item() / steps
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} at step {self.step}; lower train.lr, set train.max_grad_norm, "
                "or use train.mixed_precision=no"
            )
        values = {"loss": loss, "lr": self.schedule.get_last_lr()[0], "epoch": self.epoch(self.step)}
        if self.grad_norm is not None:
            values["grad_norm"] = float(self.grad_norm)
        values["examples_per_second"] = steps * self.settings.batch_size / max(now - self.logged_time, 1e-9)
        self.log.record("train", self.step, values)
        bar.set_postfix(loss=f"{loss:.4f}")
        self.loss.zero_()
        self.logged_step, self.logged_time = self.step, now

    def epoch(self, step: int) -> float:
        """Passes over the training examples after ``step`` steps."""
        return step * self.settings.batch_size / len(self.task.train_set)

    def validation_due(self) -> bool:
        """Whether ``eval_every`` steps, or an epoch, ended with this step."""
        every = self.settings.eval_every
        if every is None:
            return int(self.epoch(self.step)) > int(self.epoch(self.step - 1))
        return every > 0 and self.step % every == 0

    def stop_wanted(self, stop: threading.Event) -> bool:
        """Whether any process was told to stop.

        Several processes must agree, or some would wait forever; asking waits for the device, so they do it at the
        steps of the log only.
        """
        if self.accelerator.num_processes == 1:
            return stop.is_set()
        if self.step % self.settings.log_every:
            return False
        flag = torch.tensor(int(stop.is_set()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag).item())

    def validate(self) -> None:
        """Score the validation examples and keep the adapter when it is the best so far."""
        if self.task.val_set is None:
            return
        begin = time.perf_counter()
        with torch.compiler.set_stance("force_eager"):  # train.compile is for training alone
            beams, progress = self.config.eval.val_num_beams, self.progress
            predictions = predict_dataset(
                self.task, self.task.val_set, self.accelerator, num_beams=beams, progress=progress
            )
        scores = self.task.validation_scores(predictions)
        value = scores[self.task.metric]
        self.log.record("validation", self.step, scores | {"seconds": time.perf_counter() - begin})
        self.log.message(f"step {self.step}: validation {self.task.metric} {value:.4f}")
        if self.best is None or value > self.best:
            self.best, self.best_step = value, self.step
            self.save_adapter("best")
        # Validation time is not training time.
        self.logged_time += time.perf_counter() - begin

    def save_adapter(self, name: str) -> None:
        """Write the trained parameters into the run folder, whole or not at all."""
        if self.accelerator.is_main_process:
            with replacing(self.folder.checkpoint(name)) as path:
                self.model.save_pretrained(path)

    def save(self) -> None:
        """Write the adapter called last and everything needed to continue exactly from here."""
        if self.saved_step == self.step:
            return
        self.save_adapter("last")
        if self.task.val_set is None:
            self.save_adapter("best")
        progress = {name: getattr(self, name) for name in ("step", "best", "best_step", "loss", "logged_step")}
        self.state.save(progress)
        self.saved_step = self.step

    def resume(self) -> None:
        """Continue from the saved state of this run folder."""
        progress = self.state.load()
        self.loss.copy_(progress["loss"])
        for name in ("step", "best", "best_step", "logged_step"):
            setattr(self, name, progress[name])
        self.saved_step = self.step

    def result(self, seconds: float) -> TrainResult:
        """What :meth:`fit` returns; the log of the first process is sent to every other."""
        report = self.task.model.report
        history = broadcast_object_list([self.log.history])[0]
        best = (self.task.metric, self.best, self.best_step)
        counts = (report.trainable, report.total, self.task.skipped_images)
        return TrainResult(self.folder.path, *best, self.step, history, seconds, *counts)
