"""The state file of a run: everything that is needed to continue it exactly where it stood."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from routingvl.atomic_files import replacing
from routingvl.config import ConfigError


@dataclass(frozen=True)
class ResumableState:
    """What of a run is saved and loaded, beside its progress (plain values and tensors, by name).

    Attributes:
        path: the state file.
        accelerator: of the run; the first process writes, each has random generators of its own.
        trainable: the trained parameters, by name.
        optimizer, schedule: of these parameters.
    """

    path: Path
    accelerator: Accelerator
    trainable: Mapping[str, nn.Parameter]
    optimizer: Optimizer
    schedule: LRScheduler

    def save(self, progress: Mapping[str, Any]) -> None:
        """Write the state and ``progress``, whole or not at all; every process calls this."""
        scaler = self.accelerator.scaler
        state = {
            **progress,
            "trainable": {name: p.detach() for name, p in self.trainable.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "rng": gather_object([random_state()]),
        }
        if self.accelerator.is_main_process:
            with replacing(self.path) as path:
                torch.save(state, path)

    def load(self) -> dict[str, Any]:
        """Put the saved state back and return the whole of it, with the progress.

        The random generators are put back only where as many processes run as did then. Raises :class:`ConfigError`
        when the file is of a model with other trained parameters.
        """
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        if differing := set(self.trainable) ^ set(state["trainable"]):
            raise ConfigError(f"{self.path} is of another model; it differs in {sorted(differing)[:3]}")
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(state["trainable"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.accelerator.num_processes == len(state["rng"]):
            set_random_state(state["rng"][self.accelerator.process_index])
        return state


def random_state() -> dict[str, Any]:
    """State of every random generator, as plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": list(random.getstate()[1]),
        "numpy": [name, [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what :func:`random_state` read."""
    random.setstate((3, tuple(state["python"]), None))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
