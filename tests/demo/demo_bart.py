"""A tiny BART that has read the texts of the demo, in the form of the demo's own backbones."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration, RobertaTokenizer

from routingvl.data.collate import IGNORED
from routingvl.demo.backbones import (
    ROBERTA_SPECIALS,
    BackboneConfig,
    count_parameters,
    encoded,
    text_corpus,
    train_and_save,
    train_bpe,
)


def pretrain_bart(folder: Path, config: BackboneConfig) -> dict[str, Any]:
    """Train a BART to write captions, questions and answers again of which some words, few or all, are masked; save it.

    Steps and batch are those of the demo's language model; its comparison has no encoder-decoder.
    """
    torch.manual_seed(config.seed)
    captions, questions = text_corpus(config)
    sentences = captions + [text for question in questions for text in (question.text, question.answer)]
    tokenizer = RobertaTokenizer(**train_bpe(sentences, ROBERTA_SPECIALS), add_prefix_space=True)
    stacks = {f"{stack}_layers": config.text_layers for stack in ("encoder", "decoder")}
    stacks |= {f"{stack}_attention_heads": config.heads for stack in ("encoder", "decoder")}
    stacks |= {f"{stack}_ffn_dim": config.mlp_width for stack in ("encoder", "decoder")}
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(tokenizer),
            d_model=config.width,
            max_position_embeddings=config.max_positions,
            dropout=0.0,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=pad,
            eos_token_id=end,
            decoder_start_token_id=end,
            forced_eos_token_id=None,
            **stacks,
        )
    )
    train, held_out = encoded(tokenizer, sentences, pad)

    def loss_of(examples: Tensor) -> Tensor:
        words = ~torch.isin(examples, torch.tensor(tokenizer.all_special_ids))
        hidden = words & (torch.rand(examples.shape) < torch.rand(len(examples), 1))
        masked, real = examples.masked_fill(hidden, tokenizer.mask_token_id), examples != pad
        return model(input_ids=masked, attention_mask=real.long(), labels=examples.masked_fill(~real, IGNORED)).loss

    held_out_loss = train_and_save(folder, model, tokenizer, loss_of, train, held_out, config)
    return {"parameters": count_parameters(model), "denoising loss (nats)": held_out_loss, "vocabulary": len(tokenizer)}
