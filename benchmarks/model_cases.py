"""Whole models that are measured, as data: a published recipe's step, its training, its generation."""

from __future__ import annotations

from dataclasses import dataclass

from routingvl.kernels import ROUTINGS

from .layer_cases import GPU


@dataclass(frozen=True)
class ModelCase:
    """A model, what is done with it, and its sizes.

    Attributes:
        name: unique name, the key in result files.
        level: "step" (forward and backward pass, features given), "train" (whole training steps against the published
            recipe's), "generate" (beam search).
        task: "vqa" (RoBERTa) or "caption" (GPT-2).
        size: key of benchmarks.random_models.SIZES.
        B, T, R: batch, tokens of every text (of the published recipe's texts at level "train"), rank of the LoRA.
        routings: the routing functions measured.
        beams, tokens: of level "generate", which writes captions of this many tokens.
        vit: whether the ViT is timed too, beside the first routing, as none changes it.
        quick: the routings measured in the suite "quick".
        devices: the types of device whose suites have the case; ``--case`` runs it anywhere.
    """

    name: str
    level: str
    task: str
    size: str
    B: int
    T: int = 0
    R: int = 128
    routings: tuple[str, ...] = ("add",)
    beams: int = 0
    tokens: int = 0
    vit: bool = False
    quick: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def takes_dropout(self) -> bool:
        """Whether a pass with dropout has the case: none, as its sides would draw other masks."""
        return False

    def labels(self) -> dict[str, str]:
        """What the case is called."""
        return {"case": self.name, "task": self.task, "level": self.level, "size": self.size}

    def sizes(self) -> dict[str, int]:
        """The sizes by their names."""
        sizes = {name: getattr(self, name) for name in ("B", "T", "R", "beams", "tokens")}
        return {name: value for name, value in sizes.items() if value}


ALL = tuple(ROUTINGS)
MODEL_CASES = (
    ModelCase("roberta_step_b32", "step", "vqa", "base", B=32, T=20, routings=ALL, vit=True, quick=("add",)),
    ModelCase("gpt2_step_b8", "step", "caption", "base", B=8, T=50, routings=ALL, vit=True),
    ModelCase("gpt2_generate_b8", "generate", "caption", "base", B=8, beams=5, tokens=15, quick=("add",)),
    # 19 tokens and the visual prefix are the published recipe's 20 positions.
    ModelCase("roberta_train_b32", "train", "vqa", "base", B=32, T=19),
    ModelCase("gpt2_train_b8", "train", "caption", "base", B=8, T=50),
    ModelCase("roberta_large_step_b32", "step", "vqa", "large", B=32, T=20, routings=ALL, vit=True, devices=GPU),
    ModelCase("gpt2_medium_step_b8", "step", "caption", "large", B=8, T=50, routings=ALL, vit=True, devices=GPU),
    ModelCase("gpt2_medium_generate_b8", "generate", "caption", "large", B=8, beams=5, tokens=15, devices=GPU),
    ModelCase("roberta_large_train_b32", "train", "vqa", "large", B=32, T=19, devices=GPU),
    ModelCase("gpt2_medium_train_b8", "train", "caption", "large", B=8, T=50, devices=GPU),
)
