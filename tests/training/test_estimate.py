"""Estimates of runs: counts by the real run's, memory by autograd's own, and nothing left behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from routingvl.backbones.loading import BackboneError
from routingvl.backbones.text import READ, WRITE
from routingvl.backbones.untrained import CONFIGS, untrained_text, untrained_tower
from routingvl.cli import main
from routingvl.config import ConfigError
from routingvl.config.files import load_config
from routingvl.train import train
from routingvl.training.estimate import estimate

# Trained, and all of the language model and head, of the published recipes (counted in the published code).
PUBLISHED = {
    "vqa-lora": (10_767_417, 135_357_753),
    "vqa-lora-large": (21_244_985, 376_457_273),
    "vqa-adapter": (8_409_657, 133_018_425),
    "caption-lora": (4_783_104, 129_158_400),
    "caption-lora-large": (12_754_944, 367_406_080),
    "caption-adapter": (2_406_912, 126_809_856),
}
RECIPES = {path.stem: path for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))}


@pytest.mark.parametrize("task", ["vqa", "caption", "classify"])
def test_an_estimate_counts_what_a_run_counts(task, tiny, tmp_path):
    config = tiny_config(tiny, tmp_path / "run", task, max_steps=2, accumulation=2)
    found = estimate(config)
    assert not (tmp_path / "run").exists()
    result = train(config, log="quiet")
    assert found["parameters"]["trained"] == result.trainable
    assert found["parameters"]["language model and head"] == result.total
    assert found["steps"] == result.steps
    assert (found["assumed"], found["device"]) == ([], "cpu")
    assert found["images"] > 0
    assert found["mib"]["gradients and AdamW"] == pytest.approx(3 * 4 * result.trainable / 2**20, abs=0.06)
    assert found["measured"]["examples"] == config.train.batch_size // 2
    assert 0 < found["seconds"]["step"] < found["seconds"]["training"] * 1.01


def test_a_pooler_that_the_checkpoint_lacks_trains(tiny, tmp_path):
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = tiny_config(tiny, tmp_path / "run", "vqa", max_steps=1)
    folder = shutil.copytree(config.model.text, tmp_path / "text")
    RobertaForMaskedLM(RobertaConfig.from_pretrained(folder)).save_pretrained(folder)
    config = replace(config, model=replace(config.model, text=str(folder)))
    assert estimate(config)["parameters"]["trained"] == train(config, log="quiet").trainable


def test_epochs_and_kept_features_count(tiny, tmp_path):
    config = tiny_config(tiny, tmp_path / "run", "vqa", precompute_features=True)
    config = replace(config, train=replace(config.train, max_steps=None, epochs=3))
    kept = estimate(config)
    assert kept["steps"] == round(3 * kept["examples"] / config.train.batch_size)
    again = estimate(replace(config, data=replace(config.data, precompute_features=False)))
    assert kept["seconds"]["features of all images"] > again["seconds"]["features of all images"] == 0
    assert kept["mib"]["weights"] < again["mib"]["weights"]  # no vision tower beside the steps


def test_the_command_prints_json_and_writes_nothing(tiny, tmp_path, capsys):
    config = tiny_config(tiny, tmp_path / "run", "vqa")
    flags = ["--task", "vqa", "--model.vision", config.model.vision, "--model.text", config.model.text]
    flags += ["--data.annotations", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")]
    assert main(["train", *flags, "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["steps"], found["seconds"]["training"]) == (None, None, None)
    assert "nowhere does not exist" in found["assumed"][0]
    assert "3129 answers" in found["assumed"][1]
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_config_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = tiny_config(tiny, tmp_path / "run", "vqa")
    with pytest.raises(BackboneError, match="nobody/nothing"):
        estimate(replace(config, model=replace(config.model, text="nobody/nothing")))
    with pytest.raises(BackboneError, match="no vision tower"):
        untrained_tower("gpt2")
    caption = tiny_config(tiny, tmp_path / "run", "caption")
    with pytest.raises(ConfigError, match="an encoder, which cannot write"):
        estimate(replace(caption, model=replace(caption.model, text="roberta-base")))


def test_random_backbones_have_the_shape_of_the_trained_ones(tiny, tmp_path):
    from transformers import AutoModel

    settings = tiny_config(tiny, tmp_path / "run", "vqa").model
    pairs = [(settings.vision, untrained_tower(settings.vision)), (settings.text, untrained_text(READ, settings.text))]
    for name, made in pairs:
        trained = {key: tuple(weight.shape) for key, weight in AutoModel.from_pretrained(name).state_dict().items()}
        assert {key: tuple(weight.shape) for key, weight in made.state_dict().items()} == trained
    assert untrained_text(WRITE, tiny_config(tiny, tmp_path, "caption").model.text).get_output_embeddings() is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_estimated_without_data_weights_and_network(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = load_config(RECIPES[name])
    config = replace(config, train=replace(config.train, batch_size=2, accumulation=1))
    with torch.random.fork_rng():
        found = estimate(config)
    assert config.model.vision in CONFIGS
    assert found["mib"]["together"] > 0
    if name in PUBLISHED:
        parameters, width = found["parameters"], {"base": 768, "large": 1024}["large" if "large" in name else "base"]
        # The checkpoints of RoBERTa have no pooler: the published code leaves a drawn one frozen, here it trains.
        pooler = width * (width + 1) if config.task == "vqa" else 0
        assert (parameters["trained"] - pooler, parameters["language model and head"]) == PUBLISHED[name]
