"""Vision towers: what is taken of a ViT, another tower as one more row, and folders of kinds that have none."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from tiny import tiny_config, write_tiny
from training_runs import losses
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Swinv2Config,
    Swinv2Model,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from routingvl.backbones.loading import BackboneError
from routingvl.backbones.vision import FEATURES, TOWERS, VisionTower, image_features, load_tower, tower_width
from routingvl.cache_features import cache_features
from routingvl.config import ConfigError
from routingvl.data.images import ImagePreprocessor
from routingvl.evaluate import evaluate
from routingvl.models import load_pretrained
from routingvl.train import train

WIDTH, SIZE = 24, 16  # another width than the language model's, so that it is projected
SHAPE = {
    "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "image_size": SIZE, "patch_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def save(model, folder):
    """Save a tower with its preprocessing; returns the folder."""
    model.save_pretrained(folder)
    preprocessing = ImagePreprocessor(size=SIZE).to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


def test_features_of_a_vit(tiny):
    vit = load_tower(str(tiny / "vit"))
    assert type(vit) is ViTModel
    assert not vit.training
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = vit(pixel_values=pixels)
    tokens = output.last_hidden_state
    expected = {"pooler": output.pooler_output[:, None], "cls": tokens[:, :1], "tokens": tokens}
    expected["mean"] = tokens[:, 1:].sum(dim=1, keepdim=True) / 4
    assert expected.keys() == FEATURES.keys()
    for kind, want in expected.items():
        found = image_features(vit, pixels, kind)
        torch.testing.assert_close(found, want)
        assert not found.requires_grad


def test_a_vit_without_pooler_says_what_to_take(tiny):
    vit = ViTModel.from_pretrained(tiny / "vit", add_pooling_layer=False)
    with pytest.raises(BackboneError, match=r"no pooler, .*set model.vision_features=cls"):
        image_features(vit, torch.zeros(1, 3, SIZE, SIZE), "pooler")


@pytest.mark.parametrize("kind", ["pooler", "mean"])
def test_another_tower_is_one_more_row(tiny, tmp_path, monkeypatch, kind):
    assert "swinv2" not in TOWERS
    monkeypatch.setitem(TOWERS, "swinv2", VisionTower("swinv2", "Swinv2Model", prefix_tokens=0))
    torch.manual_seed(0)
    shape = {"embed_dim": WIDTH // 2, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "patch_size": 4}
    folder = save(Swinv2Model(Swinv2Config(image_size=SIZE, **shape)), tmp_path / "swinv2")
    tower = load_tower(str(folder))
    assert type(tower) is Swinv2Model
    assert tower_width(tower) == WIDTH
    settings = {"vision": str(folder), "vision_features": kind, "feature_cache": str(tmp_path / "cache")}
    config = tiny_config(tiny, tmp_path / "run", "vqa", max_steps=2, **settings)
    assert cache_features(config)[0][2] > 0
    kept = train(config, log="quiet")
    read = train(tiny_config(tiny, tmp_path / "read", "vqa", max_steps=2, **settings | {"feature_cache": None}))
    assert losses(kept) == pytest.approx(losses(read), rel=1e-5)
    assert evaluate(kept.run_dir, log="quiet")["n"] == 5
    pixels = torch.randn(2, 3, SIZE, SIZE)
    patches = tower(pixel_values=pixels).last_hidden_state
    assert patches.shape[1] == (SIZE // 8) ** 2
    torch.testing.assert_close(image_features(tower, pixels, "mean"), patches.mean(dim=1, keepdim=True))


def test_a_tower_may_lack_a_feature(tiny, monkeypatch):
    row = VisionTower("vit", "ViTModel", features={"mean": FEATURES["mean"]})
    monkeypatch.setitem(TOWERS, "vit", row)
    with pytest.raises(BackboneError, match=r"vision_features='cls': a vit has only 'mean'"):
        image_features(load_tower(str(tiny / "vit")), torch.zeros(1, 3, SIZE, SIZE), "cls")


def test_the_last_layer_but_one_of_a_whole_clip(tiny, tmp_path):
    """Read, kept and trained on, as LLaVA takes it; saved with the adapter, and never mixed up with another layer."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    clip = CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=SHAPE | {"num_hidden_layers": 2}))
    clip.save_pretrained(tmp_path / "clip")
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    own = CLIPImageProcessorPil(**size)
    own.save_pretrained(tmp_path / "clip")
    settings = {"vision": str(tmp_path / "clip"), "vision_features": "mean", "feature_cache": str(tmp_path / "cache")}
    config = tiny_config(tiny, tmp_path / "run", "vqa", max_steps=2, vision_layer=-2, **settings)
    last = dataclasses.replace(config, model=dataclasses.replace(config.model, vision_layer=None))
    assert cache_features(last)[0][2] > 0
    assert cache_features(config)[0][2] > 0, "features of another layer were taken from the cache"
    assert cache_features(config)[0][2] == 0
    kept = train(config, log="quiet")
    read = train(
        tiny_config(tiny, tmp_path / "read", "vqa", max_steps=2, vision_layer=-2, **settings | {"feature_cache": None})
    )
    assert losses(kept) == pytest.approx(losses(read), rel=1e-5)
    assert evaluate(kept.run_dir, log="quiet")["n"] == 5

    model = load_pretrained(kept.run_dir / "last")
    assert model.vision_layer == -2
    image = Image.open(next((tiny / "data" / "val2014").iterdir()))
    pixels = own(image.convert("RGB"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = clip.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.encode_images(pixels), hidden[:, 1:].mean(1, keepdim=True))

    path = kept.run_dir / "last" / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["model"].pop("vision_layer") == -2
    path.write_text(json.dumps(saved))
    assert load_pretrained(kept.run_dir / "last").vision_layer is None, "what earlier versions wrote"


@pytest.mark.parametrize("layer", [0, 1, -3, "last"])
def test_a_layer_that_is_none_stops_a_run(tiny, tmp_path, layer):
    with pytest.raises(ConfigError, match="vision_layer"):
        train(tiny_config(tiny, tmp_path / "run", "vqa", vision_layer=layer, vision_features="cls"), log="quiet")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_kind_is_no_tower(tiny, tmp_path):
    folder = save(ViTMSNModel(ViTMSNConfig(**SHAPE)), tmp_path / "msn")
    with pytest.raises(BackboneError, match=r"msn is of model type 'vit_msn', .*known here \('vit', .*'siglip'\)"):
        load_tower(str(folder))
    with pytest.raises(ConfigError, match="'vit_msn'"):
        train(tiny_config(tiny, tmp_path / "run", "vqa", vision=str(folder)), log="quiet")
    assert not (tmp_path / "run").exists()
