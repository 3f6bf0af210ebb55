"""The one place where tests get small inputs: random models that are built in a fraction of a second, the same in
folders with tokenizers, and generated images in COCO's and VQAv2's forms. Nothing is downloaded.
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

from routingvl import RoutingConfig, ViTGPT2ForCaptioning, ViTRobertaForVQA
from routingvl.config.schema import RunConfig, override, run_config_from_dict
from routingvl.data.images import ImagePreprocessor

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "white": (240, 240, 240)}
SPLITS = {"train": 12, "val": 4, "test": 5}
QUESTION = "what color is it?"
STATEMENT = "it is plain"
WIDTH, SIZE, WORDS, POSITIONS = 32, 16, 50, 40  # width, pixels of an image's side, vocabulary, longest text
# Of random weights in memory: large enough for an image, a mask or a word to show in the outputs. Those that are
# trained have transformers' own 0.02.
SPREAD = 0.3


# ------------------------------------------------------------------------------------------------------- random models


def small_vit(width: int = WIDTH) -> ViTModel:
    """Two layers, four patches an image."""
    torch.manual_seed(1)
    shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return ViTModel(ViTConfig(image_size=SIZE, patch_size=8, **shape)).eval()


def small_gpt2(dropout: float = 0.0, *, words: int = WORDS, end: int = WORDS - 1, spread: float = SPREAD):
    """A GPT2LMHeadModel of two layers, whose texts begin and end with token ``end``."""
    torch.manual_seed(2)
    shape = {"vocab_size": words, "n_positions": POSITIONS, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=end, eos_token_id=end, initializer_range=spread, **shape, **drops))


def small_roberta(dropout: float = 0.0, *, words: int = WORDS, spread: float = SPREAD) -> RobertaModel:
    """Two layers; token 1 pads, as in RoBERTa."""
    torch.manual_seed(3)
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    shape |= {"vocab_size": words, "max_position_embeddings": POSITIONS, "type_vocab_size": 1}
    drops = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    return RobertaModel(RobertaConfig(initializer_range=spread, **shape, **drops))


def captioner(config: RoutingConfig | None = None, vit_width: int = WIDTH, **options) -> ViTGPT2ForCaptioning:
    """The captioning model, by default with LoRA of rank 4 and mul."""
    config = RoutingConfig(rank=4, alpha=8, routing="mul") if config is None else config
    return ViTGPT2ForCaptioning.from_backbones(small_vit(vit_width), small_gpt2(), config, **options)


def answerer(config: RoutingConfig | None = None, vit_width: int = WIDTH, **options) -> ViTRobertaForVQA:
    """The model of questions, by default with LoRA of rank 4 and mul, and 7 answers."""
    config = RoutingConfig(rank=4, alpha=8, routing="mul") if config is None else config
    options = {"num_labels": 7} | options
    return ViTRobertaForVQA.from_backbones(small_vit(vit_width), small_roberta(), config, **options)


def randomise(model: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """Give every trained parameter a random value, so that nothing hides behind a zero up-projection."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def batch(rows: int = 3, tokens: int = 6) -> dict[str, torch.Tensor]:
    """pixel_values, input_ids and attention_mask with one padded row."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, tokens // 2 :] = 0
    ids = torch.randint(3, 48, (rows, tokens), generator=generator)
    return {
        "pixel_values": torch.randn(rows, 3, SIZE, SIZE, generator=generator),
        "input_ids": ids.masked_fill(mask == 0, 1),
        "attention_mask": mask,
    }


# ------------------------------------------------------------------------------- folders of backbones and of a data set


def write_tiny(folder: Path) -> Path:
    """Backbones in vit/, roberta/, gpt2/ and data in data/, all below ``folder``."""
    write_backbones(folder)
    write_data(folder / "data")
    return folder


def write_backbones(folder: Path) -> None:
    """Backbones, preprocessing and tokenizers. No dropout: with it a batch and its micro-batches would differ."""
    small_vit().save_pretrained(folder / "vit")
    preprocessor = ImagePreprocessor(size=SIZE).to_dict()
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    words = tokenizer("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    words.save_pretrained(folder / "roberta")
    small_roberta(words=len(words), spread=0.02).save_pretrained(folder / "roberta")
    words = tokenizer("<|endoftext|>")
    words.save_pretrained(folder / "gpt2")
    small_gpt2(words=len(words), end=words.eos_token_id, spread=0.02).save_pretrained(folder / "gpt2")


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
    """Plain coloured images, with two captions, a question and two labelled texts each, in the forms of all tasks.

    The label of ``QUESTION`` is the colour, that of ``STATEMENT`` "true": it takes text and image to know it.
    """
    (folder / "val2014").mkdir(parents=True)
    coco, image_id = [], 100
    for split, count in SPLITS.items():
        questions, labelled = [], []
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
            for text, label in ((QUESTION, colour), (STATEMENT, "true")):
                labelled.append({"id": f"{name}#{label}", "image": f"{name}.jpg", "text": text, "label": label})
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
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    (folder / "dataset_coco.json").write_text(json.dumps({"images": coco, "dataset": "coco"}))
    (folder / "trainval_label2ans.json").write_text(json.dumps(list(COLOURS)))


def tiny_config(folder: Path, output_dir: Path, task: str, **settings: object) -> RunConfig:
    """A few steps on the tiny data; ``settings`` override by name, see :func:`routingvl.config.schema.override`."""
    text = "gpt2" if task == "caption" else "roberta"
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
