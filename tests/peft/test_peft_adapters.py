"""Several routed adapters in one model: named, switched, per row, swapped, and opened by transformers itself."""

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_cases import IDS, IMAGES, adapted, config, context_of, fill, gpt2, llama, logits, plain

import routingvl
from routingvl.peft import PeftMethodError
from routingvl.peft.model import routed_layers

NAMES = ["default", "second", "__base__"]


@pytest.fixture(scope="module")
def pair() -> PeftModel:
    """mul at the queries and values, and add of another rank at queries and keys."""
    model = adapted()
    model.add_adapter("second", config("add", r=2, target_modules=["q_proj", "k_proj"]))
    return fill(model, 3, "lora_B.second").eval()


@pytest.fixture(scope="module")
def alone(pair) -> dict[str, torch.Tensor]:
    """The logits of each adapter by itself, and of the base model."""
    found = {}
    for name in ("second", "default"):
        pair.set_adapter(name)
        found[name] = logits(pair)
    return found | {"__base__": logits(llama())}


def test_adapters_are_switched_and_disabled(pair, alone):
    assert not torch.allclose(alone["default"], alone["second"], atol=1e-2)
    torch.testing.assert_close(logits(pair), alone["default"], rtol=0, atol=0)
    with pair.disable_adapter():
        torch.testing.assert_close(logits(pair), alone["__base__"], rtol=0, atol=0)
    trains = {name for name, weight in pair.named_parameters() if weight.requires_grad}
    assert trains
    assert all(".default." in name for name in trains)
    status = pair.get_model_status()
    assert (status.peft_types, status.available_adapters) == (
        {"default": "ROUTED_LORA", "second": "ROUTED_LORA"},
        ["default", "second"],
    )


def test_each_row_of_a_batch_has_its_adapter_and_its_image(pair, alone):
    mixed = logits(pair, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone[name][row], rtol=0, atol=1e-5)
    again = logits(pair, adapter_names=NAMES[::-1])
    torch.testing.assert_close(again[0], alone["__base__"][0], rtol=0, atol=1e-5)
    torch.testing.assert_close(again[2], alone["default"][2], rtol=0, atol=1e-5)


def generate(model, adapter_names=None, **options) -> torch.Tensor:
    extra = {} if adapter_names is None else {"adapter_names": adapter_names}
    with routingvl.bind_image(model, IMAGES, decoding=True):
        return model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False, **extra, **options)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_with_cache_and_rows_of_their_own_adapter(pair, beams):
    whole = generate(pair, num_beams=beams)
    torch.testing.assert_close(whole, generate(pair, num_beams=beams, use_cache=False))
    pair.set_adapter("second")
    second = generate(pair, num_beams=beams)
    pair.set_adapter("default")
    mixed = generate(pair, NAMES, num_beams=beams)
    assert torch.equal(mixed[0], whole[0])
    assert torch.equal(mixed[1], second[1])


def test_a_deleted_adapter_leaves_the_others(alone):
    model = adapted()
    model.add_adapter("second", config("add"))
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert all(list(layer.routed) == ["default"] for layer in routed_layers(model))
    torch.testing.assert_close(logits(model), alone["default"], rtol=0, atol=0)
    assert not any(routed_layers(model.unload()))


def test_load_adapter_beside_another(tmp_path, alone):
    adapted().save_pretrained(tmp_path)
    model = adapted(config("add"), seed=9)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert len({layer.context for layer in routed_layers(model)}) == 1
    torch.testing.assert_close(logits(model.eval()), alone["default"], rtol=0, atol=0)


def test_transformers_loads_adds_switches_and_deletes(tmp_path, alone):
    adapted().save_pretrained(tmp_path)
    model = llama()
    model.load_adapter(tmp_path)
    torch.testing.assert_close(logits(model.eval()), alone["default"], rtol=0, atol=0)
    model.add_adapter(config("add"), "second")
    context_of(model)
    fill(model, 3, "lora_B.second")
    model.set_adapter("second")
    assert not torch.allclose(logits(model.eval()), alone["default"], atol=1e-2)
    model.disable_adapters()
    torch.testing.assert_close(logits(model), alone["__base__"], rtol=0, atol=0)
    model.enable_adapters()
    model.delete_adapter("second")
    model.set_adapter("default")
    torch.testing.assert_close(logits(model), alone["default"], rtol=0, atol=0)
    model.save_pretrained(tmp_path / "again")
    assert "import routingvl.peft" in (tmp_path / "again" / "README.md").read_text()
    reopened = PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(reopened), alone["default"], rtol=0, atol=0)


def test_hotswap(tmp_path):
    adapted(seed=5).save_pretrained(tmp_path / "mul")
    adapted(config("add")).save_pretrained(tmp_path / "add")
    model = adapted()
    hotswap_adapter(model, tmp_path / "mul", adapter_name="default")
    torch.testing.assert_close(logits(model), logits(adapted(seed=5)), rtol=0, atol=0)
    with pytest.raises(ValueError, match="Configs are incompatible: for routing"):
        hotswap_adapter(model, tmp_path / "add", adapter_name="default")
    adapted(sliced(), gpt2(), seed=5).save_pretrained(tmp_path / "sliced")
    model = adapted(sliced(), gpt2())
    hotswap_adapter(model, tmp_path / "sliced", adapter_name="default")
    torch.testing.assert_close(logits(model), logits(adapted(sliced(), gpt2(), seed=5)), rtol=0, atol=0)


def test_a_plain_lora_cannot_stand_beside_and_leaves_the_model_as_it_was(alone):
    model = adapted()
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("plain", plain())
    with pytest.raises(PeftMethodError, match=r"RoutedLoraConfig\(routing='none'\)"):
        inject_adapter_in_model(plain(), model.base_model.model, "plain")
    base = llama()
    base.add_adapter(plain(), "plain")
    with pytest.raises(PeftMethodError, match=r"adapter 'plain' of the model is a LoraConfig.*routing='none'"):
        base.add_adapter(config(), "routed")
    assert list(base.peft_config) == ["plain"]
    torch.testing.assert_close(logits(adapted()), alone["default"], rtol=0, atol=0)


def test_weighted_adapters_of_routing_none_only():
    model = adapted(config("none"))
    model.add_adapter("second", config("none"))
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "both", combination_type="linear")
    want = logits(model)
    model.set_adapter("both")
    torch.testing.assert_close(logits(model.eval()), want, rtol=0, atol=1e-5)
    routed = adapted()
    with pytest.raises(PeftMethodError, match=r"adapter 'default' routes the image in \(mul\).*averaged"):
        routed.add_weighted_adapter(["default"], [1.0], "both")


def sliced(routing="mul", **settings):
    return config(routing, target_modules=["c_attn"], slices="family", **settings)


def test_hotswap_keeps_the_rank_that_slices_share(tmp_path):
    adapted(sliced(r=2), gpt2()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Configs are incompatible: for joined_rank"):
        hotswap_adapter(adapted(sliced(r=4), gpt2()), tmp_path, adapter_name="default")


def test_merging_draws_no_dropout():
    model = adapted(sliced("none", lora_dropout=0.5), gpt2())
    want = logits(model.eval())
    model.train().merge_adapter()
    torch.testing.assert_close(logits(model.eval()), want, rtol=0, atol=1e-4)


def test_adapters_of_joined_rank_are_only_averaged():
    model = adapted(sliced("none"), gpt2())
    for how in ("svd", "cat", "ties_svd"):
        with pytest.raises(PeftMethodError, match=f"combination_type='{how}' makes a new A and B"):
            model.add_weighted_adapter(["default"], [1.0], "both", combination_type=how)
    model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")


def test_preparing_a_hotswap_keeps_the_rank_that_slices_share():
    model = adapted(sliced(), gpt2())
    want = logits(model)
    with pytest.raises(PeftMethodError, match=r"adapter 'default' cannot be padded .* share its rank 4; leave target"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=0)
    prepare_model_for_compiled_hotswap(model)
    torch.testing.assert_close(logits(model), want, rtol=0, atol=0)


def test_a_prepared_model_takes_an_adapter_of_another_rank(tmp_path):
    adapted(config(r=2)).save_pretrained(tmp_path)
    model = adapted()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(logits(model), logits(adapted()), rtol=0, atol=1e-5)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    torch.testing.assert_close(logits(model), logits(adapted(config(r=2))), rtol=0, atol=1e-5)


def test_a_routed_adapter_goes_on_beside_a_merged_one():
    model = adapted()
    model.add_adapter("plain", config("none"))
    fill(model, 3, "lora_B.plain").eval()
    model.base_model.set_adapter(["default", "plain"])
    want = logits(model)
    model.merge_adapter(["plain"])
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)
    assert not torch.allclose(logits(model, -IMAGES), want, atol=1e-2)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-4)
