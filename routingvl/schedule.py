"""What happens at which step: the order of examples and the learning rate, both pure functions of the settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from routingvl.config import ConfigError
from routingvl.run_config import TrainConfig


class BatchOrder:
    """Index lists of the micro-batches of steps ``start`` to ``stop``, for one process.

    Examples form one endless stream, a new seeded permutation for each epoch; step s takes the ``batch_size`` of them
    from s * batch_size on. Every step so has the full batch, also where epochs meet.
    """

    def __init__(
        self, examples: int, config: TrainConfig, start: int, stop: int, rank: int = 0, processes: int = 1
    ) -> None:
        if config.batch_size % (config.accumulation * processes):
            raise ConfigError(
                f"train.batch_size={config.batch_size} is not divisible by "
                f"train.accumulation={config.accumulation} x {processes} processes"
            )
        self.examples, self.config = examples, config
        self.start, self.stop, self.rank, self.processes = start, stop, rank, processes

    def __len__(self) -> int:
        return (self.stop - self.start) * self.config.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        size, pieces = self.config.batch_size, self.config.accumulation
        epoch, order = -1, []
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * size, (step + 1) * size):
                if position // self.examples != epoch:
                    epoch = position // self.examples
                    order = permutation(self.examples, self.config.seed, epoch)
                batch.append(order[position % self.examples])
            mine = batch[self.rank :: self.processes]
            width = len(mine) // pieces
            yield from (mine[i * width : (i + 1) * width] for i in range(pieces))


def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """Order of ``n`` examples in one epoch, the same on every machine."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n).tolist()


def total_steps(config: TrainConfig, examples: int) -> int:
    """Optimiser steps of a run over ``examples`` training examples."""
    return config.max_steps or max(1, round(config.epochs * examples / config.batch_size))


def learning_rate_factor(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """Share of ``config.lr`` as a function of the number of steps done, out of ``steps``."""
    warmup = config.warmup_steps(steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if config.schedule == "linear":
            return 1.0 - progress
        return 1.0 if config.schedule == "constant" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
