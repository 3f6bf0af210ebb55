"""Tiny random vision-language models of transformers: how each is built, where its image is, and a batch for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as hf

WIDTH, VOCABULARY, IMAGE = 32, 100, 99
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": WIDTH,
    "pad_token_id": 0,
    "dropout": 0.0,
}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "dropout_rate": 0.0,
}


class VLM(NamedTuple):
    """build: makes the model; language: its language model; image_from: the module whose output is the image."""

    build: Callable[[], Any]
    language: str
    image_from: str
    targets: tuple[str, ...] = ("q_proj", "v_proj")


def llava() -> Any:
    vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**TEXT)
    options = {"image_token_id": IMAGE, "image_token_index": IMAGE, "vision_feature_layer": -2, "image_seq_length": 4}
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text, **options))


def paligemma() -> Any:
    vision, text = hf.SiglipVisionConfig(**VISION), hf.GemmaConfig(**TEXT, head_dim=8)
    options = {"image_token_index": IMAGE, "projection_dim": WIDTH, "hidden_size": WIDTH}
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, **options)
    return hf.PaliGemmaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "embed_dim": 24,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "patch_size": 8,
        "mlp_ratio": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    ids = {"image_token_id": IMAGE, "vision_start_token_id": 97, "vision_end_token_id": 98, "video_token_id": 96}
    config = hf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **ids)
    return hf.Qwen2VLForConditionalGeneration(config)


def blip2(text: dict[str, Any]) -> Any:
    former = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "encoder_hidden_size": 24,
        "cross_attention_frequency": 1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    options = {"num_query_tokens": 4, "image_token_index": IMAGE, "image_text_hidden_size": 16}
    config = hf.Blip2Config(vision_config=VISION, qformer_config=former, text_config=text, **options)
    return hf.Blip2ForConditionalGeneration(config)


def vision_encoder_decoder() -> Any:
    encoder = hf.ViTConfig(**{**VISION, "hidden_size": WIDTH}, hidden_dropout_prob=0.0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    decoder = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, **rates, **ends)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    model = hf.VisionEncoderDecoderModel(config=config)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    return model


VLMS = {
    "llava": VLM(llava, "model.language_model", "model.multi_modal_projector"),
    "paligemma": VLM(paligemma, "model.language_model", "model.multi_modal_projector"),
    "qwen2_vl": VLM(qwen2_vl, "model.language_model", "model.visual.merger"),
    "blip2_opt": VLM(lambda: blip2(OPT), "language_model", "language_projection"),
    "blip2_t5": VLM(lambda: blip2(T5), "language_model", "language_projection", ("q", "v")),
    "vision_encoder_decoder": VLM(vision_encoder_decoder, "decoder", "encoder", ("c_attn",)),
}


def make(name: str) -> Any:
    """The model ``name`` in evaluation mode, with weights wide enough for differences to show."""
    torch.manual_seed(0)
    model = VLMS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


def batch_for(name: str, images: tuple[int, ...] = (1, 1), seed: int = 1) -> dict[str, torch.Tensor]:
    """A batch with so many images in each row; those of Qwen2-VL have two sizes, by turns."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vision_encoder_decoder":
        labels = torch.randint(3, 90, (len(images), 5), generator=generator)
        return {"pixel_values": torch.randn(len(images), 3, 16, 16, generator=generator), "labels": labels}
    grids = [(1, 4, 4 if index % 2 == 0 else 8) for index in range(sum(images))]
    sizes = iter([t * h * w // 4 if name == "qwen2_vl" else 4 for t, h, w in grids])
    rows = []
    for count in images:
        row = [torch.tensor([5])]
        for _ in range(count):
            row += [torch.tensor([97]), torch.full((next(sizes),), IMAGE), torch.tensor([98])]
        rows.append(torch.cat([*row, torch.randint(3, 90, (5,), generator=generator)]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    labels = ids.masked_fill((ids == IMAGE) | (ids == 0), -100)
    if name == "blip2_t5":
        labels = ids[:, -5:].contiguous()
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    if name == "paligemma":
        batch["token_type_ids"] = (torch.arange(longest) >= longest - 4).long().expand(len(rows), -1).contiguous()
    if name == "qwen2_vl":
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
        if sum(images):
            patches = sum(t * h * w for t, h, w in grids)
            batch["pixel_values"] = torch.randn(patches, 3 * 2 * 8 * 8, generator=generator)
            batch["image_grid_thw"] = torch.tensor(grids)
    elif sum(images):
        batch["pixel_values"] = torch.randn(sum(images), 3, 16, 16, generator=generator)
    return batch
