"""What happens at which step: the order of examples, their number, and the learning rate."""

import math

import pytest
import torch

from routingvl.config import ConfigError
from routingvl.config.schema import SCHEDULES, TrainConfig
from routingvl.training.schedule import BatchOrder, learning_rate_schedule, total_steps


def order(examples, start, stop, rank=0, processes=1, **settings):
    return list(BatchOrder(examples, TrainConfig(**settings), start, stop, rank, processes))


def test_order_of_examples():
    # 2 epochs of 10 in steps of 4: each epoch holds every example once, in another order.
    batches = order(10, 0, 5, batch_size=4)
    stream = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(10))
    assert stream[:10] != stream[10:]
    assert order(10, 3, 5, batch_size=4) == batches[3:]
    shares = [order(10, 0, 5, rank, 2, batch_size=4, accumulation=2) for rank in range(2)]
    joined = [sorted(shares[0][i] + shares[0][i + 1] + shares[1][i] + shares[1][i + 1]) for i in range(0, 10, 2)]
    assert joined == [sorted(batch) for batch in batches]
    with pytest.raises(ConfigError, match=r"train.batch_size=4 is not divisible by train.accumulation=1 x 3 processes"):
        BatchOrder(10, TrainConfig(batch_size=4), 0, 1, 0, 3)


def test_batch_larger_than_the_data():
    batches = order(3, 0, 2, batch_size=7)
    assert [len(batch) for batch in batches] == [7, 7]
    assert sorted(batches[0][:3]) == [0, 1, 2]


def test_number_of_steps():
    assert total_steps(TrainConfig(epochs=20, batch_size=512), 605_102) == 23_637
    assert total_steps(TrainConfig(epochs=0.5, batch_size=4), 40) == 5
    assert total_steps(TrainConfig(epochs=1, max_steps=3), 1_000) == 3
    assert total_steps(TrainConfig(epochs=1, batch_size=64), 2) == 1


def formula(schedule, warmup, steps, step):
    """The share of the highest learning rate, as docs/training.md describes it."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2, "constant": 1.0}[schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 4, 0.25, 16])
def test_learning_rate_at_every_step(schedule, warmup):
    config, steps = TrainConfig(warmup=warmup, schedule=schedule, lr=0.5), 16
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    rates = learning_rate_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(rates.get_last_lr()[0])
        optimizer.step()
        rates.step()
    want = [config.lr * formula(schedule, config.warmup_steps(steps), steps, step) for step in range(steps)]
    assert found == pytest.approx(want, rel=1e-14, abs=1e-16)
