"""Run settings: defaults, YAML, overrides, and errors that name the key and the nearest one."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from routingvl.config import ConfigError, RoutingConfig
from routingvl.config.files import command_parser, config_to_yaml, load_config, parse_config
from routingvl.config.schema import (
    PARTS,
    EvalConfig,
    RunConfig,
    TrainConfig,
    changed_settings,
    known_keys,
    override,
    run_config_from_dict,
)

CONFIGS = Path(__file__).parents[2] / "configs"

# arXiv 2403.09377: method, rank, alpha, lr, warm-up, batch, epochs, text length, text model
RECIPES = {
    "vqa-lora": ("lora", 128, 128, 3e-4, 0.05, 512, 20, 20, "roberta-base"),
    "vqa-adapter": ("adapter", 64, 64, 3e-4, 0.05, 512, 20, 20, "roberta-base"),
    "classify-lora": ("lora", 128, 128, 3e-4, 0.05, 512, 20, 64, "roberta-base"),  # VQA's: none is published
    "gqa-lora": ("lora", 128, 128, 3e-4, 0.05, 512, 20, 20, "roberta-base"),  # the same
    "mixture-lora-bart-clip": ("lora", 128, 128, 1e-3, 0.1, 500, 20, 64, "facebook/bart-base"),  # as VL-Adapter
    "nlvr2-lora": ("lora", 128, 128, 3e-4, 0.05, 512, 20, 64, "roberta-base"),  # the same
    "caption-lora": ("lora", 128, 128, 3e-5, 5000, 40, 20, 50, "gpt2"),
    "caption-adapter": ("adapter", 128, 128, 3e-5, 5000, 40, 20, 50, "gpt2"),
    # Larger and newer models with settings of ours.
    "vqa-lora-large": ("lora", 128, 128, 3e-4, 0.05, 512, 20, 20, "roberta-large"),
    "caption-lora-large": ("lora", 128, 128, 3e-5, 5000, 40, 20, 50, "gpt2-medium"),
    "caption-smollm2-siglip2": ("lora", 64, 64, 3e-4, 0.05, 40, 5, 50, "HuggingFaceTB/SmolLM2-135M"),
    "caption-lora-bart-clip": ("lora", 128, 128, 3e-4, 0.05, 40, 20, 50, "facebook/bart-base"),
    "vqa-generate-lora-bart-clip": ("lora", 128, 128, 3e-4, 0.05, 512, 20, 20, "facebook/bart-base"),
}
VISION = {
    "mixture-lora-bart-clip": "openai/clip-vit-base-patch32",
    "vqa-lora-large": "google/vit-large-patch16-224-in21k",
    "caption-lora-large": "google/vit-large-patch16-224-in21k",
    "caption-smollm2-siglip2": "google/siglip2-base-patch16-224",
    "caption-lora-bart-clip": "openai/clip-vit-base-patch32",
    "vqa-generate-lora-bart-clip": "openai/clip-vit-base-patch32",
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    found = (
        config.routing.method,
        config.routing.rank,
        config.routing.alpha,
        config.train.lr,
        config.train.warmup,
        config.train.batch_size,
        config.train.epochs,
        config.data.max_text_length,
        config.model.text,
    )
    assert found == RECIPES[name]
    assert (config.train.eps, config.train.weight_decay, config.routing.dropout) == (1e-6, 0.0, 0.0)
    assert config.eval.num_beams == 5
    assert config.model.vision == VISION.get(name, "google/vit-base-patch16-224-in21k")


def test_every_recipe_has_a_test():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(RECIPES)


def test_yaml_round_trip(tmp_path):
    config = parse_config(
        ["--task", "caption", "--routing.layers", "[0, 2]", "--train.warmup", "7", "--train.trackers", "[tensorboard]"]
    )
    assert config.routing.layers == (0, 2)
    path = tmp_path / "run.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


def test_config_takes_the_name_of_a_recipe():
    by_name = parse_config(["--config", "caption-lora", "--train.lr", "1e-4"])
    assert by_name == parse_config(["--config=configs/caption-lora.yaml", "--train.lr", "1e-4"])
    assert by_name == parse_config(["--config=caption-lora", "--train.lr", "1e-4"])
    with pytest.raises(ConfigError, match=r"--config vqa-lara: .*did you mean 'vqa-lora'.*caption-adapter"):
        parse_config(["--config", "vqa-lara"])


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  lr: 1e-3\n  epochs: 2\n")
    config = parse_config(["--config", str(path), "--train.lr", "5e-3"])
    assert (config.train.lr, config.train.epochs) == (5e-3, 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.lrr", "3"], "unknown flag --train.lrr; did you mean '--train.lr'"),
        (["--lr", "3"], "unknown flag --lr; did you mean '--train.lr'"),
        (["--use_vllora"], "unknown flag --use_vllora"),
        (["--train.ep", "3"], "unknown flag --train.ep;"),
        (["--train.lr", "fast"], "train.lr=.*fast"),
        (["--train.lr", "0"], "--train.lr=0 must be above 0"),
        (["--train.accumulation", "7"], "batch_size=64 is not divisible by accumulation=7"),
        (["--train.warmup", "1.5"], "warmup=1.5 must be an integer"),
        (["--routing.routing", "mull"], "routing='mull' is not one of .*did you mean 'mul'"),
        (["--model.classifier_layers", "3"], "classifier_layers=3 is not one of 1, 2"),
        (["--eval.num_beams", "0"], "num_beams=0 must be at least 1"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["stray"], "stray"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(args)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  lrr: 3\n", "unknown key 'train.lrr'; did you mean 'train.lr'"),
        ("tusk: vqa\n", "unknown key 'tusk'; did you mean 'task'"),
        ("lr: 3\n", "unknown key 'lr'; did you mean 'train.lr'"),
        ("train: 3\n", "train must hold keys such as lr"),
        ("train: [3\n", "parsing"),
        ("routing: {relu: true}\n", "relu=True is defined for routing vllora"),
    ],
)
def test_bad_files_name_file_and_key(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_dictionaries():
    with pytest.raises(ConfigError, match="train: unknown key 'lrr'"):
        run_config_from_dict({"train": {"lrr": 1}})
    with pytest.raises(ConfigError, match="run: unknown key 'taks'"):
        run_config_from_dict({"taks": "vqa"})


def test_override():
    config = override(RunConfig(), num_beams=3, **{"train.lr": 0.5, "output_dir": "x"})
    assert changed_settings(RunConfig(), config) == {
        "output_dir": ("runs/latest", "x"),
        "train.lr": (3e-4, 0.5),
        "eval.num_beams": (5, 3),
    }
    with pytest.raises(ConfigError, match="unknown setting 'num_beam'; did you mean 'num_beams'"):
        override(config, num_beam=3)
    with pytest.raises(ConfigError, match=r"'batch_size' could be train.batch_size or eval.batch_size"):
        override(config, batch_size=3)


def test_paths_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"data.annotations is not set; give --data.annotations"):
        RunConfig().check_files()
    config = override(RunConfig(), annotations=str(tmp_path), images=str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=r"data.images: .*gone does not exist"):
        config.check_files()


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    config = override(RunConfig(), vision="vit", text="roberta-base", images="missing").absolute()
    assert config.model.vision == str(tmp_path / "vit")
    assert (config.model.text, config.data.images) == ("roberta-base", "missing")


def test_warmup_is_steps_or_a_fraction():
    assert TrainConfig(warmup=5000).warmup_steps(10) == 5000
    assert TrainConfig(warmup=0.05).warmup_steps(1000) == 50
    assert TrainConfig(warmup=10.0).warmup_steps(1000) == 10


def test_every_setting_is_explained():
    text = command_parser("train", "", "").format_help()
    for key in known_keys():
        assert f"--{key} " in text
    for cls in (RunConfig, *PARTS.values()):
        for field in dataclasses.fields(cls):
            assert re.search(rf"^        {field.name}: \S", cls.__doc__, re.MULTILINE), (cls.__name__, field.name)


def test_settings_are_read_without_transformers():
    code = "import sys, routingvl.config.files; sys.exit('transformers' in sys.modules or 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent).returncode == 0


def test_frozen():
    for cls in (RunConfig, RoutingConfig, TrainConfig, EvalConfig):
        config = cls()
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(cls)[0].name, 1)
