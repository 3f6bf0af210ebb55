"""RoutedLoraConfig(routed_by=...): PEFT's layers routed by an encoder's states or by their own text."""

import copy

import pytest
import torch
from peft_cases import WIDTH, fill
from peft_cases import config as routed_config
from text_zoo import text_batch, text_model

import routingvl
from routingvl import RoutingConfig, inject

pytest.importorskip("peft.tuners")
from peft import PeftModel, get_peft_model

from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.peft import PeftMethodError
from routingvl.peft.model import routed_layers

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
FEATURES = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(5))
BERT = ["query", "value"]


def bart(routed_by: str = "encoder", **changes):
    return fill(get_peft_model(text_model("bart"), routed_config("vllora", routed_by=routed_by, **changes))).eval()


def roberta(routed_by: str = "text"):
    config = routed_config("vllora", routed_by=routed_by, target_modules=BERT)
    return fill(get_peft_model(text_model("roberta"), config)).eval()


def masked(kind: str) -> dict[str, torch.Tensor]:
    return text_batch(kind) | {"attention_mask": MASK}


@torch.no_grad()
def logits(model, kind: str) -> torch.Tensor:
    with routingvl.bind_image(model, FEATURES) if kind == "bart" else torch.no_grad():
        return model(**masked(kind)).logits


@pytest.mark.parametrize(("kind", "routed_by"), [("bart", "encoder"), ("bart", "encoder_tokens"), ("roberta", "text")])
def test_the_method_is_what_inject_does(kind, routed_by):
    model = bart(routed_by) if kind == "bart" else roberta(routed_by)
    plain = text_model(kind)
    inject(plain, RoutingConfig(routing="vllora", routed_by=routed_by, rank=4, alpha=8))
    weights = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layer, RoutedLoRALinear):
                layer.lora_A.copy_(weights[name].lora_A["default"].weight)
                layer.lora_B.copy_(weights[name].lora_B["default"].weight)
    with_all = logits(model, kind)
    torch.testing.assert_close(with_all, logits(plain, kind))
    with torch.no_grad():
        assert not torch.equal(with_all, text_model(kind)(**masked(kind)).logits)


def test_saved_opened_and_copied(tmp_path):
    model = bart()
    want = logits(model, "bart")
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(text_model("bart"), tmp_path)
    assert opened.peft_config["default"].routed_by == "encoder"
    assert torch.equal(logits(opened, "bart"), want)
    assert torch.equal(logits(copy.deepcopy(model), "bart"), want)
    model.unload()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_beams_with_cache_write_what_they_write_without():
    model, options = bart(), {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    given = {key: value for key, value in masked("bart").items() if key != "labels"}
    with routingvl.bind_image(model, FEATURES, decoding=True):
        tokens = model.generate(**given, **options)
        assert torch.equal(model.generate(**given, **options, use_cache=False), tokens)


@pytest.mark.parametrize("kind", ["bart", "roberta"])
def test_rows_with_adapters_of_their_own(kind):
    model = bart() if kind == "bart" else roberta()
    model.add_adapter("other", model.peft_config["default"].__class__(**_settings(model, routed_by="image")))
    fill(model, seed=8)
    features = FEATURES
    found = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        with torch.no_grad(), routingvl.bind_image(model, features):
            found[name] = model(**masked(kind)).logits
    names = ["other", "default", "other"]
    with torch.no_grad(), routingvl.bind_image(model, features):
        mixed = model(**masked(kind), adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], found[name][row])
    contexts = {layer.routed[name].context.source for layer in routed_layers(model) for name in layer.routed}
    assert contexts == {"image", "encoder" if kind == "bart" else "text"}


def _settings(model, **changes) -> dict:
    config = model.peft_config["default"]
    kept = ("r", "lora_alpha", "target_modules", "routing")
    return {key: getattr(config, key) for key in kept} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routed_by": "words"}, "routed_by='words'"),
        ({"routed_by": "text_tokens"}, "gives several tokens and routing 'mul' takes one"),
        ({"routed_by": "text", "image_from": "vit"}, "image_from= brings an image, and with routed_by='text' none is"),
    ],
)
def test_settings_that_mean_nothing(changes, message):
    with pytest.raises(PeftMethodError, match=message):
        routed_config("mul", **changes)


@pytest.mark.parametrize("projection", [None, "linear"])
def test_states_of_another_width_are_refused_where_they_are_known(projection):
    model = text_model("bart")
    config = routed_config("vllora", routed_by="encoder", target_modules=["fc2"], image_projection=projection)
    with pytest.raises(ValueError, match=r"decoder\.layers\.0\.fc2 takes 48 features and the encoder's states have 32"):
        get_peft_model(model, config)
    assert not list(routed_layers(model))


def test_what_is_not_defined_leaves_the_model():
    model = text_model("llama")
    for routed_by, message in (("text", "is in a causal model"), ("encoder", "none of the targets is in one")):
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, routed_config("vllora", routed_by=routed_by))
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert not list(routed_layers(model))
