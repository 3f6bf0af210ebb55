"""Batches: padding, truncation, labels, skipped items, with tokenizers of every kind that a text model may bring."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast, RobertaTokenizer

from routingvl.data.collate import CaptionCollator, LabelCollator, VQACollator, collate_images

TEXTS = ["a red ball on the left", "a blue cup", "what colour is the ball?", "how many cups are there on the right?"]
CAPTIONS = ["a red ball on the left", "a blue cup"]


def byte_level_bpe(*special: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet)
    )
    return tokenizer


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A small local folder in the form of the demo's: a trained BPE saved through PreTrainedTokenizerFast."""
    folder = tmp_path_factory.mktemp("gpt2")
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(end), bos_token=end, eos_token=end).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def roberta_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = byte_level_bpe("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": token for name, token in names.items()}
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["auto", "GPT2Tokenizer"])
def gpt2(request, gpt2_folder):
    if request.param == "auto":
        return AutoTokenizer.from_pretrained(gpt2_folder)
    return GPT2Tokenizer.from_pretrained(gpt2_folder)


@pytest.fixture(scope="module", params=["auto", "RobertaTokenizer"])
def roberta(request, roberta_folder):
    if request.param == "auto":
        return AutoTokenizer.from_pretrained(roberta_folder)
    return RobertaTokenizer.from_pretrained(roberta_folder)


def caption_items(captions=CAPTIONS):
    return [
        {"image_id": n, "caption": text, "pixel_values": torch.full((3, 4, 4), n)} for n, text in enumerate(captions)
    ]


def question_items(targets=({0: 1.0}, {1: 0.3, 3: 0.6})):
    return [
        {
            "question_id": 1000 + n,
            "image_id": n,
            "question": TEXTS[2 + n],
            "target": target,
            "vision_features": torch.full((1, 5), float(n)),
        }
        for n, target in enumerate(targets)
    ]


class TestVQACollator:
    def test_batch(self, roberta):
        batch = VQACollator(roberta, max_length=40, num_labels=4)(question_items())
        assert set(batch) == {"vision_features", "image_ids", "question_ids", "input_ids", "attention_mask", "labels"}
        assert (batch["question_ids"], batch["image_ids"]) == ([1000, 1001], [0, 1])
        assert batch["vision_features"].shape == (2, 1, 5)
        assert torch.equal(batch["labels"], torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.3, 0.0, 0.6]]))
        assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
        lengths = batch["attention_mask"].sum(1)
        assert batch["input_ids"].shape[1] == lengths.max()
        for row, (ids, length) in enumerate(zip(batch["input_ids"], lengths, strict=True)):
            assert ids[:length].tolist() == roberta(TEXTS[2 + row])["input_ids"]
            assert (ids[length:] == roberta.pad_token_id).all()

    def test_padding_is_on_the_right_whatever_the_tokenizer_prefers(self, roberta_folder):
        tokenizer = AutoTokenizer.from_pretrained(roberta_folder, padding_side="left")
        batch = VQACollator(tokenizer, max_length=40, num_labels=4)(question_items())
        assert (batch["attention_mask"].diff(dim=1) <= 0).all()
        assert (batch["attention_mask"] == 0).any()

    def test_truncation_keeps_the_special_tokens(self, roberta):
        batch = VQACollator(roberta, max_length=5, num_labels=4)(question_items())
        assert batch["input_ids"].shape == (2, 5)
        assert (batch["input_ids"][:, 0] == roberta.bos_token_id).all()
        assert (batch["input_ids"][:, -1] == roberta.eos_token_id).all()

    def test_padding_to_max_length(self, roberta):
        batch = VQACollator(roberta, max_length=40, num_labels=4, padding="max_length")(question_items())
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 40)

    def test_no_labels_without_answers(self, roberta):
        assert "labels" not in VQACollator(roberta, 40, 4)(question_items((None, None)))

    def test_unanswerable_question_has_a_row_of_zeros(self, roberta):
        assert VQACollator(roberta, 40, 4)(question_items(({}, {1: 1.0})))["labels"][0].sum() == 0

    def test_skipped_items(self, roberta):
        collate = VQACollator(roberta, 40, 4)
        items = question_items()
        batch = collate([None, items[1], None])
        assert batch["question_ids"] == [1001]
        assert batch["labels"].shape == (1, 4)
        assert collate([None, None]) is None

    def test_tokenizer_without_padding_token(self, gpt2):
        batch = VQACollator(gpt2, 40, 4)(question_items())
        padded = batch["attention_mask"] == 0
        assert padded.any()
        assert (batch["input_ids"][padded] == gpt2.eos_token_id).all()
        with pytest.raises(ValueError, match="no padding or end token"):
            VQACollator(PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe("<x>")), 40, 4)

    @pytest.mark.parametrize(
        ("options", "message"), [({"padding": "shortest"}, "padding='shortest'"), ({"max_length": 2}, "max_length=2")]
    )
    def test_bad_options(self, roberta, options, message):
        with pytest.raises(ValueError, match=message):
            VQACollator(**{"tokenizer": roberta, "max_length": 40, "num_labels": 4} | options)


class TestLabelCollator:
    @staticmethod
    def items(*targets):
        texts = TEXTS[0], (TEXTS[1], TEXTS[2]), TEXTS[3]
        features = torch.zeros(1, 2)
        return [
            {"id": f"n{n}", "image_id": "x.jpg", "text": text, "target": target, "vision_features": features}
            for n, (text, target) in enumerate(zip(texts, targets, strict=False))
        ]

    def test_batch_of_texts_and_pairs(self, roberta):
        batch = LabelCollator(roberta, max_length=60)(self.items(2, 0, 1))
        assert (batch["ids"], batch["image_ids"]) == (["n0", "n1", "n2"], ["x.jpg"] * 3)
        assert batch["labels"].tolist() == [2, 0, 1]
        for row, texts in enumerate(((TEXTS[0],), (TEXTS[1], TEXTS[2]), (TEXTS[3],))):
            ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            assert ids.tolist() == roberta(*texts)["input_ids"]

    def test_pairs_are_cut_too(self, roberta):
        assert LabelCollator(roberta, max_length=7)(self.items(2, 0, 1))["input_ids"].shape == (3, 7)

    def test_no_labels_where_one_is_unknown(self, roberta):
        assert "labels" not in LabelCollator(roberta, 40)(self.items(None, None))
        assert LabelCollator(roberta, 40)([None]) is None


class TestCaptionCollator:
    def test_sound_loss_with_prefix(self, gpt2):
        batch = CaptionCollator(gpt2, max_length=50)(caption_items())
        long, short = (gpt2(caption, add_special_tokens=False)["input_ids"] for caption in CAPTIONS)
        end, gap = gpt2.eos_token_id, len(long) - len(short)
        assert batch["input_ids"].tolist() == [[*long, end], [*short, end, *[end] * gap]]
        assert batch["attention_mask"].tolist() == [[1] * (len(long) + 1), [1] * (len(short) + 1) + [0] * gap]
        # The one true end token is a target; the padding behind it, the same token, is not.
        assert batch["labels"].tolist() == [[*long, end], [*short, end, *[-100] * gap]]
        assert batch["pixel_values"].shape == (2, 3, 4, 4)
        assert batch["image_ids"] == [0, 1]

    def test_without_prefix_a_start_token_comes_first_and_is_no_target(self, gpt2):
        batch = CaptionCollator(gpt2, max_length=50, prefix=False)(caption_items(CAPTIONS[:1]))
        ids = gpt2(CAPTIONS[0], add_special_tokens=False)["input_ids"]
        assert batch["input_ids"].tolist() == [[gpt2.bos_token_id, *ids, gpt2.eos_token_id]]
        assert batch["labels"].tolist() == [[-100, *ids, gpt2.eos_token_id]]

    def test_reference_loss_pads_with_end_tokens_that_count(self, gpt2):
        batch = CaptionCollator(gpt2, max_length=12, loss="reference")(caption_items())
        for row, caption in enumerate(CAPTIONS):
            ids = gpt2(caption, add_special_tokens=False)["input_ids"]
            gap = 12 - len(ids)
            assert batch["input_ids"][row].tolist() == [*ids, *[gpt2.eos_token_id] * gap]
            assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * gap
        assert torch.equal(batch["labels"], batch["input_ids"])

    @pytest.mark.parametrize("prefix", [True, False])
    def test_truncation_keeps_the_end_token(self, gpt2, prefix):
        batch = CaptionCollator(gpt2, max_length=4, prefix=prefix)(caption_items())
        assert batch["input_ids"].shape[1] == 4
        assert batch["input_ids"][0, -1] == batch["labels"][0, -1] == gpt2.eos_token_id
        assert batch["attention_mask"][0].tolist() == [1] * 4

    def test_padding_to_max_length(self, gpt2):
        batch = CaptionCollator(gpt2, max_length=30, padding="max_length")(caption_items())
        assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, 30)

    def test_own_padding_token_is_used(self, roberta):
        batch = CaptionCollator(roberta, max_length=30)(caption_items())
        assert batch["input_ids"][1, -1] == roberta.pad_token_id
        assert batch["labels"][1, -1] == -100
        assert roberta.bos_token_id not in batch["input_ids"]

    def test_items_without_caption_give_images_only(self, gpt2):
        items = [{"image_id": 3, "vision_features": torch.zeros(2, 4)}, None]
        batch = CaptionCollator(gpt2, max_length=30)(items)
        assert set(batch) == {"vision_features", "image_ids"}
        assert batch["image_ids"] == [3]

    def test_skipped_items(self, gpt2):
        collate = CaptionCollator(gpt2, max_length=30)
        assert collate([None, caption_items()[1]])["image_ids"] == [1]
        assert collate([None]) is None

    def test_in_workers(self, gpt2):
        loader = DataLoader(caption_items(), batch_size=1, num_workers=1, collate_fn=CaptionCollator(gpt2, 30))
        assert [batch["image_ids"] for batch in loader] == [[0], [1]]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"padding": "left"}, "padding='left'"),
            ({"loss": "mean"}, "loss='mean'"),
            ({"max_length": 1}, "max_length=1"),
            ({"max_length": 2, "prefix": False}, "at least 3"),
        ],
    )
    def test_bad_options(self, gpt2, options, message):
        with pytest.raises(ValueError, match=message):
            CaptionCollator(**{"tokenizer": gpt2, "max_length": 30} | options)

    def test_tokenizer_without_end_token(self):
        with pytest.raises(ValueError, match="no end token"):
            CaptionCollator(PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe("<x>")), max_length=30)


def test_collate_images():
    items = [{"image_id": 5, "pixel_values": torch.zeros(3, 2, 2)}, None]
    batch = collate_images(items)
    assert batch["image_ids"] == [5]
    assert batch["pixel_values"].shape == (1, 3, 2, 2)
    assert collate_images([None]) is None
