"""What is measured together, as data: a suite is one command's worth of cases, dtypes, clocks and providers."""

from __future__ import annotations

from dataclasses import dataclass

from .layer_providers import PROVIDERS


@dataclass(frozen=True)
class Plan:
    """One pass over the cases.

    Attributes:
        dtype: key of benchmarks.layer_cases.DTYPES; half types run under autocast.
        dropout: of the inputs of LoRA layers; cases that have none are left out of a pass with dropout.
        clock: as in benchmarks.timing, None for the device's default.
        compiled: whether what torch.compile makes takes part.
        pure: half types without autocast: tensors and weights have the dtype itself. Of layers only.
    """

    dtype: str = "float32"
    dropout: float = 0.0
    clock: str | None = None
    compiled: bool = True
    pure: bool = False


@dataclass(frozen=True)
class Suite:
    """A command's defaults.

    Attributes:
        device: torch device.
        repeats: of every measurement of a layer.
        model_repeats: likewise of a whole model, which takes longer.
        plans: the passes, the most telling first; all cases of layers are before those of models.
        time_limit: seconds after which nothing new is begun (None: no limit); nothing is compiled after half of them.
        quick: the cases marked quick only.
        providers: names of benchmarks.layer_providers.PROVIDERS.
        graphs: whether forward and backward pass are timed as a CUDA graph too.
    """

    device: str
    repeats: int
    model_repeats: int
    plans: tuple[Plan, ...]
    time_limit: float | None = None
    quick: bool = False
    providers: tuple[str, ...] = PROVIDERS
    graphs: bool = False


SUITES = {
    "quick": Suite(
        "cpu", 5, 3, (Plan(),), time_limit=150, quick=True, providers=("base", "reference", "peft", "eager", "triton")
    ),
    "cpu": Suite("cpu", 20, 7, (Plan(), Plan(dropout=0.1, compiled=False))),
    "gpu": Suite(
        "cuda",
        30,
        15,
        (
            Plan("bfloat16", clock="gpu", pure=True),
            Plan("bfloat16", clock="gpu"),
            Plan("bfloat16", clock="wall", compiled=False),
            Plan("bfloat16", dropout=0.1, clock="gpu", compiled=False),
            Plan("float32", clock="gpu", compiled=False),
        ),
        time_limit=450,
    ),
}
