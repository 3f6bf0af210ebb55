"""The state of a run on the disk: everything that is needed to continue it exactly where it stood.

``state/training_state.safetensors`` holds the tensors, ``state/training_state.json`` the rest; neither can hold code.
Both are replaced together, and everything in them is checked before any of it is put to use.
"""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from routingvl.atomic_files import replacing, write_json
from routingvl.json_files import read_json
from routingvl.tensor_files import read_tensors
from routingvl.training.accelerator import in_first_process
from routingvl.training.run_folder import RunError

TENSORS, VALUES = "training_state.safetensors", "training_state.json"
FORMAT_VERSION = 1
ADVICE = "put the file back, or start the run anew"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter
COUNTS = ("step", "logged_step", "validated_step", "best_step")


@dataclass(frozen=True)
class ResumableState:
    """What of a run is saved and loaded, beside its progress (plain values, by name) and its log.

    Attributes:
        folder: of the two files.
        run: identifies the run, so that the state of another one is not taken for it.
        steps: of the whole run.
        accelerator: of the run; the first process writes, each has random generators of its own.
        trainable: the trained parameters, by name.
        optimizer: AdamW over these parameters, in this order.
        schedule: a function of how often it has stepped, nothing else.
    """

    folder: Path
    run: str
    steps: int
    accelerator: Accelerator
    trainable: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    schedule: LRScheduler

    def tensors(self, loss: Tensor) -> dict[str, Tensor]:
        """What is saved of the training itself: trained parameters, AdamW's moments, the sum of ``loss`` so far."""
        found = {"loss": loss} | {f"trainable/{name}": p.detach() for name, p in self.trainable.items()}
        for name, parameter in self.trainable.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{name}/{key}"] = value
        return found

    def save(self, progress: Mapping[str, Any], history: list[dict[str, Any]], loss: Tensor) -> None:
        """Write the state, whole or not at all; every process calls this.

        Args:
            progress: step, logged_step, validated_step, best_step and best.
            history: every record of metrics.jsonl.
            loss: the sum of the losses since the last of them, a scalar.
        """
        tensors, generators = self.tensors(loss), []
        for rank, (values, states) in enumerate(gather_object([random_state()])):
            generators.append(values)
            tensors |= {f"random/{rank}/{name}": state for name, state in states.items()}
        values = {"format": FORMAT_VERSION, "run": self.run, **progress, "schedule_steps": self.schedule.last_epoch}
        values |= {"scaler": self._scaler_state(), "random": generators, "history": history}

        def write() -> None:
            with replacing(self.folder) as folder:
                folder.mkdir()
                copies = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
                save_file(copies, folder / TENSORS, metadata=self._stamp(progress["step"]))
                (folder / VALUES).write_text(json.dumps(values), encoding="utf-8")

        in_first_process(self.accelerator, write)

    def save_progress(self, progress: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
        """Bring ``progress`` and ``history`` of the saved step up to date, after its validation."""
        values = json.loads((self.folder / VALUES).read_text(encoding="utf-8"))
        write_json(self.folder / VALUES, values | dict(progress) | {"history": history})

    def _stamp(self, step: int) -> dict[str, str]:
        return {"run": self.run, "step": str(step)}

    def _scaler_state(self) -> dict[str, Any] | None:
        return self.accelerator.scaler.state_dict() if self.accelerator.scaler else None

    # ------------------------------------------------------------------------------------------------------- loading

    def load(self, loss: Tensor) -> dict[str, Any]:
        """Put the saved state back, also into ``loss``, and return its values: progress and history among them.

        Raises :class:`RunError` naming file and entry when something in it cannot be of this run; nothing is changed.
        """
        values, tensors = self._read_values(), read_tensors(self.folder / TENSORS, RunError, floats=False)
        rank = self.accelerator.process_index
        self._check_values(values)
        with safe_open(self.folder / TENSORS, framework="pt") as file:
            stamp = file.metadata()
        self._require(
            stamp == self._stamp(values["step"]), TENSORS, "is not of the same step and run as the other file"
        )
        moments = self._check_tensors(tensors, values)
        try:
            states = {name.split("/", 2)[2]: t for name, t in tensors.items() if name.startswith(f"random/{rank}/")}
            before = random_state()
            try:
                set_random_state(values["random"][rank], states)
            except BaseException:
                set_random_state(*before)
                raise
        except (TypeError, ValueError, OverflowError, LookupError, RuntimeError) as error:
            raise RunError(f"{self.folder / VALUES}: random state {rank} is damaged ({error}); {ADVICE}") from error
        with torch.no_grad():
            loss.copy_(tensors["loss"])
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[f"trainable/{name}"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self._set_schedule(values["schedule_steps"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        return values

    def _set_schedule(self, steps: int) -> None:
        """The learning rate after ``steps`` steps, from the settings."""
        self.schedule.last_epoch, self.schedule._step_count = steps - 1, steps
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimiser's steps of before
            self.schedule.step()

    def _read_values(self) -> dict[str, Any]:
        values = read_json(self.folder / VALUES, RunError, dict, fix=ADVICE, nan=True)
        self._require(values.get("format") == FORMAT_VERSION, VALUES, "has another format")
        return values

    def _check_values(self, values: Mapping[str, Any]) -> None:
        self._require(values.get("run") == self.run, VALUES, "is of another run")
        step = values.get("step")
        for name, most in [("step", self.steps), *((name, step) for name in (*COUNTS[1:], "schedule_steps"))]:
            self._require(_is_count(values.get(name), most), VALUES, f"{name}={values.get(name)!r} is impossible")
        best = values.get("best", "missing")
        self._require(best is None or _is_number(best), VALUES, f"best={best!r} is no number")
        generators = values.get("random")
        count = self.accelerator.num_processes
        fits = isinstance(generators, list) and len(generators) == count
        self._require(fits, VALUES, f"does not have the random state of {count} processes")
        scaler, found = self._scaler_state(), values.get("scaler", "missing")
        fits = found == scaler or (
            isinstance(scaler, dict) and isinstance(found, dict) and scaler.keys() == found.keys()
        )
        self._require(fits and all(map(_is_number, (found or {}).values())), VALUES, "scaler does not fit")
        history = values.get("history")
        fits = isinstance(history, list) and all(
            isinstance(r, dict) and isinstance(r.get("kind"), str) and _is_count(r.get("step"), step) for r in history
        )
        self._require(fits, VALUES, "history is damaged")

    def _check_tensors(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[int, dict[str, Tensor]]:
        """AdamW's state, by the number of the parameter; RunError unless every tensor is what it should be."""
        wanted: dict[str, Any] = {"loss": torch.zeros(())}
        moments: dict[int, dict[str, Tensor]] = {}
        for number, (name, parameter) in enumerate(self.trainable.items()):
            wanted[f"trainable/{name}"] = parameter
            keys = [f"optimizer/{name}/{key}" for key in MOMENTS]
            if any(key in tensors for key in keys):  # none for a parameter that no loss has reached yet
                wanted |= dict(zip(keys, (torch.zeros(()), parameter, parameter), strict=True))
                moments[number] = {key: tensors.get(f"optimizer/{name}/{key}") for key in MOMENTS}
        for rank in range(self.accelerator.num_processes):
            wanted |= {f"random/{rank}/{name}": state for name, state in random_state()[1].items()}
        # Another machine may have other GPUs: their random state is then of no use.
        present = {name for name in tensors if not name.startswith("random/") or name in wanted}
        absent = {name for name in wanted if not (name.startswith("random/") and "cuda" in name)} - present
        wrong = [f"{name} is missing" for name in sorted(absent)]
        wrong += [f"{name} is unknown" for name in sorted(present - wanted.keys())]
        for name in sorted(present & wanted.keys()):
            have, want = tensors[name], wanted[name]
            if have.shape != want.shape or have.dtype != want.dtype:
                wrong.append(f"{name} is {have.dtype} {list(have.shape)}, not {want.dtype} {list(want.shape)}")
            elif have.is_floating_point() and not torch.isfinite(have).all():
                wrong.append(f"{name} is not finite")
            elif name.endswith("/exp_avg_sq") and (have < 0).any():
                wrong.append(f"{name} is negative")
            elif name.startswith("optimizer/") and name.endswith("/step") and not 1 <= have.item() <= values["step"]:
                wrong.append(f"{name} is {have.item()}")
        self._require(not wrong, TENSORS, f"does not fit this run: {'; '.join(wrong[:3])}")
        return moments

    def _require(self, fits: bool, name: str, problem: str) -> None:
        if not fits:
            raise RunError(f"{self.folder / name} {problem}; {ADVICE}")


def nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor with NaN or infinite values; None when all are finite. Waits for the device once."""
    device = next(iter(tensors.values())).device
    finite = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in tensors.values()])
    return None if finite.all() else list(tensors)[int(finite.logical_not().nonzero()[0])]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, most: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and isinstance(most, int) and 0 <= value <= most


def random_state() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """State of every random generator: those of Python and numpy as plain values, torch's as tensors by name."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    values = {
        "python": list(random.getstate()[1]),
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
    }
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return values, {"torch": torch.get_rng_state()} | {f"cuda/{i}": state for i, state in enumerate(devices)}


def set_random_state(values: Mapping[str, Any], states: Mapping[str, Tensor]) -> None:
    """Put back what :func:`random_state` read; that of GPUs only where there are as many."""
    random.setstate((3, tuple(values["python"]), None))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    devices = [state for name, state in states.items() if name != "torch"]
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)
