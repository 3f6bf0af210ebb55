"""Saving, loading, the hub, types and devices, by the keywords that users of transformers know.

There is no network: names of the hub are looked up in a cache that the test lays out as huggingface_hub does, and what
goes to the hub is caught where it would leave, at huggingface_hub.HfApi.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import answerer, batch, captioner, randomise, small_gpt2, small_roberta, small_vit

from routingvl import RoutingConfig, ViTGPT2ForCaptioning
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.config import ConfigError
from routingvl.models import load_pretrained

COMMIT, NAME = "0123456789abcdef0123456789abcdef01234567", "someone/routed-captioner"
ROUTING = RoutingConfig(rank=4, alpha=8, routing="mul")


@pytest.fixture(scope="module")
def model() -> ViTGPT2ForCaptioning:
    return randomise(captioner(ROUTING)).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def cache(saved: Path, tmp_path: Path) -> Path:
    """The hub's cache with one repository, its branch main and the tag v1 at one commit."""
    repository = tmp_path / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    for revision in ("main", "v1"):
        (repository / "refs" / revision).write_text(COMMIT)
    return tmp_path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------- the hub


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_name_of_the_hub_is_loaded(model, cache: Path, revision: str | None) -> None:
    options = {"cache_dir": cache, "local_files_only": True, "revision": revision}
    for load in (load_pretrained, ViTGPT2ForCaptioning.from_pretrained):
        loaded = load(NAME, vision=small_vit(), text=small_gpt2(), **options)
        torch.testing.assert_close(logits(loaded), logits(model))


def test_what_is_not_on_the_hub_is_named(cache: Path) -> None:
    options = {"cache_dir": cache, "local_files_only": True}
    with pytest.raises(CheckpointError, match="someone/else is neither a folder here nor a repository of the hub"):
        load_pretrained("someone/else", **options)
    with pytest.raises(CheckpointError, match="at revision v9 that can be reached"):
        load_pretrained(NAME, revision="v9", **options)
    (cache / "models--someone--routed-captioner" / "snapshots" / COMMIT / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        load_pretrained(NAME, **options)
    for folder in ("./nowhere", "/no/where", Path("someone/else")):
        with pytest.raises(CheckpointError, match="does not exist: give the folder"):
            load_pretrained(folder)


class Hub:
    """What huggingface_hub.HfApi is to the code that pushes."""

    def __init__(self, has_card: bool = False) -> None:
        self.has_card, self.calls, self.files = has_card, {}, {}

    def __call__(self, token=None) -> Hub:
        self.calls["token"] = token
        return self

    def create_repo(self, repo_id, **options):
        self.calls["create_repo"] = options
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_branch(self, repo_id, **options) -> None:
        self.calls["create_branch"] = options

    def file_exists(self, repo_id, name, **options) -> bool:
        return self.has_card

    def upload_folder(self, *, folder_path, allow_patterns, **options) -> str:
        self.calls["upload_folder"] = options
        found = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.files = {name: found[name] for name in found if name in allow_patterns}
        return f"https://huggingface.co/{options['repo_id']}/commit/1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    return hub


def test_a_pushed_adapter_is_the_saved_one_with_a_card(model, saved: Path, hub: Hub, tmp_path: Path) -> None:
    address = model.push_to_hub(
        "routed", token="t", private=True, commit_message="first", revision="dev", tags=["coco"]
    )
    assert address == "https://huggingface.co/me/routed/commit/1"
    assert hub.calls["token"] == "t"
    assert hub.calls["create_repo"] == {"private": True, "exist_ok": True}
    assert hub.calls["create_branch"]["branch"] == hub.calls["upload_folder"]["revision"] == "dev"
    assert hub.calls["upload_folder"]["commit_message"] == "first"
    card = hub.files.pop("README.md").decode()
    assert 'load_pretrained("me/routed", vision=..., text=...)' in card
    front = card.split("---")[1]
    assert all(f"- {tag}\n" in front for tag in ("routingvl", "lora", "routing:mul", "coco"))
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
    assert weights(tmp_path) == weights(saved)
    loaded = load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    torch.testing.assert_close(logits(loaded), logits(model))


def test_the_card_names_backbones_of_the_hub_only(hub: Hub, tmp_path: Path) -> None:
    small_gpt2().save_pretrained(tmp_path / "gpt2")
    model = ViTGPT2ForCaptioning.from_backbones(small_vit(), tmp_path / "gpt2", ROUTING)
    model.backbones["vision"] = "google/vit-base-patch16-224-in21k"
    model.push_to_hub("me/routed")
    card = hub.files["README.md"].decode()
    assert "google/vit-base-patch16-224-in21k" in card.split("---")[1]
    assert str(tmp_path) not in card
    assert 'load_pretrained("me/routed", text=...)' in card


def test_a_card_on_the_hub_stays(model, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(has_card=True)
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    model.push_to_hub("me/routed")
    assert sorted(hub.files) == ["adapter_config.json", "adapter_model.safetensors"]


def test_saving_pushes_where_it_is_asked_to(model, hub: Hub, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run", push_to_hub=True, repo_id="me/other", token="t", commit_message="m")
    assert hub.calls["upload_folder"]["repo_id"] == "me/other"
    model.save_pretrained(tmp_path / "run", push_to_hub=True)
    assert hub.calls["upload_folder"]["repo_id"] == "me/run"


# ------------------------------------------------------------------------------------------------------ saving, loading


def test_usual_keywords_change_nothing(model, saved: Path, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="5GB", variant=None, save_peft_format=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert weights(tmp_path) == weights(saved)


@pytest.mark.parametrize(
    "options",
    [
        {"safe_serialization": False},
        {"variant": "fp16"},
        {"max_shard_size": "1KB"},
        {"distributed_checkpoint": True},
        {"save_function": torch.save},
        {"save_safetensor": True},
        {"repo_id": "me/it"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_cannot_be_honoured_is_refused_by_name(model, tmp_path: Path, options: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        model.save_pretrained(tmp_path / "it", **options)
    assert not (tmp_path / "it").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"trust_remote_code": True},
        {"quantization_config": object()},
        {"subfolder": "x"},
        {"revisoin": "main"},
        {"device_map": {"gpt.transformer": 0}},
        {"device_map": "somewhere"},
        {"dtype": "int8"},
        {"dtype": "auto"},
        {"torch_dtype": "bf16"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_loading_refuses_by_name(saved: Path, options: dict) -> None:
    name = next(iter(options))
    with pytest.raises(ValueError, match="dtype" if name == "torch_dtype" else name):
        load_pretrained(saved, vision=small_vit(), text=small_gpt2(), **options)


def test_a_state_gathered_elsewhere_is_what_is_saved(model, saved: Path, tmp_path: Path) -> None:
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state, is_main_process=True)
    assert (tmp_path / "model.safetensors").read_bytes() == weights(tmp_path) != weights(saved)
    loaded = load_pretrained(tmp_path, vision=small_vit(), text=small_gpt2())
    for name, parameter in loaded.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, state[name]), name
    name = next(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    state.pop(name)
    with pytest.raises(CheckpointError, match=name):
        model.save_pretrained(tmp_path, state_dict=state)


def test_another_process_writes_nothing(model, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "it", is_main_process=False)
    assert not (tmp_path / "it").exists()


def test_model_weights_are_copied_where_there_are_no_links(model, tmp_path: Path, monkeypatch) -> None:
    def refuse(*paths) -> None:
        raise OSError(95, "no links here")

    monkeypatch.setattr("os.link", refuse)
    model.save_pretrained(tmp_path, is_main_process=True)
    assert (tmp_path / "model.safetensors").read_bytes() == weights(tmp_path)


# ------------------------------------------------------------------------------------------------------ type and device


@pytest.mark.parametrize("make", [captioner, answerer], ids=["caption", "vqa"])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", torch.bfloat16, {"text": "bfloat16"}, {"vision": "float32", "text": torch.bfloat16}], ids=str
)
def test_half_precision_backbones(make, dtype, tmp_path: Path) -> None:
    whole = randomise(make(ROUTING)).eval()
    whole.save_pretrained(tmp_path)
    text = small_gpt2 if make is captioner else small_roberta
    model = load_pretrained(tmp_path, vision=small_vit(), text=text(), dtype=dtype)
    assert model.dtype == torch.bfloat16
    assert model.vit.dtype == (torch.float32 if isinstance(dtype, dict) else torch.bfloat16)
    want, found = logits(whole), logits(model)
    assert (want - found.float()).norm() < 0.1 * want.norm()
    labels = batch()["input_ids"] if make is captioner else torch.rand(3, 7)
    model.train()(**batch(), labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)
    if make is captioner:
        assert model.eval().generate(batch()["pixel_values"], num_beams=2, max_new_tokens=4).shape[0] == 3


def bottlenecks(model) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in name]


def test_bottlenecks_of_half_precision_backbones_are_float32(saved: Path) -> None:
    loaded = load_pretrained(saved, vision=small_vit(), text=small_gpt2(), dtype="bfloat16")
    assert {parameter.dtype for parameter in bottlenecks(loaded)} == {torch.float32}
    kept = load_pretrained(saved, vision=small_vit(), text=small_gpt2())
    assert all(torch.equal(p, q) for p, q in zip(bottlenecks(loaded), bottlenecks(kept), strict=True))


@pytest.mark.parametrize("make", [captioner, answerer], ids=["caption", "vqa"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_trains_moves_in_half_precision(make, dtype: str, tmp_path: Path) -> None:
    """The steps of lr 1e-4 are lost on most entries that are of a half type themselves."""
    model = randomise(make(RoutingConfig(rank=4, routing="mul", train_bias=True), vit_width=16, dtype=dtype)).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {"visual_projection.weight", "visual_projection.bias"} <= trained.keys()
    assert make is captioner or {"classifier.0.weight", "classifier.1.weight", "classifier.3.bias"} <= trained.keys()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0)
    labels = batch()["input_ids"] if make is captioner else torch.rand(3, 7)
    before = {name: p.detach().clone() for name, p in trained.items()}
    for _ in range(20):
        optimizer.zero_grad()
        model(**batch(), labels=labels).loss.backward()
        optimizer.step()
    for part in ("visual_projection", "classifier"):
        moved = [(p - before[name]).abs() > 1e-4 for name, p in trained.items() if name.startswith(part)]
        assert not moved or torch.cat([m.flatten() for m in moved]).float().mean() > 0.95, part
    model.save_pretrained(tmp_path)
    text = small_gpt2 if make is captioner else small_roberta
    loaded = load_pretrained(tmp_path, vision=small_vit(16), text=text(), dtype=dtype)
    again = dict(loaded.named_parameters())
    assert all(torch.equal(again[name], p) for name, p in trained.items())
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_what_trains_is_of_the_model_s_type_where_the_config_says_so() -> None:
    model = answerer(RoutingConfig(rank=4, routing="mul", bottleneck_dtype="model"), vit_width=16, dtype="bfloat16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"vision": "cpu", "text": "cpu"}, {"text": "cpu"}], ids=str)
def test_device_map(model, saved: Path, device_map) -> None:
    loaded = load_pretrained(saved, vision=small_vit(), text=small_gpt2(), device_map=device_map)
    torch.testing.assert_close(logits(loaded).cpu(), logits(model))
    built = ViTGPT2ForCaptioning.from_backbones(small_vit(), small_gpt2(), ROUTING, device_map=device_map)
    assert json.dumps(built.config.to_dict(), default=str)


def test_a_language_model_that_accelerate_placed(model, saved: Path, tmp_path: Path) -> None:
    small_gpt2().save_pretrained(tmp_path)
    text = type(model.gpt).from_pretrained(tmp_path, device_map={"": "cpu"})
    loaded = load_pretrained(saved, vision=small_vit(), text=text)
    torch.testing.assert_close(logits(loaded), logits(model))
    images = batch()["pixel_values"]
    assert torch.equal(loaded.generate(images, num_beams=2), model.generate(images, num_beams=2))
