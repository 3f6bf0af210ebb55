"""Tiny inputs for end-to-end tests: random backbones of width 32 with their tokenizers, and generated images in COCO's
and VQAv2's forms. Everything is made in a folder of the test; nothing is downloaded.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from routingvl.config.schema import RunConfig, override, run_config_from_dict
from routingvl.data.images import ImagePreprocessor

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "white": (240, 240, 240)}
SPLITS = {"train": 12, "val": 4, "test": 5}
QUESTION = "what color is it?"
WIDTH, SIZE = 32, 16


def write_tiny(folder: Path) -> Path:
    """Backbones in vit/, roberta/, gpt2/ and data in data/, all below ``folder``."""
    write_backbones(folder)
    write_data(folder / "data")
    return folder


def write_backbones(folder: Path) -> None:
    torch.manual_seed(0)
    # No dropout of the backbones' own: it would make a batch and its pieces differ.
    silent = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    common = silent | {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 2 * WIDTH,
    }
    vit = ViTModel(ViTConfig(image_size=SIZE, patch_size=8, **common))
    vit.save_pretrained(folder / "vit")
    preprocessor = ImagePreprocessor(size=SIZE).to_dict()
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    roberta = tokenizer("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    roberta.save_pretrained(folder / "roberta")
    RobertaModel(
        RobertaConfig(vocab_size=len(roberta), max_position_embeddings=40, pad_token_id=1, type_vocab_size=1, **common)
    ).save_pretrained(folder / "roberta")
    gpt2 = tokenizer("<|endoftext|>")
    gpt2.save_pretrained(folder / "gpt2")
    config = GPT2Config(
        vocab_size=len(gpt2),
        n_positions=40,
        n_embd=WIDTH,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=gpt2.bos_token_id,
        eos_token_id=gpt2.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the tiny texts, in RoBERTa's form (five special tokens) or GPT-2's (one)."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    texts = [QUESTION, *(caption(colour, i) for colour in COLOURS for i in range(2))]
    bpe.train_from_iterator(texts, vocab_size=300, min_frequency=1, special_tokens=list(special), show_progress=False)
    if len(special) == 1:
        return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=special[0], eos_token=special[0])
    start, _, end = special[:3]
    bpe._tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, bpe.token_to_id(token)) for token in (start, end)]
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, cls_token=start, sep_token=end, **names)


def caption(colour: str, variant: int) -> str:
    return (f"a {colour} square", f"the square is {colour} and plain")[variant]


def write_data(folder: Path) -> None:
    """Plain coloured images, two captions and one question each; Karpathy's split in both tasks' forms."""
    (folder / "val2014").mkdir(parents=True)
    coco, image_id = [], 100
    for split, count in SPLITS.items():
        questions = []
        for i in range(count):
            image_id += 1
            colour = list(COLOURS)[i % len(COLOURS)]
            name = f"COCO_val2014_{image_id:012d}"
            Image.new("RGB", (24, 20), COLOURS[colour]).save(folder / "val2014" / f"{name}.jpg")
            coco.append(
                {
                    "filepath": "val2014",
                    "filename": f"{name}.jpg",
                    "imgid": image_id - 101,
                    "cocoid": image_id,
                    "split": split,
                    "sentids": [2 * image_id, 2 * image_id + 1],
                    "sentences": [
                        {"raw": caption(colour, v), "tokens": caption(colour, v).split(), "sentid": 2 * image_id + v}
                        for v in range(2)
                    ],
                }
            )
            questions.append(
                {
                    "img_id": name,
                    "question_id": 1000 * image_id,
                    "sent": QUESTION,
                    "label": {colour: 1.0},
                    "answers": [{"answer": colour, "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)],
                    "question_type": "what color",
                    "answer_type": "other",
                }
            )
        (folder / f"karpathy_{split}.json").write_text(json.dumps(questions))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": coco, "dataset": "coco"}))
    (folder / "trainval_label2ans.json").write_text(json.dumps(list(COLOURS)))


def tiny_config(folder: Path, output_dir: Path, task: str, **settings: object) -> RunConfig:
    """A few steps on the tiny data; ``settings`` override by name, see :func:`routingvl.config.schema.override`."""
    text = "roberta" if task == "vqa" else "gpt2"
    config = run_config_from_dict(
        {
            "task": task,
            "output_dir": str(output_dir),
            "device": "cpu",
            "model": {"vision": str(folder / "vit"), "text": str(folder / text)},
            "routing": {"routing": "mul", "rank": 4, "alpha": 4},
            "data": {"annotations": str(folder / "data"), "images": str(folder / "data"), "max_text_length": 12},
            "train": {"lr": 1e-2, "max_steps": 6, "batch_size": 6, "log_every": 1, "eval_every": 0},
            "eval": {"num_beams": 2, "max_new_tokens": 8, "batch_size": 4},
        }
    )
    return override(config, **settings)
