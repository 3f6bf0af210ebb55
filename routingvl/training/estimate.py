"""What a run would take, before its data and weights are there: counts, memory by formula, and one measured batch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from routingvl.backbones.untrained import untrained_text, untrained_tower
from routingvl.backbones.vision import config_image_size
from routingvl.config import ConfigError
from routingvl.config.schema import RunConfig
from routingvl.data.images import ImagePreprocessor
from routingvl.models import RoutedVLModel
from routingvl.tasks.base import Task, find_task
from routingvl.tasks.choice import ChoiceTask
from routingvl.training.accelerator import make_accelerator
from routingvl.training.precision import frozen_weights_lowered
from routingvl.training.schedule import total_steps

ROWS_ON_A_CPU = 16  # of a measured batch: enough for the products to be as fast as those of the whole one
IMAGES = 4  # of the measured pass of the vision tower


@dataclass(frozen=True)
class DataSize:
    """Training examples and distinct images of both splits; None where the data are not there."""

    examples: int | None
    images: int | None


def estimate(config: RunConfig) -> dict[str, Any]:
    """Parameters, steps, memory and time of a run; nothing is downloaded but a config, and nothing is written.

    The model has random weights in the shape of the backbones. Memory for the backward pass is what autograd keeps of
    the measured batch, without what the pass takes for itself, and time that of its second step, both scaled to
    ``train.batch_size``. Texts are as long as ``data.max_text_length`` allows.

    Returns:
        "parameters" (counts), "steps", "examples" and "images" (None where unknown), "mib", "seconds", "measured", and
        "assumed": sentences on what stands in for data that are not there.

    Raises:
        ConfigError: a setting cannot work.
        BackboneError: a backbone is unknown and its config cannot be had.
    """
    accelerator = make_accelerator(config)
    assumed: list[str] = []
    task = find_task(config.task)(config, None, ImagePreprocessor())
    size = read_sizes(task, assumed)
    model = build_untrained(task).to(accelerator.device)
    if config.model.activation_checkpointing:
        model.gradient_checkpointing_enable()
    with frozen_weights_lowered(model, accelerator, keep=False):
        report = model.report
        settings = config.train
        steps = settings.max_steps or (size.examples and total_steps(settings, size.examples))
        measured = measure(task, model, accelerator)
        share = settings.batch_size / settings.accumulation / measured["examples"]
        mib = {
            "weights": _mib(
                tensor for part in _parts(model, config) for tensor in (*part.parameters(), *part.buffers())
            ),
            "gradients and AdamW": 3 * _mib(p for p in model.parameters() if p.requires_grad),
            "kept for the backward pass": measured["kept_mib"] * share,
        }
        step = measured["step_seconds"] * share * settings.accumulation
        if not config.data.keeps_features:
            step += measured["image_seconds"] * settings.batch_size * task.images
        features = size.images and measured["image_seconds"] * size.images if config.data.keeps_features else 0
        whole = None if steps is None or features is None else step * steps + features
        return {
            "task": config.task,
            "device": str(accelerator.device),
            "parameters": {
                "trained": report.trainable,
                "language model and head": report.total,
                "vision tower": sum(p.numel() for p in model.vit.parameters()),
            },
            "examples": size.examples,
            "images": size.images,
            "steps": steps,
            "mib": {name: round(value, 1) for name, value in (mib | {"together": sum(mib.values())}).items()},
            "seconds": {"step": _digits(step), "features of all images": _digits(features), "training": _digits(whole)},
            "measured": {name: _digits(value) for name, value in measured.items()},
            "assumed": assumed,
        }


def read_sizes(task: Task, assumed: list[str]) -> DataSize:
    """Read the annotations where they are there; else take usual numbers, and say so in ``assumed``."""
    parts = task.config.data.parts.items()
    absent = [(name, data.annotations) for name, data in parts if not os.path.exists(data.annotations or "")]
    if not absent:
        train, val = task.read_training_splits()
        images = [*train.images, *(val.images if val is not None else ())]
        distinct = {image.key for image in images}
        return DataSize(len(task.dataset(train, training=True)), len(distinct))
    name, path = absent[0]
    key = f"data.mixture.{name}.annotations" if name else "data.annotations"
    where = f"{key} is not set" if path is None else f"{path} does not exist"
    assumed.append(f"{where}, so the numbers of examples, images and steps are unknown")
    if isinstance(task, ChoiceTask):
        task.choices = list(map(str, range(task.usual_choices)))
        assumed.append(f"{task.usual_choices} {task.kind}s to choose from")
    return DataSize(None, None)


def build_untrained(task: Task) -> RoutedVLModel:
    """The task's model of random weights."""
    settings, model_class = task.config.model, task.model_class
    vision = untrained_tower(settings.vision)
    text = untrained_text(model_class.text_use, settings.text or task.text_model)
    return task.build_model(vision=vision, text=text)


def measure(task: Task, model: RoutedVLModel, accelerator: Accelerator) -> dict[str, float]:
    """One step of a micro-batch, or of the first rows of it on a CPU, with AdamW, and the vision tower's pass."""
    settings, device = task.config.train, accelerator.device
    micro = settings.batch_size // settings.accumulation
    if micro < 1:
        raise ConfigError(f"train.batch_size={settings.batch_size} is below train.accumulation={settings.accumulation}")
    rows = min(micro, ROWS_ON_A_CPU) if device.type == "cpu" else micro
    room = model.max_positions - task.images * model.visual_prefix
    tokens = min(task.text_length, room)
    pixels = torch.zeros(min(IMAGES, rows), 3, *(config_image_size(model.vit) or (224, 224)), device=device)
    with accelerator.autocast():
        model.encode_images(pixels)
        image_seconds = _seconds(lambda: model.encode_images(pixels), device) / len(pixels)
        shape = model.encode_images(pixels[:1]).shape[1:]
    ids = torch.randint(3, model.vocabulary_size, (rows, tokens))
    labels = task.made_up_labels(ids, model)
    several = (task.images,) if task.images > 1 else ()
    batch = {"vision_features": torch.randn(rows, *several, *shape), "input_ids": ids, "labels": labels}
    inputs = task.training_inputs(batch, device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()

    def loss() -> torch.Tensor:
        with accelerator.autocast():
            return model(**inputs).loss

    def step() -> None:
        accelerator.backward(loss())
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = saved_mib(loss, [*model.parameters(), *model.buffers()])
    seconds = _seconds(step, device)
    return {
        "examples": rows, "tokens": tokens, "step_seconds": seconds, "image_seconds": image_seconds, "kept_mib": kept,
    }  # fmt: skip


def saved_mib(forward: Callable[[], torch.Tensor], given: Iterable[torch.Tensor]) -> float:
    """MiB that autograd keeps for the backward pass of ``forward`` beyond the tensors ``given``."""
    inputs = {tensor.untyped_storage().data_ptr() for tensor in given}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself it would hold the graph that holds it, for ever where it is a node's result

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # until here everything kept was alive, so that no two tensors had one address
    return round(sum(kept.values()) / 2**20, 3)


def _parts(model: RoutedVLModel, config: RunConfig) -> list[torch.nn.Module]:
    """Modules that are in memory in a step: without the vision tower where features are kept."""
    return [part for name, part in model.named_children() if name != "vit" or not config.data.keeps_features]


def _mib(tensors: Iterable[torch.Tensor]) -> float:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / 2**20


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _digits(value: float | None) -> float | None:
    """Three significant digits: more would claim what one batch cannot tell."""
    return value if value is None or isinstance(value, int) else float(f"{value:.3g}")
