"""Backbones that are not what their config says: refused by file and key before anything is written."""

import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import small_vit, tiny_config, write_tiny
from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from routingvl import RoutingConfig, ViTRobertaForVQA
from routingvl.backbones.loading import BackboneError, find_source
from routingvl.backbones.text import READ, WRITE, load_text, text_body
from routingvl.backbones.vision import load_tower
from routingvl.commands import answer, export
from routingvl.config import ConfigError
from routingvl.evaluate import evaluate
from routingvl.models import load_pretrained
from routingvl.train import train

KINDS = ("vit", "roberta", "gpt2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def load(folder):
    """The backbone of a folder, as the model classes load it."""
    if "vit" in folder.name:
        return load_tower(str(folder))
    kind = folder.name.split("-")[0]
    return text_body(use := READ if kind == "roberta" else WRITE, load_text(use, str(folder)))


@pytest.fixture
def copy(tiny, tmp_path):
    """A function: a copy of a backbone's folder, with its weights and config changed."""

    def changed(kind, weights=None, config=None):
        folder = shutil.copytree(tiny / kind, tmp_path / f"{kind}-copy")
        if weights is not None:
            tensors = load_file(folder / "model.safetensors")
            save_file(weights(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if config is not None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return changed


def norm(tensors):
    """The name of a LayerNorm's weight in the second layer."""
    return next(name for name in tensors if re.search(r"\.1\..*(ln_1|LayerNorm|layernorm_before)\.weight$", name))


def replaced(make):
    """A change of weights: one tensor becomes ``make`` of it."""

    def change(tensors):
        tensors[norm(tensors)] = make(tensors[norm(tensors)])

    return change


def first_half(tensors):
    return dict(list(tensors.items())[: len(tensors) // 2])


def renamed(tensors):
    return {f"x.{name}": tensor for name, tensor in tensors.items()}


def with_nan(tensor):
    tensor[3] = float("nan")
    return tensor


LAYERS = {"vit": "num_hidden_layers", "roberta": "num_hidden_layers", "gpt2": "n_layer"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("weights", "config", "message"),
    [
        (first_half, None, "missing: .*and .* more"),
        (renamed, None, "missing: .*unexpected: x\\."),
        (
            lambda tensors: {n: t for n, t in tensors.items() if n != norm(tensors)},
            None,
            "missing: [^ ]*1.[^ ]*weight$",
        ),
        (lambda tensors: tensors | {"h.7.surprise": torch.ones(3)}, None, "unexpected: h.7.surprise"),
        (replaced(lambda t: torch.ones(7)), None, r"of another shape: .* \[7\] \(the config says \[32\]\)"),
        (replaced(lambda t: t.int()), None, "model.safetensors: .*weight is of type I32; weights must be floating"),
        (replaced(lambda t: t > 0), None, "model.safetensors: .*weight is of type BOOL"),
        (replaced(with_nan), None, "weight holds NaN or infinity"),
        (replaced(lambda t: t / 0), None, "weight holds NaN or infinity"),
        (None, 5, "missing: "),
        (None, 1, "unexpected: "),
    ],
)
def test_weights_that_are_not_the_models(copy, kind, weights, config, message):
    folder = copy(kind, weights, config and {LAYERS[kind]: config})
    with pytest.raises(BackboneError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"", "SafetensorError"),
        ("model.safetensors", (10 * 2**30).to_bytes(8, "little") + b"{}", "header too large"),
        ("model.safetensors", None, "SafetensorError"),
        ("config.json", b"[1, 2]", "config.json must hold an object, not a list"),
        ("config.json", b"[" * 100_000, "config.json is nested too deeply"),
        ("config.json", b"\xff\xfe{", "config.json is not UTF-8"),
        ("config.json", b'{"model_type": "vit"', "config.json is not valid JSON"),
        ("adapter_config.json", b"{}", "holds an adapter_config.json"),
    ],
)
def test_damaged_files(copy, kind, name, content, message):
    folder = copy(kind)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(BackboneError, match=message) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 600


class _Runs:
    """What writes a file when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_runs_code_is_refused(copy, tmp_path):
    folder = copy("gpt2")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Runs(tmp_path / "ran")))
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_plain_tensors_loads_and_its_types_count(copy):
    folder = copy("gpt2")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert torch.equal(load(folder).get_input_embeddings().weight, tensors["transformer.wte.weight"])
    replaced(lambda t: t.long())(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match=r"pytorch_model.bin: .* is of type torch.int64"):
        load(folder)


def test_old_buffers_and_other_heads_are_known(copy):
    extra = {
        "gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "lm_head.weight": None},
        "roberta": {"embeddings.position_ids": torch.arange(5)[None], "lm_head.bias": torch.ones(2)},
    }
    for kind, tensors in extra.items():
        load(copy(kind, lambda saved, new=tensors: saved | {k: v for k, v in new.items() if v is not None}))


def test_a_masked_image_model_is_a_tower(tmp_path):
    torch.manual_seed(0)
    saved = ViTForMaskedImageModeling(small_vit().config)
    saved.save_pretrained(tmp_path / "vit-masked")
    tower = load_tower(str(tmp_path / "vit-masked"))
    assert torch.equal(tower.embeddings.cls_token, saved.vit.embeddings.cls_token)
    assert tower.pooler is None


HEADS = {"vit": "num_attention_heads", "roberta": "num_attention_heads", "gpt2": "n_head"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-1, 0, 3, 64, 10**7])
def test_heads_divide_the_width(copy, kind, value):
    with pytest.raises(BackboneError, match=rf"{kind}-copy: config.json: {HEADS[kind]} {value} must be at least 1"):
        load(copy(kind, config={HEADS[kind]: value}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{"return_dict": False}, {"chunk_size_feed_forward": 3}])
def test_how_a_config_would_return_its_output_does_not_count(tiny, copy, kind, config):
    given = torch.zeros(1, 3, 16, 16) if kind == "vit" else torch.arange(5, 10)[None]
    outputs = [load(folder)(given) for folder in (tiny / kind, copy(kind, config=config))]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[1].keys() == outputs[0].keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pickled", [False, True])
def test_a_config_of_a_far_larger_model_is_refused_before_it_is_built(copy, kind, pickled, monkeypatch):
    wide = {"n_inner": 10**7} if kind == "gpt2" else {"intermediate_size": 10**7}
    folder = copy(kind, config={LAYERS[kind]: 10**7})
    if pickled:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("it was built"))
    with pytest.raises(BackboneError, match=rf"{kind}-copy: config.json: {LAYERS[kind]} 10000000 is more than"):
        load(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wide | {LAYERS[kind]: 2}))
    with pytest.raises(BackboneError, match=r"config.json is of a model of [\d,]+ weights, but the files hold [\d,]+"):
        load(folder)


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [50256, -1])
def test_special_tokens_are_of_the_vocabulary(copy, key, value):
    with pytest.raises(BackboneError, match=rf"gpt2-copy: {key} {value} is not a token of its vocabulary of \d+"):
        load(copy("gpt2", config={key: value}))


def test_a_bad_backbone_stops_a_run_before_anything_is_written(tiny, copy, tmp_path):
    for key, folder in (("vision", copy("vit", first_half)), ("text", copy("roberta", first_half))):
        with pytest.raises(ConfigError, match=f"{folder.name}: .*missing"):
            train(tiny_config(tiny, tmp_path / "run", "vqa", **{key: str(folder)}), log="quiet")
    wrong_size = copy_of_vit(tiny, tmp_path, image_size=24)
    with pytest.raises(ValueError, match=r"16 x 16 pixels, but .* 24"):
        train(tiny_config(tiny, tmp_path / "run", "vqa", vision=str(wrong_size)), log="quiet")
    assert not (tmp_path / "run").exists()


def copy_of_vit(tiny, folder, image_size):
    """A ViT of another image size, with the preprocessing of the tiny one."""
    config = small_vit().config
    config.image_size = image_size
    ViTModel(config).save_pretrained(folder / "larger")
    shutil.copy(tiny / "vit" / "preprocessor_config.json", folder / "larger")
    return folder / "larger"


def test_a_vit_without_pooler_has_its_other_features(copy, tiny, tmp_path):
    folder = tmp_path / "vit-classifier"
    ViTForImageClassification(small_vit().config).save_pretrained(folder)
    tower = load_tower(str(folder))
    assert tower.pooler is None
    with pytest.raises(
        ConfigError, match=r"model.vision: .*vit-classifier has no pooler, .*set model.vision_features=cls"
    ):
        ViTRobertaForVQA.from_backbones(tower, str(tiny / "roberta"), RoutingConfig(rank=2))
    ViTRobertaForVQA.from_backbones(tower, str(tiny / "roberta"), RoutingConfig(rank=2), vision_features="cls")


def test_a_masked_language_model_gets_a_pooler_that_trains_and_is_saved(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny / "roberta", tmp_path / "masked")
    RobertaForMaskedLM(RobertaConfig.from_pretrained(folder)).save_pretrained(folder)
    config = tiny_config(tiny, tmp_path / "run", "vqa", text=str(folder), max_steps=3)
    result = train(config, log="quiet")
    saved = load_file(result.run_dir / "last" / "adapter_model.safetensors")
    first = tiny_config(tiny, tmp_path / "first", "vqa", text=str(folder), max_steps=1, lr=1e-30)
    drawn = load_file(train(first, log="quiet").run_dir / "last" / "adapter_model.safetensors")
    for name in ("roberta.pooler.dense.weight", "roberta.pooler.dense.bias"):
        assert not torch.equal(saved[name], drawn[name])
    assert 0.01 < drawn["roberta.pooler.dense.weight"].std() < 0.03
    again = tiny_config(tiny, tmp_path / "again", "vqa", text=str(folder), max_steps=1, lr=1e-30)
    repeated = load_file(train(again, log="quiet").run_dir / "last" / "adapter_model.safetensors")
    assert torch.equal(repeated["roberta.pooler.dense.weight"], drawn["roberta.pooler.dense.weight"])

    torch.manual_seed(99)  # nothing may depend on what is drawn anew
    model = load_pretrained(result.run_dir / "last")
    assert torch.equal(model.roberta.pooler.dense.weight, saved["roberta.pooler.dense.weight"])
    assert evaluate(result.run_dir, "val", log="quiet")["n"] == 4
    image = next((tiny / "data" / "val2014").iterdir())
    assert answer.run([str(result.run_dir), str(image), "what color is it?"]) == 0
    assert export.run([str(result.run_dir), str(tmp_path / "exported")]) == 0
    exported = load_pretrained(tmp_path / "exported")
    best = load_file(result.run_dir / "best" / "adapter_model.safetensors")
    assert torch.equal(exported.roberta.pooler.dense.weight, best["roberta.pooler.dense.weight"])
    capsys.readouterr()


@pytest.mark.parametrize("name", ["./gone", "/gone", "~/gone/vit", "runs/old/vit"])
def test_a_path_never_contacts_the_network(name, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was asked"))
    with pytest.raises(BackboneError, match="does not exist: give a hub name or a folder"):
        load_tower(name)


def test_a_hub_name_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BackboneError, match="no-one/no-vit is neither a folder here nor a model of the hub that can"):
        load_tower("no-one/no-vit")


def test_what_is_a_path(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    assert find_source("vit") == ("vit", True)
    assert find_source("gpt2-large") == ("gpt2-large", False)
    assert find_source("google/vit-base-patch16-224") == ("google/vit-base-patch16-224", False)
    with pytest.raises(BackboneError, match=r"config\.json is not a folder"):
        find_source("vit/config.json")
