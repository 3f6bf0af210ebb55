"""What the demo compares, and the settings that every variant shares.

A variant is a task, a PEFT method, a routing function, and whether the image also stands in front of the text as a
prefix. All variants of a task get the same steps, batch, rank and learning rates to choose from.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from routingvl.config import RoutingConfig
from routingvl.config.schema import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig, config_to_dict
from routingvl.demo.backbones import BackboneConfig
from routingvl.demo.shapes import ShapesConfig
from routingvl.kernels import ROUTINGS

METHOD_TITLES = {"lora": "LoRA", "adapter": "Adapter"}
SCORES = {"caption": "CIDEr", "vqa": "accuracy"}  # what the learning rate is chosen by, on validation


@dataclass(frozen=True)
class Variant:
    """One row of the comparison."""

    task: str
    method: str
    routing: str
    prefix: bool = True

    @property
    def title(self) -> str:
        return f"{METHOD_TITLES[self.method]} {self.routing}"

    @property
    def panel(self) -> tuple[str, str, bool]:
        """Variants of one panel are compared with each other."""
        return self.task, self.method, self.prefix


# Where every routing function would take too long: without two that lose to none in captioning (docs/demo.md).
FEWER_ROUTINGS = tuple(routing for routing in ROUTINGS if routing not in ("expand", "vllora"))
VARIANTS = (
    *(Variant("caption", "lora", routing) for routing in ROUTINGS),
    *(Variant("caption", "adapter", routing) for routing in FEWER_ROUTINGS),
    *(Variant("vqa", "lora", routing) for routing in ROUTINGS),
    *(Variant("caption", "lora", routing, prefix=False) for routing in FEWER_ROUTINGS),
)
QUICK_VARIANTS = (
    Variant("caption", "adapter", "none"),
    Variant("caption", "adapter", "mul"),
    Variant("vqa", "lora", "none"),
    Variant("vqa", "lora", "mul"),
)


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides a number of the demo, one value for all variants.

    Attributes:
        data: generated images, captions and questions.
        backbones: frozen networks and their pretraining.
        rank: bottleneck width r; alpha is set equal, so LoRA's factor is 1.
        steps: optimiser steps by task.
        batch: examples per step by task.
        validations: times a run is scored on validation; the best of them is the run's adapter.
        rates: learning rates by task that the search starts with, for every variant of the task.
        max_rates: the search widens the grid at most to so many learning rates.
        seeds: of the bottlenecks' initial values and the order of examples; the first is used to choose learning rates.
    """

    data: ShapesConfig = field(default_factory=ShapesConfig)
    backbones: BackboneConfig = field(default_factory=BackboneConfig)
    rank: int = 16
    steps: dict[str, int] = field(default_factory=lambda: {"caption": 500, "vqa": 800})
    batch: dict[str, int] = field(default_factory=lambda: {"caption": 48, "vqa": 64})
    validations: int = 4
    rates: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"caption": (5e-3, 1e-2, 2e-2), "vqa": (1.5e-3, 3e-3, 6e-3)}
    )
    max_rates: int = 6
    seeds: tuple[int, ...] = (0, 1, 2)

    def default_rate(self, task: str) -> float:
        """The learning rate of a variant that no search has tried: the middle one of a search's first rates."""
        return self.rates[task][len(self.rates[task]) // 2]


@dataclass(frozen=True)
class Job:
    """One training run: a variant at a learning rate, with a seed."""

    variant: Variant
    lr: float
    seed: int

    @property
    def title(self) -> str:
        prefix = "" if self.variant.prefix else ", no prefix"
        return f"{self.variant.task}: {self.variant.title}{prefix}, lr {self.lr:g}, seed {self.seed}"

    def name(self, with_rate: bool) -> str:
        """The run's folder, such as caption-lora-mul-seed0 or caption-lora-mul-noprefix-lr0.01-seed0."""
        variant = self.variant
        parts = [variant.task, variant.method, variant.routing]
        parts += [] if variant.prefix else ["noprefix"]
        parts += [f"lr{self.lr:g}"] if with_rate else []
        return "-".join([*parts, f"seed{self.seed}"])

    def run_config(self, settings: DemoSettings, work: str | Path, output_dir: str | Path) -> RunConfig:
        """The run as ``routingvl train`` takes it; ``work`` holds the data and the backbones."""
        variant, work = self.variant, Path(work)
        steps = settings.steps[variant.task]
        return RunConfig(
            task=variant.task,
            output_dir=str(output_dir),
            device="cpu",
            model=ModelConfig(
                vision=str(work / "backbones" / "vit"),
                text=str(work / "backbones" / ("gpt2" if variant.task == "caption" else "roberta")),
                visual_prefix=variant.prefix,
            ),
            routing=RoutingConfig(
                method=variant.method, routing=variant.routing, rank=settings.rank, alpha=settings.rank
            ),
            data=DataConfig(
                annotations=str(work / "annotations"), images=str(work / "data" / "Images"), precompute_features=True
            ),
            train=TrainConfig(
                lr=self.lr,
                max_steps=steps,
                batch_size=settings.batch[variant.task],
                seed=self.seed,
                # The order in which the published scores of the demonstration were trained.
                group_by_length=False,
                eval_every=max(1, steps // settings.validations),
                log_every=max(1, steps // 40),
            ),
            # Greedy decoding and the Python tokenizer: the same on every machine, with or without Java.
            eval=EvalConfig(
                batch_size=100,
                num_beams=1,
                max_new_tokens=20,
                metrics=("BLEU-4", "ROUGE_L", "CIDEr"),
                caption_tokenizer="python",
            ),
        )

    def key(self, settings: DemoSettings) -> str:
        """Digest of everything that decides this job's numbers, by which its result is found again."""
        content = {
            "data": asdict(settings.data),
            "backbones": asdict(settings.backbones),
            "run": config_to_dict(self.run_config(settings, "work", "run")),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def settings_to_dict(settings: DemoSettings) -> dict[str, Any]:
    """Plain values for a result file."""
    return json.loads(json.dumps(asdict(settings)))
