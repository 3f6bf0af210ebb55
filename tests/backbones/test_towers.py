"""Each vision tower against transformers' own class: all weights, and every kind of feature taken by hand."""

import copy
import json
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import randomise, small_roberta
from tower_zoo import CASES, SHAPE, Case, randomised

from routingvl import RoutingConfig, ViTRobertaForVQA
from routingvl.backbones.loading import BackboneError
from routingvl.backbones.vision import TOWERS, check_features, check_image_size, image_features, load_tower, tower_width
from routingvl.bottlenecks.checkpoint import CheckpointError

TEXT = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50,
}  # fmt: skip
LAYERED = [name for name, case in CASES.items() if hasattr(case.config, "intermediate_size")]


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Each case's folder, and the model of transformers that was saved there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    made = {}
    for name, case in CASES.items():
        model = randomised(getattr(transformers, case.tower)(case.config))
        folder = tmp_path_factory.mktemp("towers") / name
        model.save_pretrained(folder)
        made[name] = (folder, model)
    return made


def pixels(case: Case) -> torch.Tensor:
    return torch.randn(2, 3, case.side, case.side, generator=torch.Generator().manual_seed(2))


def by_hand(case: Case, output) -> dict[str, torch.Tensor]:
    """Every feature that the case has, from an output of transformers."""
    tokens = output.last_hidden_state
    if case.tower in ("ConvNextModel", "ResNetModel"):
        assert tokens.shape[2:] == (case.side // 32, case.side // 32)
        tokens = torch.stack([tokens[:, :, y, x] for y in range(tokens.shape[2]) for x in range(tokens.shape[3])], 1)
    patches = tokens[:, case.prefix :]
    found = {"tokens": tokens, "mean": (patches.sum(1) / patches.shape[1])[:, None]}
    found["pooler"] = output.pooler_output.reshape(2, 1, 24)
    if "cls" in case.kinds:
        found["cls"] = tokens[:, 0][:, None]
    assert found.keys() == set(case.kinds.split())
    return found


@pytest.mark.parametrize("name", CASES)
def test_features_are_those_taken_by_hand(towers, name):
    folder, original = towers[name]
    case, tower = CASES[name], load_tower(str(folder))
    assert type(tower).__name__ == case.tower
    assert not tower.training
    for (key, kept), saved in zip(tower.state_dict().items(), original.state_dict().values(), strict=True):
        assert torch.equal(kept, saved), key
    with torch.no_grad():
        expected = by_hand(case, original(pixel_values=pixels(case)))
    for kind, want in expected.items():
        check_features(tower, kind)
        torch.testing.assert_close(image_features(tower, pixels(case), kind), want)
    assert tower_width(tower) == 24
    for kind in {"pooler", "cls", "mean", "tokens"} - expected.keys():
        known = ", ".join(map(repr, TOWERS[case.config.model_type].features))
        for call in (check_features, lambda tower, kind: image_features(tower, pixels(case), kind)):
            with pytest.raises(BackboneError, match=rf"vision_features='{kind}': a .* has only {known}$"):
                call(tower, kind)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_counts(towers, name, tmp_path):
    """A checkpoint without one of its tensors, with one more or with another shape is refused, whichever it is."""
    folder, _ = towers[name]
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    needed = [key for key in tensors if not key.endswith(("num_batches_tracked", "mask_token"))]
    droppable = [key for key in needed if not (name in ("vit", "deit") and key.startswith("pooler."))]

    def refused(changed, message):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BackboneError, match=message) as error:
            load_tower(str(tmp_path))
        assert str(tmp_path) in str(error.value)

    for key in (droppable[0], droppable[len(droppable) // 2], droppable[-1]):
        refused({k: v for k, v in tensors.items() if k != key}, "missing: ")
    refused(tensors | {"surprise.weight": torch.ones(3)}, "unexpected: surprise.weight")
    refused(tensors | {needed[-1]: torch.ones(7)}, r"of another shape: .*\[7\]")


def whole_clip():
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=SHAPE))


def whole_siglip():
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=SHAPE))


def with_projection():
    return transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**SHAPE))


@pytest.mark.parametrize("make", [whole_clip, whole_siglip, with_projection])
def test_a_whole_model_gives_its_tower(make, tmp_path):
    torch.manual_seed(0)
    model = randomised(make())
    model.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path))
    for (key, kept), saved in zip(tower.state_dict().items(), model.vision_model.state_dict().values(), strict=True):
        assert torch.equal(kept, saved), key
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want = model.vision_model(pixel_values=images).pooler_output
    torch.testing.assert_close(image_features(tower, images, "pooler")[:, 0], want)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = next(key for key in tensors if key.startswith("vision_model.") and key.endswith("layer_norm1.weight"))
    save_file({k: v for k, v in tensors.items() if k != lost}, path, metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"missing: encoder.layers.\d.layer_norm1.weight"):
        load_tower(str(tmp_path))


def test_names_of_older_files(towers, tmp_path):
    """What transformers 4 wrote: a prefix in the folder of a tower alone, and buffers of integers."""
    for name in ("clip", "siglip"):
        folder, original = towers[name]
        tensors = {f"vision_model.{key}": value for key, value in load_file(folder / "model.safetensors").items()}
        tensors["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        tower = load_tower(str(tmp_path))
        assert all(map(torch.equal, tower.state_dict().values(), original.state_dict().values()))


HEADS = {
    "deit": "DeiTForImageClassificationWithTeacher",
    "beit": "BeitForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "swin": "SwinForImageClassification",
    "convnext": "ConvNextForImageClassification",
    "resnet": "ResNetForImageClassification",
}


@pytest.mark.parametrize("name", HEADS)
def test_a_classifier_is_a_tower(name, tmp_path):
    case = CASES[name]
    model = randomised(getattr(transformers, HEADS[name])(case.config))
    model.save_pretrained(tmp_path)
    tower = load_tower(str(tmp_path))
    base = getattr(model, model.base_model_prefix).state_dict()
    for key, kept in tower.state_dict().items():
        assert torch.equal(kept, base[key]), key
    if name == "deit":
        assert tower.pooler is None
        with pytest.raises(BackboneError, match="has no pooler"):
            check_features(tower, "pooler")


def test_a_checkpoint_of_masked_patches_without_its_final_norm_in_the_tower_is_refused(tmp_path):
    transformers.BeitForMaskedImageModeling(CASES["beit"].config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"missing: pooler.layernorm.*unexpected: layernorm.bias"):
        load_tower(str(tmp_path))


def test_what_is_no_tower_says_what_to_give(tmp_path):
    vision = {k: v for k, v in SHAPE.items() if k != "image_size"} | {"num_patches": 4}
    config = transformers.Siglip2Config(text_config=TEXT, vision_config=vision)
    transformers.Siglip2Model(config).save_pretrained(tmp_path / "naflex")
    with pytest.raises(BackboneError, match=r"naflex is of model type 'siglip2', .*NaFlex.*fixed resolution"):
        load_tower(str(tmp_path / "naflex"))
    for kind, inner in (("llava", "clip_vision_model"), ("vision-encoder-decoder", "vit")):
        (tmp_path / kind).mkdir()
        name = "encoder" if "encoder" in kind else "vision_config"
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind, name: {"model_type": inner}}))
        with pytest.raises(BackboneError, match=rf"whole model around a vision tower \('{inner}'\): save that tower"):
            load_tower(str(tmp_path / kind))
    with pytest.raises(BackboneError, match="a ViTForImageClassification is no ViTModel: give the tower inside it"):
        check_features(transformers.ViTForImageClassification(CASES["vit"].config), "cls")
    with pytest.raises(BackboneError, match=r"CLIPModel is of model type 'clip', .*give its .vision_model"):
        check_features(whole_clip(), "cls")


def test_the_tower_of_a_llava(tmp_path):
    """Saved as docs/backbones.md says, it gives what LLaVA reads."""
    text = transformers.LlamaConfig(num_key_value_heads=2, **TEXT)
    config = transformers.LlavaConfig(vision_config=transformers.CLIPVisionConfig(**SHAPE), text_config=text)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want = model.model.vision_tower(images, output_hidden_states=True).hidden_states[config.vision_feature_layer]
    torch.testing.assert_close(image_features(load_tower(str(tmp_path)), images, "tokens", -2), want)


@pytest.mark.parametrize("name", CASES)
def test_a_model_trains_saves_and_loads_with_it(towers, name, tmp_path):
    case, (folder, original) = CASES[name], towers[name]
    config = RoutingConfig(rank=2, alpha=4, routing="vllora")
    text = small_roberta()
    model = ViTRobertaForVQA.from_backbones(str(folder), text, config, num_labels=3, vision_features="tokens")
    randomise(model).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    out = model(pixel_values=pixels(case), input_ids=ids, labels=torch.eye(3)[:2])
    out.loss.backward()
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained.values())
    assert not any(key.startswith("vit.") for key in trained)
    model.save_pretrained(tmp_path)
    again = ViTRobertaForVQA.from_pretrained(tmp_path, text=small_roberta())
    assert torch.equal(again(pixel_values=pixels(case), input_ids=ids).logits, out.logits)
    with torch.no_grad():
        tokens = by_hand(case, original(pixel_values=pixels(case)))["tokens"]
    torch.testing.assert_close(again(vision_features=tokens, input_ids=ids).logits, out.logits)
    last = list(original.state_dict())[-1 if name != "resnet" else -2]  # of a ResNet a statistic, not a parameter
    other = copy.deepcopy(original)
    other.state_dict()[last].add_(1.0)
    with pytest.raises(CheckpointError, match="trained with another vision backbone"):
        ViTRobertaForVQA.from_pretrained(tmp_path, vision=other, text=small_roberta())


@pytest.mark.parametrize("name", CASES)
def test_image_sizes(towers, name):
    case, (folder, _) = CASES[name], towers[name]
    tower, size = load_tower(str(folder)), (case.side, case.side)
    check_image_size(tower, size)
    if name in ("convnext", "resnet", "dinov3_convnext"):
        check_image_size(tower, (70, 65))
        assert image_features(tower, torch.zeros(1, 3, 70, 65), "mean").shape == (1, 1, 24)
        return
    if name.startswith("dinov"):
        check_image_size(tower, (32, 48))
        tokens = image_features(tower, torch.zeros(1, 3, 32, 48), "tokens")
        assert tokens.shape == (1, case.prefix + 24, 24)
        wrong, message = (20, 32), "20 x 32 pixels, which patches of 8 x 8 of the vision tower .* do not fill"
    else:
        wrong, message = (24, 16), rf"24 x 16 pixels, but the vision tower {re.escape(str(folder))} takes {case.side} x"
    for call in (check_image_size, lambda tower, size: image_features(tower, torch.zeros(1, 3, *size), "mean")):
        with pytest.raises(BackboneError, match=message):
            call(tower, wrong)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_counted_from_the_end(towers, name):
    case, (folder, original) = CASES[name], towers[name]
    tower = load_tower(str(folder))
    if name not in LAYERED:
        with pytest.raises(BackboneError, match=r"vision_layer=-2: a .* has stages of different widths"):
            check_features(tower, "mean", -2)
        return
    # By hand: what each transformer layer returned, heard by a hook.
    heard, layers = [], [m for m in original.modules() if re.search(r"(Layer|Block)$", type(m).__name__)]
    assert len(layers) == 3
    keep = lambda module, args, output: heard.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        original(pixel_values=pixels(case))
    for handle in handles:
        handle.remove()
    for layer in (-1, -2, -3):
        tokens = heard[layer]
        expected = {"tokens": tokens, "mean": tokens[:, case.prefix :].mean(1, keepdim=True), "cls": tokens[:, :1]}
        for kind in expected.keys() & set(case.kinds.split()):
            check_features(tower, kind, layer)
            torch.testing.assert_close(image_features(tower, pixels(case), kind, layer), expected[kind])
    for kind, layer, message in (
        ("mean", -4, "this tower has layers -3 to -1"),
        ("mean", 0, "this tower has layers"),
        ("pooler", -2, "a pooler reads the tower's own output only"),
    ):
        for call in (check_features, lambda tower, *args: image_features(tower, pixels(case), *args)):
            with pytest.raises(BackboneError, match=rf"vision_layer={layer}: {message}"):
                call(tower, kind, layer)
