"""A training step with cached features and the published recipe's, on the same made-up texts and weights.

The published step sends each image through the ViT, pads texts to 20 (VQA, prefix included) or 50 tokens and keeps all
logits. Ours is a step of any epoch after the first: features from a memory-mapped file, texts in the order and batches
of `train.group_by_length`, the loss at supervised positions only. Lengths of the made-up texts are log-normal: captions
with mean 12 and 99 % under 25 tokens, questions with mean 8.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from routingvl.bottlenecks.frozen_weights import lower_frozen_weights
from routingvl.config.schema import TrainConfig
from routingvl.data.collate import IGNORED
from routingvl.models.base import RoutedVLModel
from routingvl.training.compile import compiled, compiled_inputs
from routingvl.training.schedule import BatchOrder

from .published_models import published_optimizer
from .random_models import autocast, errors_of, loss_and_gradients
from .timing import Timer

# batch, mean and 99th percentile of the lengths, special tokens per text, fixed text length of the published recipe
TASKS = {"vqa": (32, 8, 16, 2, 19), "caption": (8, 12, 25, 1, 50)}
EXAMPLES = 4000
# Largest relative RMS error of the loss and of all gradients together, against the published step in float32.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
# Steps per turn, published and ours by precision, of about equal duration. Several, because the first step after
# another side's turn is slower (caches, freed memory), and an epoch has no such steps.
PUBLISHED_STEPS = 3
STEPS = {"float32": 12, "bfloat16": 24}

Inputs = dict[str, Tensor]
Step = Callable[[list[int]], None]


def text_lengths(task: str, examples: int = EXAMPLES) -> np.ndarray:
    """Tokens of each text without special tokens: log-normal, at least 3, at most what the recipe leaves room for."""
    _, mean, high, special, fixed = TASKS[task]
    # mean = exp(m + s^2 / 2) and the 99th percentile = exp(m + 2.326 s), solved for s.
    spread = 2.326 - math.sqrt(2.326**2 - 2 * math.log(high / mean))
    drawn = np.random.default_rng(0).lognormal(math.log(mean) - spread**2 / 2, spread, examples)
    return drawn.round().astype(int).clip(3, fixed - special)


class Data:
    """Made-up texts, and features of their images in a memory-mapped file.

    ``batch`` and ``fixed`` (text length of the published recipe) are by default those of TASKS.
    """

    def __init__(
        self, task: str, model: RoutedVLModel, folder: Path, batch: int | None = None, fixed: int | None = None
    ) -> None:
        self.task, self.model = task, model
        usual, _, _, self.special, longest = TASKS[task]
        self.batch, self.fixed = batch or usual, fixed or longest
        self.lengths = text_lengths(task).clip(max=self.fixed - self.special) + self.special
        self.random = torch.Generator().manual_seed(0)
        vocabulary = model.language_model.config.vocab_size
        # Token ids from 3 up: 0 is no target of the published loss, 1 pads RoBERTa's texts.
        self.ids = [torch.randint(3, vocabulary - 1, (n,), generator=self.random) for n in self.lengths.tolist()]
        width, file = model.vision_width, folder / f"{task}.f32"
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(EXAMPLES, 1, width))[:] = torch.randn(
            EXAMPLES, 1, width, generator=self.random
        ).numpy()
        self.features = np.load(file, mmap_mode="r")

    def order(self) -> Iterator[list[int]]:
        """Index lists of steps from the second epoch on."""
        config, first = TrainConfig(batch_size=self.batch), EXAMPLES // self.batch + 1
        return iter(BatchOrder(EXAMPLES, config, first, first + 10**6, lengths=self.lengths))

    def texts(self, indices: Sequence[int], length: int | None = None, all_count: bool = False) -> Inputs:
        """Padded texts and labels; ``length`` None pads to the longest. ``all_count``: labels for padding too."""
        rows = [self.ids[index] for index in indices]
        length = length or max(map(len, rows))
        ids = torch.ones(len(rows), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, ones, row in zip(ids, mask, rows, strict=True):
            line[: len(row)], ones[: len(row)] = row, 1
        if self.task == "vqa":
            labels = torch.zeros(len(rows), self.model.num_labels)
            labels[torch.arange(len(rows)), torch.tensor(indices) % self.model.num_labels] = 1.0
        else:
            labels = ids if all_count else ids.masked_fill(mask == 0, IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def images(self, count: int) -> Tensor:
        """Images as they come out of the preprocessing: [count, 3, H, W]."""
        size = self.model.vit.config.image_size
        return torch.randn(count, 3, size, size, generator=self.random)


def gate(data: Data, reference: RoutedVLModel, ours: RoutedVLModel, dtype: str, device: torch.device) -> float:
    """Largest relative RMS error of our loss, and of our gradients together, on one batch without dropout."""
    indices = next(data.order())
    texts = {key: value.to(device) for key, value in data.texts(indices).items()}
    images = data.images(len(indices)).to(device)
    published = {"pixel_values": images, **texts}
    cached = our_inputs(data, ours, reference.encode_images(images), texts)
    found = []
    for model, inputs, precision in ((reference, published, "float32"), (ours, cached, dtype)):
        model.eval()
        found.append(loss_and_gradients(model, inputs, autocast(device, precision)))
        model.train()
    return max(errors_of(found[1], found[0]).values())


def published_step(data: Data, model: RoutedVLModel, device: torch.device, dtype: str = "float32") -> Step:
    """One step of the published recipe, of given examples."""
    optimizer = published_optimizer(model)
    images = data.images(data.batch)  # read and decoded beforehand, to its advantage

    def step(indices: list[int]) -> None:
        texts = {key: value.to(device) for key, value in data.texts(indices, data.fixed, all_count=True).items()}
        optimizer.zero_grad()
        with autocast(device, dtype):
            loss = model(pixel_values=images.to(device), **texts).loss
        loss.backward()
        optimizer.step()

    return step


def our_inputs(data: Data, model: RoutedVLModel, features: Tensor, texts: Inputs) -> Inputs:
    """What ``routingvl train`` calls a model with; a compiled one (``model.compile``) is told which sizes change."""
    inputs = {"vision_features": features, **texts} | ({"return_logits": False} if data.task == "caption" else {})
    return inputs if model._compiled_call_impl is None else compiled_inputs(model, inputs)


def our_step(data: Data, model: RoutedVLModel, dtype: str, device: torch.device) -> Step:
    """One step as ``routingvl train`` takes it when features are cached."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-5, eps=1e-6, weight_decay=0.0, fused=device.type == "cpu" or None)

    def step(indices: list[int]) -> None:
        features = torch.from_numpy(data.features[np.asarray(indices)]).to(device)
        texts = {key: value.to(device) for key, value in data.texts(indices).items()}
        with autocast(device, dtype):
            loss = model(**our_inputs(data, model, features, texts)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_ours(model: RoutedVLModel, dtype: str) -> RoutedVLModel:
    """``model`` itself as it trains with cached features: without ViT, frozen weights as mixed precision has them."""
    model.vit = None
    if dtype == "bfloat16":
        lower_frozen_weights(model.language_model, torch.bfloat16, keep=False)
    return model


def our_side(
    data: Data,
    model: RoutedVLModel,
    reference: RoutedVLModel,
    dtype: str,
    device: torch.device,
    compiling: ExitStack | None = None,
) -> tuple[float, Step]:
    """The error of a copy of ``model`` by :func:`gate`, and its training step; compiled until ``compiling`` closes."""
    ours = make_ours(copy.deepcopy(model).to(device), dtype)
    if compiling is not None:
        compiling.enter_context(compiled(ours))
    error = gate(data, reference, ours, dtype, device)
    if data.task == "caption":
        ours.caption_loss = "sound"  # what training uses by default
    return error, our_step(data, ours, dtype, device)


def seconds_a_step(
    data: Data, sides: Mapping[str, tuple[Step, int]], timer: Timer, rounds: int
) -> dict[str, list[float]]:
    """Seconds per step of each side in each round, in which every side takes as many steps as it is given with."""
    order = data.order()

    def calls() -> Iterator[Callable[[], object]]:
        for _ in range(-1, rounds):  # a round to warm up
            for step, count in sides.values():
                batches = [next(order) for _ in range(count)]
                yield lambda step=step, batches=batches: [step(batch) for batch in batches]

    spent = [one.seconds for one in timer.all(calls())][len(sides) :]
    return {
        name: [seconds / count for seconds in spent[number :: len(sides)]]
        for number, (name, (_, count)) in enumerate(sides.items())
    }


def long_batch(data: Data) -> list[int]:
    """The longest of the first ten batches, so that the memory is not that of a lucky one."""
    batches = [batch for batch, _ in zip(data.order(), range(10), strict=False)]
    return max(batches, key=lambda batch: data.lengths[batch].max())


def batches_of_each_length(data: Data) -> list[list[int]]:
    """A batch of each padded length of an epoch: what later epochs find made for a shape, ours has to have met."""
    found: dict[int, list[int]] = {}
    for batch, _ in zip(data.order(), range(EXAMPLES // data.batch), strict=False):
        found.setdefault(int(data.lengths[batch].max()), batch)
    return list(found.values())
