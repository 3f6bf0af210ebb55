"""The levels of whole models: a step of one, training of one against the published recipe's, beam search."""

from __future__ import annotations

import tempfile
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .comparison import Comparison, Setting
from .gate import relative_rms
from .layer_providers import PROVIDERS, provider_obstacle
from .memory import saved_mib, tensor_peak
from .model_cases import ModelCase
from .model_providers import MODEL_PROVIDERS, Side, make_side, use_backend
from .passes import Checked, Pass, attempt, measure_passes, turns
from .published_models import published_model
from .random_models import autocast, errors_of, loss_and_gradients, routed_model, step_inputs, write_captions
from .suites import Plan
from .timing import Spent, Timer
from .training_steps import (
    PUBLISHED_STEPS,
    STEPS,
    TOLERANCES,
    Data,
    batches_of_each_length,
    long_batch,
    our_side,
    published_step,
    seconds_a_step,
)

WARM_UP = 1  # after the gate's own pass


class ModelComparison(Comparison):
    """What the levels of models share: which sides there are, and that the gate is the published model in float32."""

    case: ModelCase

    def __init__(self, case: ModelCase, routing: str, setting: Setting) -> None:
        super().__init__(case, routing, setting)
        self.device, self.dtype = setting.device, setting.plan.dtype

    @staticmethod
    def obstacle(plan: Plan) -> str | None:
        """float16 would need the scaling of a loss; without autocast the published head and loss have mixed types."""
        if plan.pure:
            return "a pass without autocast is of layers"
        return None if plan.dtype in TOLERANCES else f"models are measured in {' and '.join(TOLERANCES)}"

    def obstacle_of(self, provider: str) -> str | None:
        """Why a provider cannot be measured here, or None when it can."""
        if provider not in MODEL_PROVIDERS:
            return "compared in layers, not in models"
        return provider_obstacle(provider, str(self.device), self.routing, self.case.task == "vqa")

    def gated(self) -> tuple[dict[str, str], dict[str, Checked]]:
        """Every side against the published model in float32, without dropout."""
        _, prepared = attempt(self.prepare, self.device)
        if prepared.raised:
            return {}, {"reference": prepared}
        skipped, gate = {}, {}
        for name in PROVIDERS:
            if name == "base" or name not in ("reference", *self.setting.providers):
                continue
            why = None if name == "reference" else self.setting.left_out(name) or self.obstacle_of(name)
            if why is not None:
                skipped[name] = why
                continue
            errors, gate[name] = attempt(lambda name=name: self.errors_of(name), self.device)
            if errors is not None:
                gate[name].worst_error = max(errors.values(), default=None)
                gate[name].missed = [missed for pair in errors.items() if (missed := self.miss(*pair)) is not None]
        return skipped, gate

    @abstractmethod
    def prepare(self) -> None:
        """Make the model, its inputs and what the gate compares with."""

    @abstractmethod
    def errors_of(self, name: str) -> dict[str, float]:
        """Make a side; its relative RMS errors by what they are of."""

    def miss(self, what: str, error: float) -> str | None:
        """An error that is too large, in words; None when it is not."""
        limit = TOLERANCES[self.dtype]
        return None if error <= limit else f"{what} relative RMS error {error:.2e} is above {limit:.2e}"


class StepComparison(ModelComparison):
    """Forward and backward pass of the whole model, features given: the same inputs, weights and loss on every side."""

    sides: dict[str, Side]

    def prepare(self) -> None:
        """One batch; the ViT apart, as it is no part of the step."""
        case = self.case
        timed_vit = case.vit and self.routing == case.routings[0]
        model = routed_model(case.task, case.size, self.routing, case.R, vision=timed_vit).to(self.device).eval()
        self.vit, model.vit = model.vit, None
        self.model = model
        inputs = step_inputs(case.task, model, case.B, case.T)
        self.inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        self.sides["reference"] = make_side("reference", model)
        self.want = loss_and_gradients(self.sides["reference"].model, self.inputs, autocast(self.device, "float32"))

    def errors_of(self, name: str) -> dict[str, float]:
        """Of the loss, and of all gradients together."""
        if name not in self.sides:
            self.sides[name] = make_side(name, self.model)
        side = self.sides[name]
        got = loss_and_gradients(side.model, self.inputs, autocast(self.device, self.dtype), side.call)
        return errors_of(got, self.want)

    def seconds(self, names: Sequence[str], timer: Timer, repeats: int) -> dict[str, dict[str, list[Spent]]]:
        """By "fwd", "bwd" and "fwdbwd"; of the ViT, which is the provider "base", by "vit"."""
        passes, dy = {name: self.pass_of(name) for name in names}, torch.ones((), device=self.device)
        found = measure_passes(passes, dy, timer, turns(names, repeats, WARM_UP))
        if self.vit is not None:
            size = self.vit.config.image_size
            images = torch.randn(self.case.B, 3, size, size).to(self.device)
            with torch.no_grad(), autocast(self.device, self.dtype):
                spent = timer.all([lambda: self.vit(images).pooler_output] * (WARM_UP + repeats))
            found["base"] = {"vit": spent[WARM_UP:]}
        return found

    def pass_of(self, provider: str) -> Pass:
        """The loss, and the gradients of all that trains."""
        side = self.sides[provider]
        return Pass(lambda: side.loss(self.inputs, self.dtype), list(side.model.parameters()))

    def memory(self, provider: str) -> dict[str, float | None]:
        """Beside weights and inputs."""
        if provider == "base":
            return {"saved_mib": None, "peak_mib": None}
        whole, buffers = self.pass_of(provider), self.sides[provider].model.buffers()
        saved = saved_mib(whole.forward, [*whole.leaves, *buffers, *self.inputs.values()])
        whole.clear()
        peak = tensor_peak(whole.run, self.device)
        whole.clear()
        return {"saved_mib": saved, "peak_mib": round(peak, 3)}

    def rates(self, provider: str, mode: str, seconds: float) -> dict[str, Any]:
        """Examples (images of the ViT) per second, of a whole step."""
        return {"examples_s": round(self.case.B / seconds, 3) if mode in ("fwdbwd", "vit") else None}


class TrainComparison(ModelComparison):
    """A training step with cached features against the published recipe's, see benchmarks/training_steps.py."""

    def __init__(self, case: ModelCase, routing: str, setting: Setting) -> None:
        super().__init__(case, routing, setting)
        self.folder = tempfile.TemporaryDirectory()

    def prepare(self) -> None:
        """The published recipe's step, in float32 whatever the pass's dtype, and the texts of both sides."""
        case = self.case
        self.model = routed_model(case.task, case.size, self.routing, case.R)
        if case.task == "caption":
            self.model.caption_loss = "reference"  # on both sides, so that the gate compares like with like
        self.reference = published_model(self.model).to(self.device)
        self.data = Data(case.task, self.model, Path(self.folder.name), case.B, case.T)

    def close(self) -> None:
        """Remove the file of features."""
        self.folder.cleanup()

    def obstacle_of(self, provider: str) -> str | None:
        """The recipe is compared with ours."""
        if provider in ("compile", "peft"):
            return "at level train the published recipe's step is compared with ours alone"
        return super().obstacle_of(provider)

    def errors_of(self, name: str) -> dict[str, float]:
        """The larger of our loss's and our gradients'; the published step is what they are compared with."""
        if name == "reference":
            self.sides[name] = published_step(self.data, self.reference, self.device)
            return {}
        model = use_backend(self.model, name)
        error, self.sides[name] = our_side(self.data, model, self.reference, self.dtype, self.device)
        return {"loss or gradients": error}

    def seconds(self, names: Sequence[str], timer: Timer, repeats: int) -> dict[str, dict[str, list[Spent]]]:
        """By "step": reading, forward and backward pass, optimiser."""
        for batch in batches_of_each_length(self.data):
            for name in names:
                if name != "reference":  # its texts have one length
                    self.sides[name](batch)
        ours = STEPS[self.dtype]
        sides = {name: (self.sides[name], PUBLISHED_STEPS if name == "reference" else ours) for name in names}
        spent = seconds_a_step(self.data, sides, timer, repeats)
        return {name: {"step": list(map(Spent, values))} for name, values in spent.items()}

    def memory(self, provider: str) -> dict[str, float | None]:
        """Of a step with the longest texts."""
        self.reference.zero_grad()  # as ours, which are dropped at the end of a step
        longest = long_batch(self.data)
        peak = tensor_peak(lambda: self.sides[provider](longest), self.device)
        return {"saved_mib": None, "peak_mib": round(peak, 3)}

    def rates(self, provider: str, mode: str, seconds: float) -> dict[str, Any]:
        """Examples per second."""
        return {"examples_s": round(self.case.B / seconds, 3), "published_dtype": "float32"}


class GenerateComparison(ModelComparison):
    """Beam search to captions of one length, features given."""

    sides: dict[str, Side]

    def prepare(self) -> None:
        """The captions that the published model writes in float32."""
        case = self.case
        self.model = routed_model(case.task, case.size, self.routing, case.R, vision=False).to(self.device).eval()
        self.sides["reference"] = reference = make_side("reference", self.model)
        self.features = step_inputs(case.task, self.model, case.B, case.tokens)["vision_features"].to(self.device)
        self.tokens = self._write(reference, "float32")
        self.want = self._logits(reference, "float32")

    def obstacle_of(self, provider: str) -> str | None:
        """Every step of a search is called from transformers, which nobody compiles here."""
        if provider == "compile":
            return "generation is not compiled"
        return super().obstacle_of(provider)

    def errors_of(self, name: str) -> dict[str, float]:
        """Of the logits of the published model's captions; in float32 each side has to write them itself, too."""
        if name not in self.sides:
            self.sides[name] = make_side(name, self.model)
        side = self.sides[name]
        errors = {"logits": relative_rms(self._logits(side, self.dtype), self.want)}
        written = self._write(side, self.dtype)
        if self.dtype == "float32":
            errors["tokens"] = (written != self.tokens).double().mean().item()
        return errors

    def miss(self, what: str, error: float) -> str | None:
        """Of the tokens none may be another."""
        if what == "tokens":
            return f"{error:.1%} of the tokens are others" if error else None
        return super().miss(what, error)

    def _write(self, side: Side, dtype: str) -> Tensor:
        case = self.case
        return write_captions(side.model, self.features, beams=case.beams, tokens=case.tokens, dtype=dtype)

    def _logits(self, side: Side, dtype: str) -> Tensor:
        with torch.no_grad(), autocast(self.device, dtype):
            return side.call(vision_features=self.features, input_ids=self.tokens).logits

    def seconds(self, names: Sequence[str], timer: Timer, repeats: int) -> dict[str, dict[str, list[Spent]]]:
        """By "generate"."""
        order = list(turns(names, repeats, WARM_UP))
        spent = timer.all(lambda name=name: self._write(self.sides[name], self.dtype) for name, _ in order)
        found: dict[str, dict[str, list[Spent]]] = {name: {"generate": []} for name in names}
        for (name, counts), one in zip(order, spent, strict=True):
            if counts:
                found[name]["generate"].append(one)
        return found

    def memory(self, provider: str) -> dict[str, float | None]:
        """Of a search."""
        peak = tensor_peak(lambda: self._write(self.sides[provider], self.dtype), self.device)
        return {"saved_mib": None, "peak_mib": round(peak, 3)}

    def rates(self, provider: str, mode: str, seconds: float) -> dict[str, Any]:
        """Captions per second."""
        return {"captions_s": round(self.case.B / seconds, 3)}


MODEL_COMPARISONS: dict[str, type[ModelComparison]] = {
    "step": StepComparison,
    "train": TrainComparison,
    "generate": GenerateComparison,
}
