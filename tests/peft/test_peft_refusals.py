"""What cannot go with a routed LoRA is refused by name, with the reason, and nothing is changed."""

import importlib.metadata
import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_cases import WIDTH, adapted, config, gpt2, llama, logits

import routingvl.peft
from routingvl import RoutingConfig, inject
from routingvl.peft import PeftMethodError, RoutedLoraConfig

REFUSED = {
    "DoRA": (dict(use_dora=True), "use_dora cannot be used with a routed LoRA: .*no merged weight"),
    "lora_bias": (dict(lora_bias=True), "lora_bias cannot .*without having met the image"),
    "aLoRA": (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens cannot .*another formula"),
    "QALoRA": (dict(use_qalora=True), "use_qalora cannot .*another formula"),
    "parameters": (dict(target_parameters=["q_proj.weight"]), "target_parameters cannot .*bare parameter"),
    "Megatron": (dict(megatron_config={"a": 1}), "megatron_config cannot .*as a whole"),
    **{
        init: (dict(init_lora_weights=init), f"init_lora_weights='{init}' cannot .*changed base weight")
        for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
    },
    "eva": (dict(init_lora_weights="eva"), "init_lora_weights='eva' cannot .*projects the image too"),
    "orthogonal": (dict(init_lora_weights="orthogonal"), "'orthogonal' cannot .*start at 0"),
    "mica": (dict(init_lora_weights="mica"), "'mica' cannot .*another formula"),
    "a routing": (dict(routing="mull"), "routing='mull' is not one of 'none', 'add'"),
    "attention": (dict(routing="attention"), "routing='attention' has weights of its own, .* with routingvl.inject"),
    "relu": (dict(relu=True), "relu=True is defined for routing vllora, not for 'mul'"),
    "placement": (dict(placement="up"), "placement='up' is not one of 'bottleneck', 'output'"),
    "pooling": (dict(image_pooling="max"), "image_pooling='max' is not one of 'mean', 'tokens'"),
    "tokens": (dict(image_pooling="tokens"), "routing 'mul' takes one: use 'mean'"),
    "text_only": (dict(text_only="drop"), "text_only='drop' is not one of None, 'skip', 'zero'"),
    "slices": (dict(slices="c_attn"), "slices='c_attn' is not None, 'family' or"),
    "image_projection": (dict(image_projection="one"), "image_projection='one' is not one of None, 'linear', 'own'"),
    "image_width": (dict(image_width=0), "image_width=0 is not None or a number of features"),
    "image_from": (dict(image_from=3), "image_from=3 is neither a module's name nor a function"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_settings(row):
    changes, message = REFUSED[row]
    with pytest.raises(PeftMethodError, match=message):
        config(**changes)


def test_every_variant_of_pefts_table_is_refused():
    import dataclasses

    from peft import LoraConfig

    variants = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    assert len(variants) >= 5
    for name in variants:
        with pytest.raises(PeftMethodError, match=f"^{name} cannot be used with a routed LoRA"):
            RoutedLoraConfig(**{name: True})


TARGETS = {
    "an embedding": (dict(target_modules=["embed_tokens"]), "embed_tokens is a Embedding: .*exclude_modules"),
    "two widths": (
        dict(target_modules=["q_proj", "down_proj"]),
        "differ in width: .*q_proj takes 32 features, .*down_proj takes 48 features, .* 32. Set image_p",
    ),
    "another width than the image's": (
        dict(image_width=24),
        "differ in width: .*q_proj takes 32 features, and the image has 24",
    ),
    "a family of no fused projection": (
        dict(slices="family"),
        "slices='family': none of the target modules is a fused",
    ),
}


@pytest.mark.parametrize("row", TARGETS)
def test_targets(row):
    changes, message = TARGETS[row]
    base = llama()
    with pytest.raises(PeftMethodError, match=message):
        get_peft_model(base, config(**changes))
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


def test_a_second_adapter_of_another_width():
    model = adapted()
    with pytest.raises(PeftMethodError, match=r"down_proj takes 48 .*another adapter reads has 32. Set image_p"):
        model.add_adapter("second", config(target_modules=["down_proj"]))
    assert list(model.peft_config) == ["default"]
    model.add_adapter("second", config("none", target_modules=["down_proj"]))  # which no image reaches


def test_a_model_of_inject():
    base = llama()
    inject(base, RoutingConfig(routing="mul", rank=2, targets=("q_proj",)))
    with pytest.raises(PeftMethodError, match="q_proj has a bottleneck of routingvl"):
        get_peft_model(base, config())


def test_merging_a_routed_adapter():
    model = adapted()
    want = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(PeftMethodError, match=r"adapter 'default' routes the image in \(mul\).*cannot be merged"):
            merge()
    with pytest.raises(PeftMethodError, match="written as a change of the weight"):
        model.base_model.model.model.layers[0].self_attn.q_proj.get_delta_weight("default")
    assert not model.supports_lora_conversion()
    assert adapted(config("none")).supports_lora_conversion()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=0)


def test_saving_as_the_difference_to_an_initial_adapter(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(PeftMethodError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=tmp_path / "initial")


def test_slices_that_do_not_fit():
    with pytest.raises(ValueError, match=r"within the 96 outputs"):
        get_peft_model(gpt2(), config(target_modules=["c_attn"], slices={"c_attn": [[0, WIDTH], [90, 122]]}))


@pytest.mark.parametrize("installed", ["0.20.0", "0.22.0", "1.0"])
def test_another_version_of_peft(installed, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    with pytest.raises(ImportError, match=f"0.21.0 to 0.21.2, and PEFT {installed} is installed"):
        routingvl.peft.check_version()


def test_without_peft(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"pip install 'routingvl\[peft\]'"):
        routingvl.peft.check_version()


def test_an_adapter_in_routingvls_own_format(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "ROUTINGVL", "format_version": 1}))
    for opens in (PeftConfig.from_pretrained, lambda folder: PeftModel.from_pretrained(llama(), folder)):
        with pytest.raises(PeftMethodError, match=r"own format, not PEFT's: open it with routingvl\.load_adapter"):
            opens(str(tmp_path))
