"""Small frozen backbones for the demo: a ViT that has only seen images, language models that have only read text.

They are transformers' own classes, pretrained here in about a minute, saved with ``save_pretrained`` beside a tokenizer
or ``preprocessor_config.json``, and later loaded by folder like any published checkpoint. No pretraining example is
shared with the demo's data: scenes are drawn anew from another seed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from routingvl.atomic_files import replacing
from routingvl.data.collate import IGNORED
from routingvl.demo import shapes
from routingvl.demo.pool import worker_pool

PIXEL_MEAN = PIXEL_STD = 0.5
_SEED_OFFSET = 1_000_000  # keeps pretraining draws apart from the data set's, which are seeded [seed, split]
ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")  # ids 0 to 4, as in the published vocabulary
_GPT2_SPECIALS = ("<|endoftext|>",)


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes and pretraining recipes; the defaults were found for two CPU cores (docs/demo.md)."""

    seed: int = 0
    width: int = 128
    mlp_width: int = 256
    heads: int = 4
    vision_layers: int = 4
    text_layers: int = 3
    max_positions: int = 64
    examples: int = 8000
    vision_steps: int = 500
    vision_batch: int = 64
    mlm_steps: int = 400
    mlm_batch: int = 64
    lm_steps: int = 300
    lm_batch: int = 64
    lr: float = 1e-3


def build_backbones(root: str | Path, config: BackboneConfig) -> dict[str, Any]:
    """Pretrain ``root/vit``, ``root/roberta`` and ``root/gpt2``, or keep them when they were made with this ``config``.

    Returns:
        {"vit": {...}, "roberta": {...}, "gpt2": {...}}: held-out quality, parameters and seconds of each.
    """
    root = Path(root)
    summary_file = root / "quality.json"
    if summary_file.is_file():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        if summary["config"] == asdict(config):
            return summary["quality"]
    # The ViT takes about as long as both language models: one process and one core each.
    groups = ("vit",), ("roberta", "gpt2")
    with replacing(root) as partial, worker_pool(len(groups)) as pool:
        partial.mkdir()
        futures = [pool.submit(_pretrain_group, group, str(partial), config) for group in groups]
        quality = {name: result for future in futures for name, result in future.result().items()}
        summary = {"config": asdict(config), "quality": quality}
        (partial / summary_file.name).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return quality


def _pretrain_group(names: tuple[str, ...], root: str, config: BackboneConfig) -> dict[str, Any]:
    recipes = {"vit": pretrain_vit, "roberta": pretrain_roberta, "gpt2": pretrain_gpt2}
    results = {}
    for name in names:
        started = time.perf_counter()
        results[name] = recipes[name](Path(root) / name, config)
        results[name]["seconds"] = round(time.perf_counter() - started, 1)
    return results


def pretrain_vit(folder: Path, config: BackboneConfig) -> dict[str, Any]:
    """Train a ViT to tell, for each colour, its shape or that it is absent, its row and its column; save it.

    One linear head reads ``pooler_output``, the feature that the demo's language models get, and is thrown away.
    """
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed + _SEED_OFFSET)
    pixels, targets = _labelled_images(config.examples, rng)
    vit = ViTModel(
        ViTConfig(
            hidden_size=config.width,
            num_hidden_layers=config.vision_layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            image_size=shapes.IMAGE_SIZE,
            patch_size=shapes.CELL,
            # The usual .02 leaves a net of this width without signal for hundreds of steps.
            initializer_range=0.06,
        )
    )
    # A patch is a cell, so where it lies is half of the task: position has to be loud from the first step.
    nn.init.normal_(vit.embeddings.position_embeddings, std=0.5)
    head = nn.Linear(config.width, len(shapes.COLOURS) * _CLASSES_PER_COLOUR)

    def loss_of(rows: Tensor) -> Tensor:
        logits = head(vit(pixel_values=pixels[rows]).pooler_output)
        return sum(
            nn.functional.cross_entropy(part.flatten(0, 1), targets[rows, :, index].flatten(), ignore_index=IGNORED)
            for index, part in enumerate(_split_head(logits))
        )

    _optimise([vit, head], loss_of, len(pixels), config.vision_steps, config.vision_batch, config.lr, "cosine")
    accuracy = _vit_accuracy(vit.eval(), head, *_labelled_images(1000, rng))
    vit.save_pretrained(folder)
    _write_preprocessor(folder)
    return {"parameters": count_parameters(vit), **accuracy}


_HEAD_PARTS = (1 + len(shapes.SHAPES), len(shapes.ROWS), len(shapes.COLUMNS))  # absent or shape, row, column
_CLASSES_PER_COLOUR = sum(_HEAD_PARTS)


def _split_head(logits: Tensor) -> tuple[Tensor, ...]:
    """[N, colours * classes] into the three [N, colours, classes] logits of shape, row and column."""
    return logits.unflatten(-1, (len(shapes.COLOURS), _CLASSES_PER_COLOUR)).split(_HEAD_PARTS, dim=-1)


def _labelled_images(count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Fresh scenes as normalised pixels [N, 3, 36, 36] and targets [N, colours, 3].

    The three targets of a colour are 0 for absent or 1 + its shape, its row, and its column (both ignored when absent).
    """
    scenes = shapes.draw_scenes(count, rng)
    pixels = torch.from_numpy(shapes.render(scenes, rng)).permute(0, 3, 1, 2).float().div(255)
    targets = torch.full((count, len(shapes.COLOURS), 3), IGNORED)
    targets[..., 0] = 0
    colours = list(shapes.COLOURS)
    for target, scene in zip(targets, scenes, strict=True):
        for item in scene:
            places = [
                1 + shapes.SHAPES.index(item.shape),
                shapes.ROWS.index(item.row),
                shapes.COLUMNS.index(item.column),
            ]
            target[colours.index(item.colour)] = torch.tensor(places)
    return (pixels - PIXEL_MEAN) / PIXEL_STD, targets


@torch.no_grad()
def _vit_accuracy(vit: nn.Module, head: nn.Module, pixels: Tensor, targets: Tensor) -> dict[str, float]:
    logits = head(vit(pixel_values=pixels).pooler_output)
    accuracy = {}
    for index, (name, part) in enumerate(
        zip(("presence and shape", "row", "column"), _split_head(logits), strict=True)
    ):
        truth = targets[..., index]
        asked = truth != IGNORED
        accuracy[f"{name} accuracy"] = (part.argmax(-1) == truth)[asked].float().mean().item()
    return accuracy


def _write_preprocessor(folder: Path) -> None:
    content = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": shapes.IMAGE_SIZE, "width": shapes.IMAGE_SIZE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [PIXEL_MEAN] * 3,
        "image_std": [PIXEL_STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def pretrain_roberta(folder: Path, config: BackboneConfig) -> dict[str, Any]:
    """Train a RoBERTa by masked language modelling on questions without images; save it and its BPE.

    The pooler, which masked language modelling does not use, is saved untrained: so it is in ``roberta-base``.
    """
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaModel, RobertaTokenizer

    torch.manual_seed(config.seed)
    questions = [question.text for question in text_corpus(config)[1]]
    tokenizer = RobertaTokenizer(**train_bpe(questions, ROBERTA_SPECIALS), add_prefix_space=True)
    model = RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_positions + 2,  # RoBERTa starts counting behind its padding id, 1
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    train, held_out = encoded(tokenizer, questions, tokenizer.pad_token_id)

    def loss_of(examples: Tensor) -> Tensor:
        masked, labels = _mask(examples, tokenizer)
        attention_mask = (examples != tokenizer.pad_token_id).long()
        return model(input_ids=masked, attention_mask=attention_mask, labels=labels).loss

    _optimise(
        [model], lambda rows: loss_of(train[rows]), len(train), config.mlm_steps, config.mlm_batch, config.lr, "linear"
    )
    held_out_loss = _evaluate(model, loss_of, held_out)
    encoder = RobertaModel(model.config)
    encoder.load_state_dict(model.roberta.state_dict(), strict=False)
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "parameters": count_parameters(encoder),
        "masked language model loss (nats)": held_out_loss,
        "vocabulary": len(tokenizer),
    }


def pretrain_gpt2(folder: Path, config: BackboneConfig) -> dict[str, Any]:
    """Train a GPT-2 as a language model of captions without images; save it and its BPE."""
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

    torch.manual_seed(config.seed)
    captions, _ = text_corpus(config)
    tokenizer = GPT2Tokenizer(**train_bpe(captions, _GPT2_SPECIALS), add_prefix_space=True)
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=config.width,
            n_inner=config.mlp_width,
            activation_function="gelu_pytorch_tanh",  # gelu_new in one fused operation
            n_layer=config.text_layers,
            n_head=config.heads,
            n_positions=config.max_positions,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    sentences = [f"{tokenizer.eos_token}{caption}{tokenizer.eos_token}" for caption in captions]
    train, held_out = encoded(tokenizer, sentences, IGNORED)

    def loss_of(examples: Tensor) -> Tensor:
        ignored = examples == IGNORED
        attention_mask = (~ignored).long()
        return model(input_ids=examples.masked_fill(ignored, end), attention_mask=attention_mask, labels=examples).loss

    held_out_loss = train_and_save(folder, model, tokenizer, loss_of, train, held_out, config)
    return {
        "parameters": count_parameters(model),
        "language model loss (nats)": held_out_loss,
        "vocabulary": len(tokenizer),
    }


def text_corpus(config: BackboneConfig) -> tuple[list[str], list[shapes.Question]]:
    """Captions and questions, equally many, about freshly drawn scenes."""
    rng = np.random.default_rng(config.seed + 2 * _SEED_OFFSET)
    scenes = shapes.draw_scenes(config.examples, rng)
    captions = [shapes.captions(scene)[0] for scene in scenes]
    questions = [question for _, question in shapes.balanced_questions(scenes, config.examples, rng)]
    return captions, [questions[place] for place in rng.permutation(len(questions))]


def train_bpe(sentences: list[str], specials: tuple[str, ...]) -> dict[str, Any]:
    """A byte-level BPE as ``vocab`` and ``merges``; the corpus is small enough for every word to become one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def encoded(tokenizer: Any, sentences: list[str], pad_value: int, held_out: int = 500) -> tuple[Tensor, Tensor]:
    """Token ids [N, T] of the sentences, right padded with ``pad_value``: a training part and a held-out part."""
    rows = [torch.tensor(ids) for ids in tokenizer(sentences)["input_ids"]]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_value)
    order = torch.randperm(len(ids))
    held_out = min(held_out, len(ids) // 4)
    return ids[order[held_out:]], ids[order[:held_out]]


def _mask(ids: Tensor, tokenizer: Any, probability: float = 0.15) -> tuple[Tensor, Tensor]:
    """BERT's masking of ids [N, T]: of the chosen tokens 80 % become the mask, 10 % a random token, 10 % stay."""
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape) < probability) & ~special
    labels = ids.masked_fill(~chosen, IGNORED)
    fate = torch.rand(ids.shape)
    masked = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    random_ids = torch.randint(len(ROBERTA_SPECIALS), len(tokenizer), ids.shape)
    return torch.where(chosen & (fate >= 0.9), random_ids, masked), labels


def _optimise(
    modules: list[nn.Module],
    loss_of: Callable[[Tensor], Tensor],
    examples: int,
    steps: int,
    batch_size: int,
    lr: float,
    schedule: str,
) -> None:
    """AdamW with 5 % warm-up and a cosine or linear decay to zero; ``loss_of`` gets the row numbers of a batch."""
    parameters = [parameter for module in modules for parameter in module.train().parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    warmup = max(1, round(0.05 * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    batches = _endless_batches(examples, batch_size)
    for _ in range(steps):
        loss = loss_of(next(batches))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        scheduler.step()


def _endless_batches(examples: int, batch_size: int) -> Iterator[Tensor]:
    while True:
        yield from torch.randperm(examples).split(batch_size)


def train_and_save(
    folder: Path,
    model: nn.Module,
    tokenizer: Any,
    loss_of: Callable[[Tensor], Tensor],
    train: Tensor,
    held_out: Tensor,
    config: BackboneConfig,
) -> float:
    """Train a language model that writes on texts ``train``, and save both; returns the loss on ``held_out``."""
    _optimise(
        [model], lambda rows: loss_of(train[rows]), len(train), config.lm_steps, config.lm_batch, config.lr, "linear"
    )
    loss = _evaluate(model, loss_of, held_out)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


@torch.no_grad()
def _evaluate(model: nn.Module, loss_of: Callable[[Tensor], Tensor], examples: Tensor) -> float:
    model.eval()
    return loss_of(examples).item()


def count_parameters(model: nn.Module) -> int:
    """How many weights a model has."""
    return sum(parameter.numel() for parameter in model.parameters())
