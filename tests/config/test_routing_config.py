"""The bottlenecks' settings: names, endings and regular expressions, and what is refused."""

import dataclasses
import json

import pytest

from routingvl.config import ConfigError, RoutingConfig, from_dict
from routingvl.config.routing import by_pattern, named


def test_one_rule_for_names():
    for pattern, name, fits in (
        ("q_proj", "model.layers.0.q_proj", True),
        ("q_proj", "q_proj", True),
        ("q_proj", "model.layers.0.my_q_proj", False),
        (r".*layers\.[01]\..*proj", "model.layers.1.attn.v_proj", True),
        (r".*layers\.[01]\..*proj", "model.layers.11.attn.v_proj", False),
        (r"layers\.\d", "model.layers.1", False),  # the whole name, or a plain ending
    ):
        assert named([pattern], name) is fits, (pattern, name)
    assert by_pattern({"k_proj": 2, r".*\.1\..*": 8, "v_proj": 4}, "layers.1.v_proj", 16) == 8
    assert by_pattern(None, "layers.1.v_proj", 16) == 16


def test_a_bare_text_is_a_list_of_one_and_all_travels_through_json():
    config = RoutingConfig(
        targets="all-linear", exclude="lm_head", rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 2.5},
        image_projection="linear", train_modules="score", bottleneck_dtype="model",
    )  # fmt: skip
    assert (config.targets, config.exclude, config.train_modules) == (("all-linear",), ("lm_head",), ("score",))
    assert from_dict(RoutingConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"targets": ["layers.[.q"]}, r"targets: 'layers.\[.q' is no name and no regular expression"),
        ({"exclude": "(a"}, "exclude: "),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0 must be at least 1"),
        ({"rank_pattern": {"q_proj": 2.5}}, "must be an integer"),
        ({"rank_pattern": {3: 2}}, "3 is no name"),
        ({"alpha_pattern": {"q_proj": -1}}, "must be above 0"),
        ({"image_projection": "one"}, "image_projection='one' is not one of 'linear', 'own'"),
        ({"bottleneck_dtype": "float16"}, "bottleneck_dtype"),
        ({"method": "adapter", "exclude": ["q"]}, "exclude=.* is defined for method='lora' only"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        RoutingConfig(**settings)
