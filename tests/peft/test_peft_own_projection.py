"""image_projection="own" in PEFT: a down-projection of the image in every layer, its files, and hot-swapping."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_cases import IDS, ROWS, config, fill, gpt2, llama, logits, train
from text_zoo import text_batch, text_model

from routingvl import RoutingConfig, VisualContext, inject
from routingvl.peft import PeftMethodError
from routingvl.peft.model import routed_layers

IMAGES = torch.randn(ROWS, 1, 20, generator=torch.Generator().manual_seed(4))
HELD = "lora_A_image"


def own(**changes):
    return config(**{"target_modules": "all-linear", "image_projection": "own", "image_width": 20} | changes)


def test_equal_to_inject():
    model = fill(get_peft_model(llama(), own())).eval()
    base, context = llama(), VisualContext()
    like = RoutingConfig(routing="mul", rank=4, alpha=8, targets="all-linear", image_projection="own")
    inject(base, like, context, image_width=20)
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if hasattr(layer, "routed"):
                ours = base.get_submodule(name)
                for part in ("lora_A", "lora_B", HELD):
                    getattr(ours, part).copy_(getattr(layer, part)["default"].weight)
        with context.bind(IMAGES):
            want = base.eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits(model, IMAGES), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "changes"), [(llama, {}), (gpt2, {"target_modules": ["c_attn"], "slices": "family"})]
)
def test_trains_saves_and_loads(build, changes, tmp_path):
    model = fill(get_peft_model(build(), own(**changes)))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if HELD in name}
    assert len(before) == len(list(routed_layers(model)))
    assert {tuple(weight.shape) for weight in before.values()} == {(8 if changes else 4, 20)}
    train(model, 3, IMAGES)
    assert all(not torch.equal(weight, before[n]) for n, weight in model.named_parameters() if HELD in n)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, IMAGES), logits(model.eval(), IMAGES), rtol=0, atol=0)
    model.delete_adapter("default")
    assert not any(HELD in name for name, _ in model.named_parameters())


def test_states_of_an_encoder_reach_inputs_of_any_width(tmp_path):
    settings = {
        "target_modules": r".*decoder\..*(fc2|encoder_attn\.q_proj)",
        "routed_by": "encoder",
        "image_width": None,
    }
    model = fill(get_peft_model(text_model("bart"), own(**settings))).eval()
    widths = {layer.in_features: layer.lora_A_image["default"].in_features for layer in routed_layers(model)}
    assert len(widths) == 2
    assert set(widths.values()) == {model.config.d_model}
    ids = text_batch("bart")["input_ids"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(text_model("bart"), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)


def test_hotswap(tmp_path):
    other = fill(get_peft_model(llama(), own()), seed=3).eval()
    other.save_pretrained(tmp_path / "other")
    model = fill(get_peft_model(llama(), own())).eval()
    hotswap_adapter(model, tmp_path / "other", adapter_name="default")
    torch.testing.assert_close(logits(model, IMAGES), logits(other, IMAGES), rtol=0, atol=0)
    fill(get_peft_model(llama(), own(image_projection="linear"))).save_pretrained(tmp_path / "linear")
    with pytest.raises(ValueError, match="Configs are incompatible: for image_projection"):
        hotswap_adapter(model, tmp_path / "linear", adapter_name="default")
    with pytest.raises(PeftMethodError, match=r"image with image_projection='own'\) share its rank 4"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_start_and_neighbours():
    model = get_peft_model(llama(), own(init_lora_weights="gaussian", target_modules=["q_proj"]))
    (first, *_) = routed_layers(model)
    assert 0.15 < first.lora_A_image["default"].weight.std() < 0.35  # 1 / r, as A
    model.add_adapter("plain", own(routing="none", image_projection=None, target_modules=["q_proj"]))
    assert "plain" not in first.lora_A_image
    with pytest.raises(PeftMethodError, match="projects the image, which routing 'none' does not read"):
        own(routing="none")
    with pytest.raises(PeftMethodError, match="image_width=16: another adapter of the model reads an image of 20"):
        model.add_adapter("narrow", own(image_width=16))
