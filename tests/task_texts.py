"""Tiny random language models of many kinds, with tokenizers in the form of each, in folders as users have them."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
import transformers
from tiny import COLOURS, QUESTION, STATEMENT, caption
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WIDTH, POSITIONS = 32, 40
SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SHAPE |= {"max_position_embeddings": POSITIONS}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BOTH = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 48))}
BOTH |= {"d_model": WIDTH, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
BOTH |= {"max_position_embeddings": POSITIONS}
# Special tokens in the order of their ids: what begins a text, what ends it, what fills it up. What the tokenizer adds.
LLAMA = (["<unk>", "<s>", "</s>"], {"bos_token": "<s>", "eos_token": "</s>"}, "<s> $A")
BERT = (
    ["[PAD]", "[CLS]", "[SEP]"],
    {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    "[CLS] $A [SEP]",
)
BART = (
    ["<s>", "<pad>", "</s>"],
    {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"},
    "<s> $A </s>",
)
# name -> (class, config's class, its settings, tokenizer, the projections that LoRA adapts)
KINDS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, LLAMA, ["q_proj", "v_proj"]),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, LLAMA, ["q_proj", "v_proj"]),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED, LLAMA, ["q_proj", "v_proj"]),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GROUPED | {"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
        LLAMA,
        ["q_proj", "v_proj"],
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", SHAPE, LLAMA, ["q_proj", "v_proj"]),  # its head has a bias
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "dropout": 0.0}
        | {"max_position_embeddings": POSITIONS, "word_embed_proj_dim": WIDTH},
        (["<s>", "<pad>", "</s>"], {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}, "</s> $A"),
        ["q_proj", "v_proj"],
    ),
    "bert": ("BertForMaskedLM", "BertConfig", SHAPE | STILL, BERT, ["query", "value"]),
    "electra": ("ElectraForPreTraining", "ElectraConfig", SHAPE | STILL | {"embedding_size": WIDTH}, BERT, ["query"]),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}
        | {"max_position_embeddings": POSITIONS},
        BERT,
        ["q_lin", "v_lin"],
    ),
    "deberta-v3": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        SHAPE | STILL | {"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
        | {"pos_att_type": "p2c|c2p", "position_biased_input": False, "type_vocab_size": 0, "share_att_key": True},
        BERT,
        ["attention.output.dense"],
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        SHAPE | {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        BERT,
        ["Wqkv"],
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0},
        (["<pad>", "</s>", "<unk>"], {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A </s>"),
        ["q", "v"],
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        BOTH | {"decoder_start_token_id": 2},
        BART,
        ["q_proj", "v_proj"],
    ),
    "mbart": (
        "MBartForConditionalGeneration",
        "MBartConfig",
        BOTH,
        (["<s>", "<pad>", "</s>", "en_XX"], BART[1], "$A </s> en_XX"),
        ["q_proj", "v_proj"],
    ),
}  # fmt: skip
DECODERS = ["llama", "qwen3", "gemma", "gemma2", "phi", "opt"]
ENCODERS = ["bert", "electra", "distilbert", "deberta-v3", "modernbert"]
SEQ2SEQ = ["t5", "bart", "mbart"]


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE over the tiny texts, with the special tokens of this kind of model."""
    special, names, template = KINDS[kind][3]
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    texts = [QUESTION, STATEMENT, *(caption(colour, i) for colour in COLOURS for i in range(2))]
    bpe.train_from_iterator(texts, vocab_size=300, min_frequency=1, special_tokens=special, show_progress=False)
    added = [(token, bpe.token_to_id(token)) for token in special if token in template]
    pair = template.replace("$A [SEP]", "$A [SEP] $B:1 [SEP]:1") if "[SEP]" in template else f"{template} $B"
    bpe._tokenizer.post_processor = TemplateProcessing(single=template, pair=pair, special_tokens=added)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)


def config_of(kind: str, words: PreTrainedTokenizerFast, **changes: object) -> transformers.PretrainedConfig:
    """The config of a tiny model, whose special tokens are the tokenizer's."""
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return getattr(transformers, KINDS[kind][1])(vocab_size=len(words), **KINDS[kind][2] | ids | changes)


def text_model(kind: str, words: PreTrainedTokenizerFast | None = None, **changes: object) -> torch.nn.Module:
    """A tiny model in evaluation mode, whose weights are wide enough for an image to show in the outputs."""
    torch.manual_seed(7)
    model = getattr(transformers, KINDS[kind][0])(config_of(kind, words or tokenizer(kind), **changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 or name == "lm_head.bias":
                weight.normal_(std=0.15)
    return model.eval()


def text_body(kind: str, **changes: object) -> torch.nn.Module:
    """The same weights without a head, in the class that reads texts (with a random pooler, where it has one)."""
    whole = text_model(kind, **changes)
    body = transformers.AutoModel.from_config(whole.config)
    lacking = body.load_state_dict(whole.base_model.state_dict(), strict=False).missing_keys
    assert all(name.startswith("pooler.") for name in lacking)
    return body.eval()


def write_text_model(folder: Path, kind: str) -> Path:
    """Model and tokenizer as a folder of transformers."""
    words = tokenizer(kind)
    words.save_pretrained(folder)
    text_model(kind, words).save_pretrained(folder)
    return folder
