"""A vision-language model whose adapter binds its own image: in forward, generate, Trainer, however it was opened."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from peft_cases import TARGETS, adapted, config, fill, spread
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import routingvl
from routingvl.bottlenecks.attach import BindingError
from routingvl.peft import PeftMethodError
from routingvl.peft.model import routed_layers

IMAGE, WIDTH = 39, 32
PROJECTOR = "model.multi_modal_projector"


def llava() -> LlavaForConditionalGeneration:
    """Four image tokens of width 32; queries and values of both towers have the same names."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": WIDTH, "intermediate_size": 48}
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **shape)
    text = LlamaConfig(vocab_size=40, max_position_embeddings=64, eos_token_id=None, **shape)
    parts = {"vision_config": vision, "text_config": text, "image_token_id": IMAGE, "image_seq_length": 4}
    return spread(LlavaForConditionalGeneration(LlavaConfig(**parts)))


IDS = torch.tensor([[1, *[IMAGE] * 4, 5, 6], [1, *[IMAGE] * 4, 7, 8], [1, *[IMAGE] * 4, 9, 3]])
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(4))
BATCH = {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": torch.ones_like(IDS)}


def settings(**changes):
    return config(**{"image_from": PROJECTOR} | changes)


def outputs(model, **changes) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH | changes).logits


def by_hand(model, pixels=PIXELS) -> torch.Tensor:
    """The logits with the projector's tokens bound by hand."""
    with torch.no_grad():
        features = model.get_base_model().get_image_features(pixels).pooler_output
        features = torch.stack(list(features)) if not isinstance(features, torch.Tensor) else features
        with routingvl.bind_image(model, features.mean(1, keepdim=True)):
            return model(**BATCH).logits


def names_of(model) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "routed")}


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return adapted(settings(), llava())


def test_the_text_model_alone_is_adapted_and_sees_the_projectors_image(model):
    assert all(name.startswith("model.language_model.layers.") for name in names_of(model))
    assert len(names_of(model)) == 4
    torch.testing.assert_close(outputs(model), by_hand(model), rtol=0, atol=1e-6)
    assert not torch.allclose(outputs(model), outputs(model, pixel_values=PIXELS.flip(0)), atol=1e-2)


def test_a_text_without_an_image_has_the_base_models_output(model):
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
    with torch.no_grad():
        assert torch.equal(model(**text).logits, llava()(**text).logits)


def test_opened_by_peft_by_transformers_and_swapped(model, tmp_path):
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(llava(), tmp_path).eval()), outputs(model))
    plain = llava()
    plain.load_adapter(tmp_path)
    torch.testing.assert_close(outputs(plain.eval()), outputs(model))
    other = adapted(settings(), llava(), seed=3)
    hotswap_adapter(other, tmp_path, adapter_name="default")
    torch.testing.assert_close(outputs(other), outputs(model))
    third = adapted(settings(), llava(), seed=3)
    third.load_adapter(tmp_path, "again")
    third.set_adapter("again")
    torch.testing.assert_close(outputs(third.eval()), outputs(model))
    twin = copy.deepcopy(model)
    torch.testing.assert_close(outputs(twin), outputs(model))


def test_beams_and_rows_of_their_own_adapter(model):
    two = adapted(settings(), llava())
    two.add_adapter("second", settings(routing="add"))
    fill(two, 3, "lora_B.second").eval()
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE]}
    tokens = model.generate(**BATCH, num_beams=3, **asked)
    assert torch.equal(tokens, model.generate(**BATCH, num_beams=3, use_cache=False, **asked))
    mixed = two.generate(**BATCH, num_beams=3, adapter_names=["default", "second", "__base__"], **asked)
    two.set_adapter("second")
    second = two.generate(**BATCH, num_beams=3, **asked)
    with two.disable_adapter():
        base = two.generate(**BATCH, num_beams=3, **asked)
    assert torch.equal(mixed, torch.stack([tokens[0], second[1], base[2]]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_with_nothing_bound_by_hand(checkpointing, tmp_path):
    model = get_peft_model(llava(), settings())
    data = [{"input_ids": ids, "labels": ids, "pixel_values": image} for ids, image in zip(IDS, PIXELS, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=3, save_steps=2, report_to=[], disable_tqdm=True,
        learning_rate=1e-2, use_cpu=True, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    before = outputs(model.eval())
    Trainer(model, arguments, train_dataset=data).train()
    after = outputs(model.eval())
    assert not torch.allclose(after, before, atol=1e-4)
    loaded = PeftModel.from_pretrained(llava(), tmp_path / "checkpoint-2").eval()
    torch.testing.assert_close(outputs(loaded), after, rtol=0, atol=1e-6)


def test_a_function_of_the_batch_is_not_saved(tmp_path):
    function = lambda batch: batch.pop("features")  # noqa: E731
    model = adapted(settings(image_from=function), llava())
    features = torch.randn(3, 1, WIDTH)
    got = outputs(model, features=features)
    with routingvl.bind_image(model, features):
        assert torch.equal(got, outputs(model))
    with pytest.warns(UserWarning, match="image_from is a function"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llava(), tmp_path).eval()
    with pytest.raises(RuntimeError, match="no visual features bound"):
        outputs(loaded)
    routingvl.attach(loaded.get_base_model(), function)
    assert torch.equal(outputs(loaded, features=features), got)


def test_adapters_agree_on_the_image_and_the_last_takes_it_along():
    model = adapted(settings(), llava())
    with pytest.raises(PeftMethodError, match="differ in image_from, image_pooling or text_only"):
        model.add_adapter("second", settings(text_only="zero"))
    model.add_adapter("second", settings(routing="add"))
    base = model.get_base_model()
    model.delete_adapter("default")
    assert len(base._forward_pre_hooks) == 1
    model.delete_adapter("second")
    assert not base._forward_pre_hooks
    assert not adapted(settings(), llava()).unload()._forward_pre_hooks
    base = llava()
    with pytest.raises(BindingError, match=r"image_from='model\.projector' is no sub-module"):
        get_peft_model(base, settings(image_from="model.projector"))
    assert not any(routed_layers(base))


def test_the_last_adapter_that_transformers_deletes_takes_its_image_along(tmp_path):
    adapted(settings(), llava()).save_pretrained(tmp_path)
    model = llava()
    model.load_adapter(tmp_path)
    want = outputs(model.eval())
    model.add_adapter(config("none"), "plain")
    twin = copy.deepcopy(model)
    model.delete_adapter("default")
    assert not model._forward_pre_hooks
    assert "generate" not in vars(model)
    assert len(twin._forward_pre_hooks) == 1
    twin.delete_adapter("plain")
    assert len(twin._forward_pre_hooks) == 1
    twin.delete_adapter("default")
    assert not twin._forward_pre_hooks
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    torch.testing.assert_close(outputs(model.eval()), want)
    layer = copy.deepcopy(next(routed_layers(model)))
    layer.delete_adapter("again")
    assert len(model._forward_pre_hooks) == 1


def test_vision_is_adapted_when_it_is_asked_for_by_name():
    every = get_peft_model(llava(), settings(target_modules="all-linear", exclude_modules=["down_proj"]))
    assert len(names_of(every)) == 12
    assert all("language_model" in name for name in names_of(every))
    assert all("language_model" in name for name in every.peft_config["default"].target_modules)
    by_regex = get_peft_model(llava(), config("none", target_modules=r".*vision_tower.*\.q_proj"))
    assert len(names_of(by_regex)) == 2
    tower = "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    if tower not in dict(llava().named_modules()):
        tower = tower.replace(".vision_model", "")
    assert names_of(get_peft_model(llava(), config("none", target_modules=[tower]))) == {tower}
    assert names_of(get_peft_model(llava(), config("none", target_modules=TARGETS)))


def test_every_layer_of_a_model_has_one_context(model):
    assert len({id(layer.context) for layer in routed_layers(model)}) == 1
