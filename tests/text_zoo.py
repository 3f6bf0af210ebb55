"""Tiny random language models of every family, by ``model_type``: (builder, the projections a user would name)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from tiny import WIDTH
from torch import nn

WORDS, LAYERS, HEADS = 64, 2, 4
TOKENS = {"vocab_size": WORDS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {
    **TOKENS,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
ENCODER = SIZES | NO_DROPOUT | {"num_labels": 3}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
BART = {
    **TOKENS,
    "d_model": WIDTH,
    "dropout": 0.0,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **{f"{stack}_layers": LAYERS for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": HEADS for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": 48 for stack in ("encoder", "decoder")},
}
T5 = {
    **TOKENS,
    "d_model": WIDTH,
    "d_kv": WIDTH // HEADS,
    "d_ff": 48,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
DEBERTA = {
    **{key: value for key, value in ENCODER.items() if key not in ("bos_token_id", "eos_token_id")},
    "pooler_dropout": 0.0,
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
DISTILBERT = {
    **TOKENS,
    **{"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 48, "max_position_embeddings": 64},
    **{"num_labels": 3, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
}
GPT2 = {
    **TOKENS,
    **{"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
OPT = {
    **{key: value for key, value in SIZES.items() if key != "intermediate_size"},
    **{"ffn_dim": 48, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
}
QUERY_VALUE = ("q_proj", "v_proj")

# model_type -> class of transformers, settings, targets
_ROWS = {
    "roberta": ("RobertaForSequenceClassification", ENCODER | {"type_vocab_size": 1}, ("query", "value")),
    "xlm-roberta": ("XLMRobertaForSequenceClassification", ENCODER, ("query", "value")),
    "camembert": ("CamembertForSequenceClassification", ENCODER, ("query", "value")),
    "bert": ("BertForSequenceClassification", ENCODER, ("query", "value")),
    "electra": ("ElectraForSequenceClassification", ENCODER | {"embedding_size": 16}, ("query", "value")),
    "deberta-v2": ("DebertaV2ForSequenceClassification", DEBERTA, ("query_proj", "value_proj")),
    "deberta": ("DebertaForSequenceClassification", DEBERTA, ("in_proj",)),
    "distilbert": ("DistilBertForSequenceClassification", DISTILBERT, ("q_lin", "v_lin")),
    "modernbert": (
        "ModernBertForSequenceClassification",
        SIZES | {"num_labels": 3, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 16},
        ("Wqkv",),
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2, ("c_attn",)),
    "opt": ("OPTForCausalLM", OPT, QUERY_VALUE),
    "gpt_neox": ("GPTNeoXForCausalLM", SIZES, ("query_key_value",)),
    "phi": ("PhiForCausalLM", SIZES, QUERY_VALUE),
    "phi3": ("Phi3ForCausalLM", SIZES | {"num_key_value_heads": 2}, ("qkv_proj",)),
    "llama": ("LlamaForCausalLM", GROUPED, QUERY_VALUE),
    "mistral": ("MistralForCausalLM", GROUPED, QUERY_VALUE),
    "qwen2": ("Qwen2ForCausalLM", {k: v for k, v in GROUPED.items() if k != "head_dim"}, QUERY_VALUE),
    "qwen3": ("Qwen3ForCausalLM", GROUPED, QUERY_VALUE),
    "smollm3": ("SmolLM3ForCausalLM", {k: v for k, v in GROUPED.items() if k != "head_dim"}, QUERY_VALUE),
    "gemma": ("GemmaForCausalLM", GROUPED, QUERY_VALUE),
    "gemma2": ("Gemma2ForCausalLM", GROUPED | {"query_pre_attn_scalar": 8}, QUERY_VALUE),
    "gemma3_text": ("Gemma3ForCausalLM", GROUPED | {"query_pre_attn_scalar": 8}, QUERY_VALUE),
    "bart": ("BartForConditionalGeneration", BART, QUERY_VALUE),
    "mbart": ("MBartForConditionalGeneration", BART, QUERY_VALUE),
    "t5": ("T5ForConditionalGeneration", T5, ("q", "v")),
    "mt5": ("MT5ForConditionalGeneration", T5 | {"feed_forward_proj": "gated-gelu"}, ("q", "v")),
}
TARGETS = {kind: targets for kind, (_, _, targets) in _ROWS.items()}


def text_model(kind: str) -> nn.Module:
    """The model in evaluation mode, with weights wide enough that differences show."""
    name, settings, _ = _ROWS[kind]
    model_class = getattr(transformers, name)
    return _wide(lambda: model_class(model_class.config_class(**settings)))


def _wide(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model


def text_batch(kind: str, rows: int = 3) -> dict[str, torch.Tensor]:
    """A batch with labels: classes, the text itself, or another text, as the model takes them."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, WORDS, (rows, 6), generator=generator)
    name = _ROWS[kind][0]
    if name.endswith("SequenceClassification"):
        labels = torch.arange(rows) % 3
    else:
        labels = (
            ids if name.endswith(("LM", "LMHeadModel")) else torch.randint(3, WORDS, (rows, 5), generator=generator)
        )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def generates(kind: str) -> bool:
    """Whether the model writes texts."""
    return not _ROWS[kind][0].endswith("SequenceClassification")


def vision_language_model(kind: str) -> nn.Module:
    """A tiny LLaVA, PaliGemma, Qwen2-VL, BLIP-2 (with OPT or T5) or VisionEncoderDecoder."""
    text = GROUPED | {"vocab_size": 100}
    sees = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    sees |= {"image_size": 16, "patch_size": 8}
    t = transformers
    if kind == "llava":
        parts = {"vision_config": t.CLIPVisionConfig(**sees), "text_config": t.LlamaConfig(**text)}
        return _wide(lambda: t.LlavaForConditionalGeneration(t.LlavaConfig(**parts, image_token_index=99)))
    if kind == "paligemma":
        parts = {"vision_config": t.SiglipVisionConfig(**sees), "text_config": t.GemmaConfig(**text)}
        config = t.PaliGemmaConfig(**parts, image_token_index=99, projection_dim=WIDTH, hidden_size=WIDTH)
        return _wide(lambda: t.PaliGemmaForConditionalGeneration(config))
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        vision = {"depth": 2, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
        if kind == "qwen2_vl":
            vision |= {"embed_dim": 24, "mlp_ratio": 2, "temporal_patch_size": 2}
        else:
            vision |= {"out_hidden_size": WIDTH, "intermediate_size": 32, "temporal_patch_size": 2}
        prefix = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
        config = getattr(t, f"{prefix}Config")(text_config=text | ROPE, vision_config=vision)
        return _wide(lambda: getattr(t, f"{prefix}ForConditionalGeneration")(config))
    if kind.startswith("blip-2"):
        settings = {"model_type": "t5", **T5} if kind.endswith("t5") else {"model_type": "opt", **OPT}
        former = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        former |= {"encoder_hidden_size": 24, "cross_attention_frequency": 1, "vocab_size": WORDS}
        config = t.Blip2Config(vision_config=sees, qformer_config=former, text_config=settings, num_query_tokens=4)
        return _wide(lambda: t.Blip2ForConditionalGeneration(config))
    vision = t.ViTModel(t.ViTConfig(**sees | {"hidden_size": WIDTH}))
    decoder = {"gpt2": (t.GPT2LMHeadModel, t.GPT2Config(**GPT2, add_cross_attention=True))}
    decoder["bert"] = t.BertLMHeadModel, t.BertConfig(**SIZES, **NO_DROPOUT, is_decoder=True, add_cross_attention=True)
    model_class, config = decoder[kind.removeprefix("vit-")]
    return _wide(lambda: t.VisionEncoderDecoderModel(encoder=vision, decoder=model_class(config)))
