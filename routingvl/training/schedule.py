"""What happens at which step: the order of examples and the learning rate, both pure functions of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count, islice

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from routingvl.config import ConfigError
from routingvl.config.schema import SCHEDULES, TrainConfig

GROUPING_WINDOW = 50  # batches whose examples are sorted by length together


class BatchOrder:
    """Index lists of the micro-batches of steps ``start`` to ``stop``, for one process.

    Examples form one endless stream, a new seeded permutation per epoch; step s takes the ``batch_size`` of them
    from s * batch_size on, so every step has the full batch, also where epochs meet. With ``lengths`` (tokens of each
    example) and ``config.group_by_length`` the examples of a step are of like length, see :meth:`group_by_length`.
    """

    def __init__(
        self,
        examples: int,
        config: TrainConfig,
        start: int,
        stop: int,
        rank: int = 0,
        processes: int = 1,
        lengths: np.ndarray | None = None,
    ) -> None:
        if config.batch_size % (config.accumulation * processes):
            raise ConfigError(
                f"train.batch_size={config.batch_size} is not divisible by "
                f"train.accumulation={config.accumulation} x {processes} processes"
            )
        if lengths is not None and len(lengths) != examples:
            raise ValueError(f"{len(lengths)} lengths do not belong to {examples} examples")
        self.examples, self.config = examples, config
        self.lengths = lengths if config.group_by_length else None
        self.start, self.stop, self.rank, self.processes = start, stop, rank, processes

    def __len__(self) -> int:
        return (self.stop - self.start) * self.config.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        size = self.config.batch_size
        width = size // self.processes // self.config.accumulation
        epoch, skip = divmod(self.start * size, self.examples)
        stream = islice(chain.from_iterable(map(self.epoch_order, count(epoch))), skip, None)
        for _ in range(self.start, self.stop):
            own = list(islice(stream, size))[self.rank :: self.processes]
            yield from (own[i : i + width] for i in range(0, len(own), width))

    def epoch_order(self, epoch: int) -> list[int]:
        """All examples in the order of one epoch: a function of the seed, the epoch, the lengths and the batch size."""
        order = self.random(epoch).permutation(self.examples)
        if self.lengths is not None:
            self.group_by_length(order, epoch)
        return order.tolist()

    def group_by_length(self, order: np.ndarray, epoch: int) -> None:
        """Bring examples of similar length in ``order`` together in batches.

        Only ``GROUPING_WINDOW`` batches at a time are sorted, and then shuffled as whole batches: what meets in a batch
        still depends on the order, and short texts do not all come first. Examples that fill no batch, at either end,
        stay where they are; within a batch lengths rise, so that its micro-batches hold similar lengths too.
        """
        size, random = self.config.batch_size, self.random(epoch, 1)
        # The epoch's first examples fill up the step that the epoch before has begun.
        skip = -epoch * self.examples % size
        stop = skip + max(0, len(order) - skip) // size * size
        for start in range(skip, stop, GROUPING_WINDOW * size):
            window = order[start : min(start + GROUPING_WINDOW * size, stop)]
            batches = window[np.argsort(self.lengths[window], kind="stable")].reshape(-1, size)
            window[:] = batches[random.permutation(len(batches))].ravel()

    def random(self, *numbers: int) -> np.random.Generator:
        """Random numbers that depend on the seed and ``numbers`` only, the same on every machine."""
        return np.random.Generator(np.random.PCG64([self.config.seed, *numbers]))


def total_steps(config: TrainConfig, examples: int) -> int:
    """Optimiser steps of a run over ``examples`` training examples."""
    return config.max_steps or max(1, round(config.epochs * examples / config.batch_size))


def learning_rate_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """The learning rate of ``optimizer`` (made with ``config.lr``, the highest) after each step.

    It rises linearly from zero over the warm-up, then goes as ``config.schedule`` says until ``steps``.
    """
    return get_scheduler(SCHEDULES[config.schedule], optimizer, config.warmup_steps(steps), steps)
