"""Texts tokenised once, and steps filled with texts of like length."""

import numpy as np
import pytest
import torch
from training_runs import assert_same_weights, losses, run, weights

from routingvl.config.schema import TrainConfig
from routingvl.data.collate import CaptionCollator, VQACollator
from routingvl.data.tokens import PART, TokenTable
from routingvl.tasks.base import load_tokenizer
from routingvl.training.loop import Trainer
from routingvl.training.schedule import BatchOrder


def order(lengths, start, stop, rank=0, processes=1, **settings):
    config = TrainConfig(**settings)
    return list(BatchOrder(len(lengths), config, start, stop, rank, processes, np.array(lengths)))


def padding(lengths, batches):
    return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)


LENGTHS = np.random.Generator(np.random.PCG64(0)).poisson(10, size=1003) + 2


@pytest.mark.parametrize("size", [4, 7])
def test_every_example_once_an_epoch(size):
    steps = 3 * len(LENGTHS) // size
    stream = [i for batch in order(LENGTHS, 0, steps + 1, batch_size=size) for i in batch]
    epochs = [stream[n * len(LENGTHS) : (n + 1) * len(LENGTHS)] for n in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1] != epochs[2]


def test_steps_hold_like_lengths_also_after_an_epoch_that_ends_inside_a_step():
    size = 8
    steps = 2 * len(LENGTHS) // size
    grouped = order(LENGTHS, 0, steps, batch_size=size)
    plain = order(LENGTHS, 0, steps, batch_size=size, group_by_length=False)
    half = steps // 2
    for part in (slice(0, half), slice(half + 1, steps)):
        assert padding(LENGTHS, grouped[part]) < 0.25 * padding(LENGTHS, plain[part])


def test_lengths_do_not_come_in_order():
    # The batches of an epoch are shuffled, so short texts do not all come first.
    longest = [max(LENGTHS[batch]) for batch in order(LENGTHS, 0, 40, batch_size=8)]
    assert abs(np.corrcoef(longest, range(40))[0, 1]) < 0.5


def test_order_is_a_function_of_seed_epoch_and_lengths():
    whole = order(LENGTHS, 0, 300, batch_size=8, seed=3)
    assert order(LENGTHS, 211, 300, batch_size=8, seed=3) == whole[211:]
    assert order(LENGTHS, 0, 300, batch_size=8, seed=4) != whole
    assert order(LENGTHS[::-1], 0, 300, batch_size=8, seed=3) != whole


def test_pieces_and_processes_share_out_the_same_steps():
    whole = order(LENGTHS, 0, 50, batch_size=8)
    shares = [order(LENGTHS, 0, 50, rank, 2, batch_size=8, accumulation=2) for rank in range(2)]
    for step, batch in enumerate(whole):
        pieces = [i for share in shares for piece in range(2) for i in share[2 * step + piece]]
        assert sorted(pieces) == sorted(batch)
    assert padding(LENGTHS, shares[0]) + padding(LENGTHS, shares[1]) <= padding(LENGTHS, whole)


@pytest.mark.parametrize("size", [2, 5, 64])
def test_few_examples(size):
    lengths = [5, 3, 4]
    stream = [i for batch in order(lengths, 0, 9, batch_size=size) for i in batch]
    assert sorted(stream[:3]) == sorted(stream[3:6]) == [0, 1, 2]


def test_wrong_number_of_lengths():
    with pytest.raises(ValueError, match="2 lengths do not belong to 3 examples"):
        BatchOrder(3, TrainConfig(batch_size=1), 0, 1, lengths=np.array([1, 2]))


@pytest.mark.parametrize("count", [0, 1, PART, PART + 3])
def test_token_table(count):
    rows = [list(range(n % 5)) for n in range(count)]
    table = TokenTable([str(n) for n in range(count)], lambda texts: [rows[int(text)] for text in texts])
    assert list(table) == rows
    assert table.lengths.tolist() == [len(row) for row in rows]
    with pytest.raises(IndexError):
        table[count]


@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_stored_tokens_make_the_same_batch(tiny, task):
    texts = ["a red square", "the square is blue and plain", "what color is it? " * 9]
    if task == "vqa":
        collator = VQACollator(load_tokenizer(str(tiny / "roberta")), 12, 4)
        items = [{"question": text, "question_id": i, "target": {0: 1.0}} for i, text in enumerate(texts)]
    else:
        collator = CaptionCollator(load_tokenizer(str(tiny / "gpt2")), 12)
        items = [{"caption": text} for text in texts]
    items = [item | {"image_id": i, "vision_features": torch.zeros(1, 2)} for i, item in enumerate(items)]
    table = TokenTable(texts, collator.encode)
    stored = collator([item | {"token_ids": table[i]} for i, item in enumerate(items)])
    read = collator(items)
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(stored[key], read[key]), key


def test_training_tokenises_each_text_once(tiny, tmp_path, monkeypatch):
    texts = []
    encode = CaptionCollator.encode
    monkeypatch.setattr(CaptionCollator, "encode", lambda self, rows: texts.extend(rows) or encode(self, rows))
    run(tiny, tmp_path / "run", "caption", max_steps=12)  # three epochs of 24 captions
    assert len(texts) == 24


def test_grouped_run_resumes_exactly(tiny, tmp_path, monkeypatch):
    settings = {"max_steps": 8, "train.batch_size": 5, "dropout": 0.2, "save_every": 3}
    whole = run(tiny, tmp_path / "whole", "caption", **settings)
    step = Trainer.train_step

    def step_and_fail(trainer, batches):
        if trainer.step == 5:
            raise RuntimeError("power cut")
        step(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_fail)
        with pytest.raises(RuntimeError, match="power cut"):
            run(tiny, tmp_path / "parts", "caption", **settings)
    resumed = run(tiny, tmp_path / "parts", "caption", resume=True, **settings)
    assert_same_weights(weights(whole.run_dir), weights(resumed.run_dir))
    assert losses(resumed) == losses(whole)
    plain = run(tiny, tmp_path / "plain", "caption", group_by_length=False, **settings)
    assert losses(plain) != losses(whole)
