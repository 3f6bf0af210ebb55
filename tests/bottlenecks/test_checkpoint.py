"""Saving and loading adapters: strict, loud, and exact."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import batch, captioner, randomise, small_gpt2, small_roberta, small_vit

from routingvl import RoutingConfig, ViTGPT2ForCaptioning, ViTRobertaForVQA
from routingvl.bottlenecks.checkpoint import CheckpointError, save_adapter
from routingvl.models import load_pretrained


@pytest.fixture
def folders(tmp_path):
    """Backbones as local folders, as a user has them."""
    models = {"vit": small_vit(), "gpt2": small_gpt2(), "roberta": small_roberta()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "backbones" / name)
    return tmp_path


def build(folders, cls, **options):
    text = "gpt2" if cls is ViTGPT2ForCaptioning else "roberta"
    config = RoutingConfig(rank=4, routing="vllora", relu=True, alpha=6, layers=(0, 1))
    root = folders / "backbones"
    return randomise(cls.from_backbones(str(root / "vit"), str(root / text), config, **options)).eval()


@pytest.mark.parametrize(
    ("cls", "options"), [(ViTGPT2ForCaptioning, {"visual_prefix": False}), (ViTRobertaForVQA, {"num_labels": 5})]
)
def test_save_and_load_bit_for_bit(folders, cls, options):
    model, inputs = build(folders, cls, **options), batch()
    want = model(**inputs).logits
    model.save_pretrained(folders / "run")
    assert sorted(p.name for p in (folders / "run").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for loaded in (cls.from_pretrained(folders / "run"), load_pretrained(folders / "run")):
        assert type(loaded) is cls
        assert not loaded.training
        assert torch.equal(loaded(**inputs).logits, want)
        assert loaded.report.names == model.report.names
        assert loaded.routing == model.routing


def test_only_what_trains_is_saved(folders):
    model = build(folders, ViTRobertaForVQA, num_labels=5)
    model.save_pretrained(folders / "run")
    saved = load_file(folders / "run" / "adapter_model.safetensors")
    assert sorted(saved) == sorted(model.report.names)
    assert sum(t.numel() for t in saved.values()) == model.report.trainable


def test_run_and_backbones_can_move_together(folders, tmp_path_factory):
    model = build(folders, ViTGPT2ForCaptioning)
    model.save_pretrained(folders / "run")
    elsewhere = tmp_path_factory.mktemp("moved") / "all"
    shutil.move(folders, elsewhere)
    assert torch.equal(load_pretrained(elsewhere / "run")(**batch()).logits, model(**batch()).logits)
    shutil.rmtree(elsewhere / "backbones")
    with pytest.raises(CheckpointError, match=r"backbone's folder .* is gone: pass vision="):
        load_pretrained(elsewhere / "run")


def test_backbones_given_as_objects_must_be_given_again(tmp_path):
    model = randomise(captioner()).eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"given as an object without a name: pass vision="):
        load_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_another_backbone_is_noticed(tmp_path):
    captioner().save_pretrained(tmp_path)
    other = small_gpt2()
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="another text backbone"):
        load_pretrained(tmp_path, vision=small_vit(), text=other)
    with pytest.raises(CheckpointError, match="another vision backbone"):
        load_pretrained(tmp_path, vision=small_vit(16), text=small_gpt2())


def damage(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_loud_on_every_misfit(tmp_path):
    def load():
        return load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())

    with pytest.raises(CheckpointError, match=r"adapter_config.json does not exist"):
        load()
    captioner().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a VisionTextForCaptioning, not a VisionTextForVQA"):
        ViTRobertaForVQA.from_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    good = load_file(weights)
    key = "gpt.transformer.h.0.attn.c_attn.lora_A"
    for change, message in (
        ({k: v for k, v in good.items() if k != key}, f"missing {key}"),
        (good | {"extra.weight": torch.zeros(1)}, "unexpected extra.weight"),
        (good | {key: torch.zeros(3, 32)}, r"lora_A has shape \[3, 32\], the model needs \[8, 32\]"),
    ):
        save_file(change, weights)
        with pytest.raises(CheckpointError, match=message):
            load()
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        load()
    damage(tmp_path, peft_type="LORA")
    with pytest.raises(CheckpointError, match="peft_type is 'LORA'"):
        load()
    damage(tmp_path, peft_type="ROUTINGVL", format_version=99)
    with pytest.raises(CheckpointError, match="format_version 99"):
        load()
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load()


def test_wrong_rank_in_the_configuration(tmp_path):
    captioner().save_pretrained(tmp_path)
    routing = json.loads((tmp_path / "adapter_config.json").read_text())["routing"]
    damage(tmp_path, routing=routing | {"rank": 8})
    with pytest.raises(CheckpointError, match=r"the model needs \[16, 32\]"):
        load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    damage(tmp_path, routing=routing | {"rnak": 8})
    with pytest.raises(ValueError, match="unknown key 'rnak'; did you mean 'rank'"):
        load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = captioner()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("routingvl.bottlenecks.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(randomise(model), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(CheckpointError, match="is a file"):
        save_adapter(model, tmp_path / "adapter_config.json")


def path_of(*keys):
    """A change of a JSON object: a value under nested keys."""

    def change(config, value):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (["model_class"], "load_pretrained", "'load_pretrained' is not a model"),
        (["model_class"], ["ViTGPT2ForCaptioning"], "model_class=.* must be a text"),
        (["model_class"], "ViTRobertaForVQA", "model lacks, or has in excess, .*caption_loss.*num_labels"),
        (["format_version"], True, "format_version True is not 1|must be an integer"),
        (["surprise"], 1, "unknown key 'surprise'"),
        (["routing"], [1], "routing=.* must be an object"),
        (["routing", "rank"], 10**9, "rank=1000000000 must be at most 16384"),
        (["routing", "rank"], "4", "rank='4' must be an integer"),
        (["routing", "targets"], [5], r"targets=\[5\] must be a list of texts"),
        (["routing", "train_bias"], "no", "train_bias='no' must be true or false"),
        (["routing", "alpha"], None, "alpha=None must be a finite number"),
        (["model"], [1], "model=.* must be an object"),
        (["model", "visual_prefix"], "no", "visual_prefix='no' must be true or false"),
        (["model", "backend"], "eager", "model lacks, or has in excess, backend"),
        (["model", "config"], 1, "model lacks, or has in excess, config"),
        (["model", "vision_width"], 10**9, "vision_width=1000000000 must be at most 1000000"),
        (["backbones"], [1], "backbones=.* must be an object"),
        (["backbones"], {"text": None}, "backbones must be vision and text, not text"),
        (["backbones", "text"], None, "backbones.text must hold keys such as name, not None"),
        (["backbones", "text"], {"name": "gpt2"}, "backbones.text: model_type, .* missing"),
        (["backbones", "text", "hidden_size"], "32", "hidden_size='32' must be an integer"),
        (["backbones", "vision", "name"], 3, "name=3 must be a text or null"),
        (["model", "vision_features"], "x", r"adapter_config\.json: vision_features='x' is not one of"),
        (["model", "caption_loss"], "x", r"adapter_config\.json: caption_loss='x' is not one of"),
    ],
)
def test_every_key_of_the_configuration_is_checked(tmp_path, keys, value, message):
    captioner().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path_of(*keys)(config, value)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("section", [None, "routing", "model", "backbones"])
def test_no_key_of_the_configuration_may_be_missing(tmp_path, section):
    captioner().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    whole = json.loads(path.read_text())
    for key in (whole[section] if section else whole).keys() - {"routingvl_version"}:
        config = json.loads(json.dumps(whole))
        del (config[section] if section else config)[key]
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=key if section != "backbones" else "backbones must be"):
            load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())


@pytest.mark.parametrize("content", [b"[1, 2]", b'{"a": ' * 50_000, b"\xff\xfe", b"", b'{"peft_type": 1', b"null"])
def test_a_configuration_that_is_no_object(tmp_path, content):
    captioner().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json") as error:
        load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.int(), "is of type torch.int32"),
        (lambda t: t > 0, "is of type torch.bool"),
        (lambda t: t.to(torch.complex64), "is of type torch.complex64"),
        (lambda t: t.to(torch.float8_e5m2), "is of type torch.float8_e5m2"),
        (lambda t: t / 0, "holds NaN or infinity"),
        (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), "holds NaN or infinity"),
    ],
)
def test_tensors_that_are_no_weights(tmp_path, change, message):
    captioner().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file(tensors | {name: change(tensors[name])}, path)
    with pytest.raises(CheckpointError, match=f"adapter_model.safetensors: {name} {message}"):
        load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())


def test_files_of_weights_that_are_none(tmp_path):
    captioner().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    for content in (b"", b"x" * 5, (10 * 2**30).to_bytes(8, "little") + b"{}", path.read_bytes()[:-7]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged"):
            load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is not a file"):
        load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = captioner()
    with torch.no_grad():
        model.gpt.transformer.h[0].ln_1.weight[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"ln_1\.weight holds NaN or infinity"):
        model.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lower_precision_is_taken_and_higher_rounded(tmp_path):
    model = captioner().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    name = "gpt.transformer.h.0.attn.c_attn.lora_A"
    assert torch.equal(loaded.get_parameter(name), model.get_parameter(name).float())


def test_one_other_weight_or_setting_makes_another_backbone(tmp_path):
    model = captioner()
    model.save_pretrained(tmp_path)
    first = json.loads((tmp_path / "adapter_config.json").read_text())["backbones"]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["backbones"] == first
    assert load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2()).routing == model.routing

    def refused(**changed):
        parts = {"vision": small_vit(), "text": small_gpt2()} | changed
        with pytest.raises(CheckpointError, match=f"another {next(iter(changed))} backbone"):
            load_pretrained(tmp_path, **parts)

    text, vision = small_gpt2(), small_vit()
    with torch.no_grad():
        text.transformer.h[1].mlp.c_fc.weight[3, 5] += 1
        vision.get_parameter(next(n for n, p in vision.named_parameters() if p.dim() == 2))[1, 1] += 1
    refused(text=text)
    refused(vision=vision)
    text = small_gpt2()
    text.config.n_head = 2
    refused(text=text)
    # adapters of earlier versions name a few values only
    for saved in first.values():
        del saved["content"]
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"backbones": first}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2()).routing == model.routing


def test_a_further_parameter_that_was_trained_comes_back(tmp_path):
    model = captioner()
    model.gpt.transformer.wpe.weight.requires_grad_(True)
    randomise(model).eval().save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    assert loaded.report.names == model.report.names


def test_a_frozen_weight_slipped_into_the_file_is_refused(tmp_path):
    captioner().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path) | {"gpt.transformer.wpe.weight": torch.zeros(40, 32)}, path)
    with pytest.raises(CheckpointError, match="another text backbone"):
        load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
