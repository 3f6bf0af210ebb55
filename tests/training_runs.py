"""Training runs on the tiny inputs, and what tests look at in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import tiny_config

from routingvl.train import TrainResult, train


def run(tiny: Path, output: Path, task: str, log="quiet", resume=False, overwrite=False, **settings) -> TrainResult:
    """Train on the inputs in ``tiny`` into the folder ``output``; ``settings`` as of :func:`tiny.tiny_config`."""
    return train(tiny_config(tiny, output, task, **settings), log=log, resume=resume, overwrite=overwrite)


def losses(result: TrainResult) -> list[float]:
    """The training losses that a run has logged."""
    return [record["loss"] for record in result.history if record["kind"] == "train"]


def weights(run_dir: Path, name: str = "last") -> dict[str, torch.Tensor]:
    """The trained weights in a run folder, "last" or "best"."""
    return load_file(run_dir / name / "adapter_model.safetensors")


def assert_same_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    """Equal to the bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
