"""One training loop for every task, on accelerate.

A step is one optimiser update over ``train.batch_size`` examples, however many processes and micro-batches share them.
The order of examples is a pure function of (seed, step), so a resumed run continues where it stood without replaying
data; and the loss of a step is the mean over all its supervised items, so accumulation changes memory but not the
gradient.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
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
from routingvl.data.files import DataError
from routingvl.interrupts import child_deaths_wait, message_of, signals_interrupt
from routingvl.tasks.base import Batch, Task
from routingvl.tasks.predictions import predict_dataset
from routingvl.training.accelerator import in_first_process
from routingvl.training.compile import compiled_inputs
from routingvl.training.log import Log, RunLog
from routingvl.training.resume import ResumableState, nonfinite
from routingvl.training.run_folder import RunError, RunFolder
from routingvl.training.schedule import BatchOrder, learning_rate_schedule, total_steps

PROGRESS = ("step", "logged_step", "validated_step", "best_step", "best")  # attributes that a resumed run takes up


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


class Trainer:
    """State and steps of one run; :func:`routingvl.train.train` is the way in.

    Args:
        config: the run.
        task: with its training data and model.
        accelerator: of the run.
        folder: the run's; nothing is written into it before :meth:`open_log`.
        example: a batch of one example, which stands in where a process has no readable image in a step.
    """

    def __init__(
        self, config: RunConfig, task: Task, accelerator: Accelerator, folder: RunFolder, example: Batch
    ) -> None:
        self.config, self.settings, self.task = config, config.train, task
        self.accelerator, self.folder, self.example = accelerator, folder, example
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
        self.step, self.logged_step, self.validated_step, self.best_step = 0, 0, 0, 0
        self.saved_step: int | None = None
        self.best: float | None = None
        # Sum of the losses since the last line of the log; it stays on the device until then.
        self.loss = torch.zeros((), device=accelerator.device)
        self.grad_norm: torch.Tensor | None = None
        self.skipped = task.skipped_images  # by what was tried before
        self.log: RunLog | None = None
        self.loader()  # refuses a batch size that cannot be shared out

    def set_state(self, run: str, resume: bool) -> list[dict[str, Any]]:
        """Seed the random generators or, to ``resume``, take the saved state of the run ``run``; its log so far."""
        training = (self.accelerator, self.trainable, self.optimizer, self.schedule)
        self.state = ResumableState(self.folder.state, run, self.steps, *training)
        set_seed(self.settings.seed)
        if not resume:
            return []
        values = self.state.load(self.loss)
        for name in PROGRESS:
            setattr(self, name, values[name])
        self.saved_step = self.step
        return values["history"]

    def open_log(self, log: Log, history: list[dict[str, Any]], notes: list[str]) -> None:
        """Continue the log after ``history``, with ``notes`` on how the run was opened."""
        self.log = RunLog(self.folder, self.config, self.accelerator, log, history)
        self.progress = not self.log.quiet and self.log.callback is None and sys.stderr.isatty()
        if self.best is not None and not self.folder.checkpoint("best").is_dir():
            self.best = None
            notes = [*notes, "best/ is gone: it will be the best adapter from here on"]
        for note in notes:
            self.log.warn(note)

    def close(self) -> None:
        """End the log."""
        if self.log is not None:
            self.log.close()

    def fit(self, stop: threading.Event) -> TrainResult:
        """Run the remaining steps, or those until ``stop`` is set."""
        begin = self.logged_time = time.perf_counter()
        report = self.task.model.report
        self.log.message(
            f"{self.config.task}: {len(self.task.train_set)} examples, {self.steps} steps of "
            f"{self.settings.batch_size} on {self.accelerator.num_processes} x {self.accelerator.device}; "
            f"{report.trainable:,} of {report.total:,} parameters train; run folder {self.folder.path}"
        )
        bar = tqdm(total=self.steps, initial=self.step, desc="train", disable=not self.progress, dynamic_ncols=True)
        if self.step and self.validated_step < self.step and self.validation_due():
            self.validate()  # the run ended between saving and the end of the validation
        loader = self.loader()
        batches = iter(loader)
        with bar, child_deaths_wait():
            self.stop_if_wanted(stop)
            while self.step < self.steps:
                self.train_step(self.micro_batches(batches, loader.num_workers))
                bar.update()
                validate, every = self.validation_due(), self.settings.save_every
                save = validate or (every is not None and self.step % every == 0)
                if save or self.step % self.settings.log_every == 0:
                    self.log_losses(bar)  # before saving, because it stops a run whose loss is no number
                if save:
                    self.save()
                if validate:
                    self.validate()
                self.stop_if_wanted(stop)
        if self.best is None and self.task.val_set is not None:
            self.log.warn("no validation succeeded: best/ is the last adapter")
            self.save_adapter("best")
        return self.result(time.perf_counter() - begin)

    def micro_batches(self, batches: Iterator[Batch | None], workers: int) -> list[Batch | None]:
        """Those of a step. Where they cannot be had, the steps so far are saved before the error is raised."""
        try:
            return [next(batches) for _ in range(self.settings.accumulation)]
        except Exception as error:
            if self.accelerator.num_processes == 1:  # the others know nothing of it, and would be waited for
                self.save()
            # What a worker raises comes with that word; anything else is the loss of one, however it was noticed.
            if workers and not str(error).startswith("Caught "):
                raise RunError(
                    f"a data worker was killed after step {self.step} ({error}); continue with --resume "
                    f"{self.folder.path}, with --data.workers 0 if memory was short"
                ) from error
            raise

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
            # All processes have to take part, so one without a readable image computes a gradient that counts nothing.
            counted = counted or [(self.example, 0)]
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
        """Whether ``eval_every`` steps, an epoch or the run ended with this step."""
        every = self.settings.eval_every
        if self.step == self.steps:
            return True
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

    def stop_if_wanted(self, stop: threading.Event) -> None:
        """Save and raise KeyboardInterrupt when the run was told to stop and is not through."""
        if self.step < self.steps and self.stop_wanted(stop):
            self.save()
            self.log.message(f"stopped at step {self.step}; continue with --resume {self.folder.path}")
            raise KeyboardInterrupt

    def validate(self) -> None:
        """Score the validation examples and keep the adapter when it is the best so far.

        The step has been saved, so a signal ends this at once, and any other failure is told and the run goes on.
        """
        if self.task.val_set is None:
            return
        begin = time.perf_counter()
        try:
            with signals_interrupt():
                scores = self.validation_scores()
        except Exception as error:
            self.log.warn(
                f"step {self.step}: validation failed, training goes on ({type(error).__name__}: {message_of(error)})"
            )
        else:
            value = scores[self.task.metric]
            self.log.record("validation", self.step, scores | {"seconds": time.perf_counter() - begin})
            self.log.message(f"step {self.step}: validation {self.task.metric} {value:.4f}")
            if self.best is None or value > self.best:
                self.best, self.best_step = value, self.step
                self.save_adapter("best")
        self.validated_step = self.step
        in_first_process(self.accelerator, lambda: self.state.save_progress(self.progress_values(), self.log.history))
        # Validation time is not training time.
        self.logged_time += time.perf_counter() - begin

    def validation_scores(self) -> dict[str, float]:
        """Scores on the validation examples, with a finite value of the task's metric, or an error of any kind.

        Every process gets the same.
        """
        beams, progress = self.config.eval.val_num_beams, self.progress
        with torch.compiler.set_stance("force_eager"):  # train.compile is for training alone
            predictions = predict_dataset(
                self.task, self.task.val_set, self.accelerator, num_beams=beams, progress=progress
            )

        def checked() -> dict[str, float]:
            if not predictions:
                raise DataError("no validation example has a readable image")
            scores = self.task.validation_scores(predictions)
            if not math.isfinite(scores[self.task.metric]):
                raise ValueError(f"{self.task.metric} is {scores[self.task.metric]}")
            return scores

        return in_first_process(self.accelerator, checked)

    def progress_values(self) -> dict[str, Any]:
        """What the state says of how far the run is."""
        return {name: getattr(self, name) for name in PROGRESS}

    def save_adapter(self, name: str) -> None:
        """Write the trained parameters into the run folder, file by file whole or not at all."""

        def write() -> None:
            if (folder := self.folder.checkpoint(name)).is_dir():
                self.model.save_pretrained(folder)  # the files of one run fit together at any moment
                return
            with replacing(folder) as path:
                self.model.save_pretrained(path)

        in_first_process(self.accelerator, write)

    def save(self) -> None:
        """Write the adapter called last and everything needed to continue exactly from here.

        Raises FloatingPointError, and writes nothing, when what was trained is no longer finite.
        """
        if self.saved_step == self.step:
            return
        if (name := nonfinite(self.state.tensors(self.loss))) is not None:
            kept = "nothing was saved" if self.saved_step is None else f"what was saved at step {self.saved_step} stays"
            raise FloatingPointError(
                f"{name} is no longer finite at step {self.step}, {kept}; lower train.lr or set train.max_grad_norm"
            )
        self.save_adapter("last")
        if self.task.val_set is None:
            self.save_adapter("best")
        self.state.save(self.progress_values(), self.log.history, self.loss)
        self.saved_step = self.step
        in_first_process(self.accelerator, self.folder.forget)

    def result(self, seconds: float) -> TrainResult:
        """What :meth:`fit` returns; the log of the first process is sent to every other."""
        report = self.task.model.report
        history = broadcast_object_list([self.log.history])[0]
        best = (self.task.metric, self.best, self.best_step)
        counts = (report.trainable, report.total, self.task.skipped_images - self.skipped)
        return TrainResult(self.folder.path, *best, self.step, history, seconds, *counts)
