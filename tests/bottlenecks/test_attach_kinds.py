"""Further vision-language models whose image ``attach`` finds: the module that docs/howto-vlm.md names for each."""

import pytest
import torch
import transformers as hf
from torch.nn.utils.rnn import pad_sequence
from vlms import IMAGE, TEXT, VISION, WIDTH, batch_for

import routingvl
from routingvl import RoutingConfig

ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
IDS = {"image_token_id": IMAGE, "vision_start_token_id": 97, "vision_end_token_id": 98, "video_token_id": 96}
PATCHES = {"depth": 2, "hidden_size": 24, "out_hidden_size": WIDTH, "num_heads": 2, "patch_size": 8}
PATCHES |= {"intermediate_size": 32, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
PROJECTOR, MERGER = "model.multi_modal_projector", "model.visual.merger"


def gemma3():
    text = hf.Gemma3TextConfig(**TEXT, head_dim=8, query_pre_attn_scalar=8)
    parts = {"text_config": text, "vision_config": hf.SiglipVisionConfig(**VISION)}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(**parts, mm_tokens_per_image=4, image_token_index=IMAGE))


def smolvlm():
    parts = {"text_config": hf.LlamaConfig(**TEXT), "vision_config": {"model_type": "smolvlm_vision", **VISION}}
    return hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(**parts, scale_factor=1, image_token_id=IMAGE))


def internvl():
    vision = {**VISION, "image_size": [32, 32], "patch_size": [8, 8]}
    parts = {"text_config": hf.Qwen2Config(**TEXT), "vision_config": vision}
    return hf.InternVLForConditionalGeneration(hf.InternVLConfig(**parts, image_token_id=IMAGE, image_seq_length=4))


def llava_next():
    parts = {"text_config": hf.LlamaConfig(**TEXT), "vision_config": hf.CLIPVisionConfig(**VISION)}
    sizes = [[16, 32], [32, 16]]
    config = hf.LlavaNextConfig(**parts, image_token_index=IMAGE, image_grid_pinpoints=sizes, vision_feature_layer=-2)
    return hf.LlavaNextForConditionalGeneration(config)


def qwen2_5_vl():
    vision = PATCHES | {"window_size": 32, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=vision, **IDS)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    vision = PATCHES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    text = TEXT | {"head_dim": 8, "rope_parameters": ROPE}
    return hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(text_config=text, vision_config=vision, **IDS))


def packed_tokens(model):
    """For LLaVA-NeXT, which puts tiles and line ends together behind its projector: the tokens as they stand."""

    def image(call):
        if call.get("pixel_values") is None:
            return None
        images = {name: call[name] for name in ("pixel_values", "image_sizes")}
        tokens = model.get_image_features(**images).pooler_output  # of each image [n, d]
        mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in tokens], batch_first=True)
        return pad_sequence(list(tokens), batch_first=True), mask

    return image


MODELS = {
    gemma3: PROJECTOR,
    smolvlm: "model.connector",
    internvl: PROJECTOR,
    llava_next: packed_tokens,
    qwen2_5_vl: MERGER,
    qwen3_vl: MERGER,
}


def batch_of(build):
    """Two rows with an image each."""
    if build in (qwen2_5_vl, qwen3_vl):
        return batch_for("qwen2_vl")
    batch, pixels = batch_for("llava"), torch.Generator().manual_seed(1)
    side = 32 if build is internvl else 16
    tiles = {smolvlm: (2, 1), llava_next: (2, 3)}.get(build, (2,))
    batch["pixel_values"] = torch.randn(*tiles, 3, side, side, generator=pixels)
    if build is gemma3:
        batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    if build is llava_next:  # the whole in 4 tokens, two tiles in 8, two ends of lines
        batch["image_sizes"] = torch.tensor([[16, 32]] * 2)
        row = torch.tensor([5, *[IMAGE] * 14, 7, 8])
        batch |= {"input_ids": torch.stack([row, row + 0]), "attention_mask": torch.ones(2, len(row), dtype=torch.long)}
    batch.pop("labels")
    return batch


@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_each_row_reads_its_own_image(build):
    torch.manual_seed(0)
    model, batch, source = build().eval(), batch_of(build), MODELS[build]
    routingvl.inject(model, RoutingConfig(routing="mul", rank=4, alpha=32, targets=("q_proj", "v_proj")))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.15)
        routingvl.attach(model, source(model) if callable(source) else source)
        other = batch | {"pixel_values": batch["pixel_values"].clone()}
        other["pixel_values"][len(other["pixel_values"]) // 2 :] += 1
        with_image, with_another = model(**batch).logits, model(**other).logits
        with routingvl.disable(model):
            base = model(**batch).logits
        text = model.generate(**batch, num_beams=2, do_sample=False, max_new_tokens=3, suppress_tokens=[IMAGE])
    torch.testing.assert_close(with_image[0], with_another[0])
    assert not torch.allclose(with_image[1], with_another[1], atol=1e-2)
    assert not torch.allclose(with_image, base, atol=1e-2)
    assert len(text) == 2
