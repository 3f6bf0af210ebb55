"""Texts to read and texts to write, with one image or several, as batches."""

import pytest
import torch
from task_texts import SEQ2SEQ, tokenizer
from tiny import QUESTION

from routingvl.data.images import ImageRecord
from routingvl.data.text_to_text import BETWEEN, TextExample, TextToTextCollator, TextToTextDataset
from routingvl.data.tokens import TokenTable


def items(*images, targets=("red", "a green square")):
    prompts = (QUESTION, "what is it?")
    return [
        {"id": f"q{i}", "image_id": i, "prompt": prompt, "target": target, **image}
        for i, (prompt, target, image) in enumerate(zip(prompts, targets, images, strict=True))
    ]


def features(*shape):
    return {"vision_features": torch.randn(*shape, 4)}


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_prompts_are_read_whole_and_targets_end_in_the_end_token(kind):
    words = tokenizer(kind)
    batch = TextToTextCollator(words, 12)(items(features(2), features(2)))
    assert batch["ids"] == ["q0", "q1"]
    assert batch["vision_features"].shape == (2, 2, 4)
    assert "image_mask" not in batch
    for ids, mask, prompt in zip(batch["input_ids"], batch["attention_mask"], (QUESTION, "what is it?"), strict=True):
        assert ids[mask.bool()].tolist() == words(prompt)["input_ids"]
        assert set(ids[mask == 0].tolist()) <= {words.pad_token_id}
    for labels, target in zip(batch["labels"], ("red", "a green square"), strict=True):
        row = labels[labels != -100].tolist()
        assert row[-1] == words.eos_token_id
        assert row.count(words.eos_token_id) == 1
        assert words.decode(row, skip_special_tokens=True).strip() == target


def test_a_long_target_keeps_its_end_token():
    words = tokenizer("t5")
    batch = TextToTextCollator(words, 4, "max_length")(items(features(1), features(1), targets=("red " * 9, "red")))
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"].shape == (2, 4)
    assert batch["labels"][0, -1] == words.eos_token_id
    assert words.eos_token_id in batch["labels"][1].tolist()


@pytest.mark.parametrize("shape", [(2,), (3, 2, 2)])
def test_different_numbers_of_images_are_padded(shape):
    key = "vision_features" if len(shape) == 1 else "pixel_values"
    first, second = torch.randn(*shape, 4), torch.randn(2, *shape, 4)
    if key == "pixel_values":
        first, second = torch.randn(*shape), torch.randn(2, *shape)
    batch = TextToTextCollator(tokenizer("bart"), 12)(items({key: first}, {key: second}))
    assert batch["image_mask"].tolist() == [[True, False], [True, True]]
    assert torch.equal(batch[key][0, 0], first)
    assert not batch[key][0, 1].any()
    assert torch.equal(batch[key][1], second)
    both = TextToTextCollator(tokenizer("bart"), 12)(items({key: second}, {key: second}))
    assert "image_mask" not in both
    assert both[key].shape == (2, *second.shape)


def test_unknown_targets_give_no_labels_and_skipped_items_no_row():
    collate = TextToTextCollator(tokenizer("bart"), 12)
    batch = collate([None, *items(features(1), features(1), targets=("red", None))])
    assert "labels" not in batch
    assert len(batch["input_ids"]) == 2
    assert collate([None]) is None
    with pytest.raises(ValueError, match="max_length=2 leaves no room"):
        TextToTextCollator(tokenizer("bart"), 2)


def test_a_data_set_brings_token_ids_that_give_the_same_batch():
    class Split:
        name, images = "train", [ImageRecord(7, "7.jpg"), ImageRecord(8, "8.jpg")]

    known = {7: torch.ones(1, 4), 8: torch.zeros(1, 4)}
    examples = [
        TextExample("a", QUESTION, "red", (Split.images[0],)),
        TextExample("b", "what is it?", "a green square", (Split.images[1],)),
    ]
    data, collate = TextToTextDataset(Split, examples, features=known), TextToTextCollator(tokenizer("bart"), 12)
    assert [item["image_id"] for item in data] == [7, 8]
    plain = collate(list(data))
    data.tokens = TokenTable(data.texts, collate.encode)
    assert data[1]["token_ids"].count(BETWEEN) == 1
    again = collate(list(data))
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[key], plain[key]) for key in ("input_ids", "attention_mask", "labels"))
    assert torch.equal(again["vision_features"], torch.stack([known[7], known[8]]))
