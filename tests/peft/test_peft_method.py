"""Routed LoRA as a method of PEFT: equal to inject, equal to PEFT's own LoRA, and what PEFT carries for it."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft_cases import (
    IDS,
    IMAGES,
    WIDTH,
    adapted,
    config,
    context_of,
    fill,
    gpt2,
    llama,
    logits,
    plain,
    train,
)

from routingvl import RoutingConfig, VisualContext, inject
from routingvl.kernels import ROUTINGS
from routingvl.peft import RoutedLoraConfig
from routingvl.peft.model import routed_layers


def injected(base, adapter: PeftModel, settings: RoutingConfig) -> torch.Tensor:
    """Logits of ``inject`` with the weights of ``adapter``."""
    context = VisualContext()
    inject(base, settings, context)
    for name, layer in adapter.base_model.model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "routed"):
            ours = base.get_submodule(name)
            with torch.no_grad():
                ours.lora_A.copy_(layer.lora_A["default"].weight)
                ours.lora_B.copy_(layer.lora_B["default"].weight)
    with torch.no_grad(), context.bind(IMAGES):
        return base.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_method_is_what_inject_does(routing):
    model = adapted(config(routing))
    settings = RoutingConfig(routing=routing, rank=4, alpha=8, targets=("q_proj", "v_proj"))
    torch.testing.assert_close(logits(model), injected(llama(), model, settings), rtol=0, atol=1e-6)
    if ROUTINGS[routing].uses_image:
        assert not torch.allclose(logits(model), logits(model, IMAGES.flip(0)), atol=1e-2)


def test_slices_of_the_family_are_the_published_recipe_of_gpt2():
    model = adapted(config(target_modules=["c_attn"], slices="family"), gpt2())
    assert model.peft_config["default"].slices == {"c_attn": [[0, 32], [64, 96]]}
    want = injected(gpt2(), model, RoutingConfig(routing="mul", rank=4, alpha=8))
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("base", "targets"), [(llama, ["q_proj", "v_proj"]), (gpt2, ["c_attn"])])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_routing_none_is_pefts_own_lora(base, targets):
    ours = fill(get_peft_model(base(), config("none", target_modules=targets)))
    theirs = get_peft_model(base(), plain(target_modules=targets))
    assert not theirs.load_state_dict(ours.state_dict()).unexpected_keys
    gradients = []
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: w.grad for name, w in model.named_parameters() if w.grad is not None})
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys() != set()
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_routing_none_merges_as_pefts_own(tmp_path):
    model = adapted(config("none"))
    want = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    assert not any(routed_layers(merged))
    torch.testing.assert_close(logits(merged), want, rtol=0, atol=1e-5)
    sliced = adapted(config("none", target_modules=["c_attn"], slices="family"), gpt2())
    torch.testing.assert_close(logits(sliced), logits(sliced.merge_and_unload()), rtol=0, atol=1e-5)


def names_of(model) -> set[str]:
    """Of the adapted modules, without the layer's index."""
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "routed")}


def ranks(model) -> dict[str, int]:
    return {name.split(".")[-1]: m.r["default"] for name, m in model.named_modules() if hasattr(m, "routed")}


def scalings(model) -> set[float]:
    return {layer.scaling["default"] for layer in routed_layers(model)}


def trained(model, *endings: str) -> bool:
    """Whether some parameter of each ending trains."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return all(any(name.endswith(ending) for name in names) for ending in endings)


# What a user of PEFT sets -> what must be true of the model. Each is trained, saved, opened and compared.
CARRIED = {
    "targets by regex": (
        dict(target_modules=r".*layers\.1\..*(q|k)_proj"),
        lambda m: names_of(m) == {f"model.layers.1.self_attn.{p}_proj" for p in "qk"},
    ),
    "excluded by regex": (
        dict(exclude_modules=r".*layers\.0\..*"),
        lambda m: all("layers.1" in name for name in names_of(m)),
    ),
    "all-linear": (
        dict(target_modules="all-linear", exclude_modules=["down_proj"]),
        lambda m: len(names_of(m)) == 12 and not any("lm_head" in name for name in names_of(m)),
    ),
    "layers_to_transform": (dict(layers_to_transform=[1]), lambda m: all("layers.1" in n for n in names_of(m))),
    "rank_pattern": (dict(rank_pattern={"q_proj": 2}), lambda m: ranks(m) == {"q_proj": 2, "v_proj": 4}),
    "alpha_pattern": (dict(alpha_pattern={"q_proj": 2}), lambda m: scalings(m) == {0.5, 2.0}),
    "use_rslora": (dict(use_rslora=True), lambda m: scalings(m) == {4.0}),
    "gaussian": (dict(init_lora_weights="gaussian"), lambda m: True),
    "dropout": (dict(lora_dropout=0.3), lambda m: True),
    "bias all": (dict(bias="all"), lambda m: trained(m, "k_proj.bias", "q_proj.base_layer.bias")),
    "bias lora_only": (
        dict(bias="lora_only"),
        lambda m: trained(m, "q_proj.base_layer.bias") and not trained(m, "k_proj.bias"),
    ),
    "modules_to_save": (dict(modules_to_save=["lm_head"]), lambda m: trained(m, "modules_to_save.default.weight")),
    "trainable_token_indices": (dict(trainable_token_indices=[3, 4, 5]), lambda m: trained(m, "tokens_delta.default")),
    "ensure_weight_tying": (
        dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        lambda m: m.get_input_embeddings().weight is m.get_output_embeddings().weight,
    ),
    "layer_replication": (dict(layer_replication=[[0, 2], [1, 2]]), lambda m: len(names_of(m)) == 6),
    "placement": (dict(placement="output"), lambda m: True),
    "relu": (dict(routing="vllora", relu=True), lambda m: True),
}


def base_for(row: str):
    return llama(attention_bias=row.startswith("bias"), tie_word_embeddings=row == "ensure_weight_tying")


@pytest.mark.parametrize("row", CARRIED)
def test_what_peft_carries(row, tmp_path):
    changes, holds = CARRIED[row]
    model = get_peft_model(base_for(row), config(**changes))
    assert holds(model)
    before = logits(model)
    train(fill(model))
    assert not torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_for(row), tmp_path).eval()
    assert holds(loaded) or row.startswith(("bias", "modules", "trainable"))  # these ask what trains
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(loaded), logits(loaded, IMAGES.flip(0)), atol=1e-3)


def test_low_cpu_mem_usage(tmp_path):
    model = adapted(config(target_modules=["c_attn"], slices="family"), gpt2())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path, low_cpu_mem_usage=True).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_adapters_are_float32_over_bfloat16_unless_told_otherwise():
    base = lambda: llama().to(torch.bfloat16)  # noqa: E731
    model = adapted(base=base())
    assert {layer.lora_A["default"].weight.dtype for layer in routed_layers(model)} == {torch.float32}
    out = logits(model, IMAGES.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), logits(adapted()), rtol=0, atol=0.2)
    train(model)  # features of float32, gradients to float32 weights
    half = adapted(base=base(), autocast_adapter_dtype=False)
    assert {layer.lora_A["default"].weight.dtype for layer in routed_layers(half)} == {torch.bfloat16}


def test_the_files_name_the_method_and_the_card_the_import(tmp_path, monkeypatch):
    model = adapted()
    model.add_adapter("second", config("add"))
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["routing"], settings["text_only"]) == ("ROUTED_LORA", "mul", "skip")
    card = (tmp_path / "README.md").read_text()
    assert card.count("import routingvl.peft") == 1
    assert "library_name: peft" in card
    assert isinstance(PeftConfig.from_pretrained(tmp_path / "second"), RoutedLoraConfig)
    # A PEFT that has not imported us says only this, hence the card.
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, "ROUTED_LORA")
    with pytest.raises(KeyError, match="ROUTED_LORA"):
        PeftConfig.from_pretrained(tmp_path)


def test_one_context_a_model_and_one_for_its_copy():
    import copy

    model = adapted()
    twin = copy.deepcopy(model)
    assert context_of(twin) is not context_of(model)
    torch.testing.assert_close(logits(twin), logits(model), rtol=0, atol=0)
    fill(twin, seed=8)
    assert not torch.allclose(logits(twin), logits(model), atol=1e-2)
    with context_of(model).bind(IMAGES), pytest.raises(RuntimeError, match="no visual features bound"):
        twin(input_ids=IDS)
    assert all(layer.in_features == WIDTH for layer in routed_layers(twin))
