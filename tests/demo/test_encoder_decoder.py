"""The encoder-decoder setting on the demo's images: a tiny BART sees them, which its own shuffled control shows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_bart import pretrain_bart

from routingvl.config import RoutingConfig
from routingvl.config.files import load_config
from routingvl.config.schema import config_to_dict, override, run_config_from_dict
from routingvl.demo.backbones import BackboneConfig, pretrain_vit
from routingvl.demo.main import write_data
from routingvl.demo.shapes import ShapesConfig
from routingvl.evaluate import evaluate
from routingvl.train import train

DATA = ShapesConfig(
    train_images=600, val_images=40, test_images=60, train_questions=800, val_questions=42, test_questions=84
)
BACKBONES = BackboneConfig(
    width=64, mlp_width=128, vision_layers=2, text_layers=2, examples=2000, vision_steps=150, lm_steps=150, lr=2e-3
)


@pytest.mark.slow
def test_captions_of_a_tiny_bart_owe_their_score_to_the_image(tmp_path):
    """The recipe's: the encoder is routed by the image, the decoder's cross-attention by the encoder's states."""
    torch.set_num_threads(1)
    write_data(tmp_path, DATA)
    folder = tmp_path / "backbones"
    pretrain_vit(folder / "vit", BACKBONES)
    assert pretrain_bart(folder / "bart", BACKBONES)["denoising loss (nats)"] < 1
    recipe = load_config(Path(__file__).parents[2] / "configs" / "caption-lora-bart-clip.yaml")
    config = replace(recipe, routing=replace(recipe.routing, routing="mul", rank=16, alpha=16))
    assert config.routing == RoutingConfig(
        routing="mul", rank=16, alpha=16, routed_by="encoder", decoder_attention="cross"
    )
    places = {"vision": folder / "vit", "text": folder / "bart"}
    places |= {"annotations": tmp_path / "annotations", "images": tmp_path / "data" / "Images"}
    settings = {"output_dir": str(tmp_path / "run"), "device": "cpu", "precompute_features": True, "eval_every": 0}
    settings |= {"lr": 2e-2, "max_steps": 250, "train.batch_size": 32, "eval.batch_size": 60, "num_beams": 1}
    config = override(
        run_config_from_dict(config_to_dict(config)), **settings, **{key: str(path) for key, path in places.items()}
    )
    run = train(config, log="quiet").run_dir
    scored = {"metrics": ["CIDEr"], "caption_tokenizer": "python", "log": "quiet"}
    own, other = (evaluate(run, image_control=control, **scored)["CIDEr"] for control in (None, "shuffled"))
    assert own > 1.2 * other
