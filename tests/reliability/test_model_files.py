"""Backbones, checkpoints and adapters that are damaged, of another model, or hostile: refused before they are used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import Outcome, command, config_file, files_below
from safetensors.torch import load_file, save_file
from tiny import answerer, batch, captioner, randomise

from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.bottlenecks.peft_format import export_peft, import_peft
from routingvl.bottlenecks.published import load_reference_state_dict
from routingvl.config import RoutingConfig

Tensors = dict[str, torch.Tensor]


def edit_tensors(path: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    content = edit(content) or content
    path.write_text(json.dumps(content))


def a_matrix(tensors: Tensors) -> str:
    return sorted(name for name, tensor in tensors.items() if tensor.ndim == 2 and "pooler" not in name)[0]


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: change(tensor) for name, tensor in tensors.items()})


def one(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({a_matrix(tensors): change(tensors[a_matrix(tensors)])})


WEIGHTS: dict[str, Callable[[Tensors], object]] = {
    "one missing": lambda tensors: tensors.pop(a_matrix(tensors)),
    "half missing": lambda tensors: [tensors.pop(name) for name in sorted(tensors)[::2]],
    "all renamed": lambda tensors: [tensors.update({f"other.{name}": tensors.pop(name)}) for name in sorted(tensors)],
    "one of another shape": one(lambda tensor: tensor[:-1]),
    "integers": every(lambda tensor: tensor.to(torch.int32)),
    "booleans": every(lambda tensor: tensor > 0),
    "one NaN": one(lambda tensor: tensor.index_fill(0, torch.tensor([0]), float("nan"))),
    "inf": one(lambda tensor: tensor + float("inf")),
}
BYTES: dict[str, Callable[[Path], object]] = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "header cut short": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "empty": lambda path: path.write_bytes(b""),
    "header of 10 GB": lambda path: path.write_bytes((10**10).to_bytes(8, "little") + b"{}"),
    "no header": lambda path: path.write_bytes(b"\x80\x02" * 64),
}


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """The tiny inputs, to be changed."""
    return shutil.copytree(tiny, tmp_path / "inputs")


def refused(inputs: Path, task: str, *words: str) -> Outcome:
    run = inputs.parent / "place" / "run"
    outcome = command("train", "--config", config_file(inputs, run, task)).assert_refused(*words)
    assert not run.exists()
    return outcome


@pytest.mark.parametrize("what", [*WEIGHTS, *BYTES])
@pytest.mark.parametrize(("backbone", "task"), [("vit", "vqa"), ("roberta", "vqa"), ("gpt2", "caption")])
def test_weights_of_backbones(backbone: str, task: str, what: str, own: Path) -> None:
    path = own / backbone / "model.safetensors"
    if what in WEIGHTS:
        edit_tensors(path, WEIGHTS[what])
    else:
        BYTES[what](path)
    refused(own, task)


CONFIGS: dict[str, Callable[[Path], object]] = {
    "a list": lambda path: path.write_text("[]"),
    "nested": lambda path: path.write_text("[" * 100_000),
    "cut short": lambda path: path.write_text(path.read_text()[:40]),
    "binary": lambda path: path.write_bytes(b"\xff\xfe"),
    "more layers than weights": lambda path: edit_json(
        path, lambda c: c.update({"num_hidden_layers" if "num_hidden_layers" in c else "n_layer": 4})
    ),
}


@pytest.mark.parametrize("what", CONFIGS)
@pytest.mark.parametrize(("backbone", "task"), [("vit", "vqa"), ("roberta", "vqa"), ("gpt2", "caption")])
def test_configs_of_backbones(backbone: str, task: str, what: str, own: Path) -> None:
    CONFIGS[what](own / backbone / "config.json")
    refused(own, task)


@pytest.mark.parametrize(
    "text", ["[]", "{", "[" * 100_000, '{"size": 1000000000}', '{"image_std": [0, 1, 1]}'], ids=str
)
def test_preprocessing_of_backbones(text: str, own: Path) -> None:
    (own / "vit" / "preprocessor_config.json").write_text(text)
    refused(own, "vqa", "preprocessor_config.json")


def test_pickled_weights_are_not_read(own: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (own / "vit" / "model.safetensors").unlink()
    torch.save({"code": Code()}, own / "vit" / "pytorch_model.bin")
    refused(own, "vqa")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("folder", "file"), [("roberta", "tokenizer_config.json"), ("roberta", "config.json"),
                                              ("vit", "config.json")])  # fmt: skip
def test_code_of_a_model_folder_is_never_run_or_asked_about(folder: str, file: str, own: Path, tmp_path: Path) -> None:
    canary = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    for name in ("code.py", "modeling_own.py"):
        (own / folder / name).write_text(canary + "class Own: pass\n")
    classes = ("AutoTokenizer", "AutoConfig", "AutoModel")
    edit_json(own / folder / file, lambda content: content.update(auto_map=dict.fromkeys(classes, "code.Own")))
    run = tmp_path / "place" / "run"
    outcome = command("train", "--config", config_file(own, run, max_steps=1), stdin="y\ny\ny\n", seconds=30)
    if outcome.status != 0:
        outcome.assert_refused()
    assert not (tmp_path / "ran").exists()
    assert "[y/N]" not in outcome.out + outcome.err


def test_a_masked_language_model_without_a_pooler(own: Path, tmp_path: Path) -> None:
    """The pooler is made, trained and saved: such a run is evaluated and exported like any other."""
    edit_tensors(
        own / "roberta" / "model.safetensors",
        lambda tensors: [tensors.pop(name) for name in sorted(tensors) if name.startswith("pooler.")],
    )
    run = tmp_path / "place" / "run"
    command("train", "--config", config_file(own, run)).assert_fine()
    assert any("pooler" in name for name in load_file(run / "last" / "adapter_model.safetensors"))
    command("evaluate", run, "--quiet").assert_fine()
    command("export", run, tmp_path / "exported").assert_fine()


# -------------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    command("train", "--config", config_file(tiny, run, max_steps=2)).assert_fine()
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def evaluation_refused(run: Path, *words: str) -> None:
    before = files_below(run)
    command("evaluate", run, "--checkpoint", "last", "--quiet", seconds=30).assert_refused(*words)
    assert files_below(run) == before


@pytest.mark.parametrize("what", [*(name for name in WEIGHTS if name != "half missing"), *BYTES])
def test_weights_of_adapters(what: str, run: Path) -> None:
    path = run / "last" / "adapter_model.safetensors"
    if what in WEIGHTS:
        edit_tensors(path, WEIGHTS[what])
    else:
        BYTES[what](path)
    evaluation_refused(run)


def section(name: str, **values: object) -> Callable[[Path], object]:
    return lambda path: edit_json(path, lambda content: content[name].update(values))


ADAPTER_CONFIGS: dict[str, Callable[[Path], object]] = {
    **{name: CONFIGS[name] for name in ("a list", "nested", "cut short", "binary")},
    "empty object": lambda path: path.write_text("{}"),
    "model_class a method": lambda path: edit_json(path, lambda c: c.update(model_class="load_pretrained")),
    "model_class of another task": lambda path: edit_json(path, lambda c: c.update(model_class="ViTGPT2ForCaptioning")),
    "rank 10^9": section("routing", rank=10**9),
    "rank a word": section("routing", rank="four"),
    "targets numbers": section("routing", targets=[5]),
    "alpha NaN": section("routing", alpha=float("nan")),
    "train_bias a word": section("routing", train_bias="no"),
    "num_labels 10^9": section("model", num_labels=10**9),
    "num_labels another": section("model", num_labels=3),
    "an argument of another function": section("model", backend="triton"),
    "a section that is a list": lambda path: edit_json(path, lambda c: c.update(model=[])),
    "backbones a list": lambda path: edit_json(path, lambda c: c.update(backbones=[])),
    "no vision": lambda path: edit_json(path, lambda c: c["backbones"].pop("vision") and None),
    "vision null": lambda path: edit_json(path, lambda c: c["backbones"].update(vision=None)),
}


@pytest.mark.parametrize("what", ADAPTER_CONFIGS)
def test_configs_of_adapters(what: str, run: Path) -> None:
    ADAPTER_CONFIGS[what](run / "last" / "adapter_config.json")
    evaluation_refused(run)


RUN_FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "answers shorter": ("label2ans.json", lambda path: edit_json(path, lambda content: content[:-1])),
    "answers longer": ("label2ans.json", lambda path: edit_json(path, lambda content: [*content, "purple"])),
    "answers gone": ("label2ans.json", Path.unlink),
    "preprocessing gone": ("preprocessor_config.json", Path.unlink),
    "preprocessing cut short": ("preprocessor_config.json", lambda path: path.write_text("{")),
    "preprocessing of 10^6 pixels": ("preprocessor_config.json", lambda path: edit_json(
        path, lambda content: content.update(size={"height": 10**6, "width": 10**6}))),
    "resampling 99": ("preprocessor_config.json", lambda path: edit_json(
        path, lambda content: content.update(resample=99))),
    "rescaling inf": ("preprocessor_config.json", lambda path: edit_json(
        path, lambda content: content.update(rescale_factor=float("inf")))),
    "tokenizer cut short": ("tokenizer/tokenizer.json", lambda path: path.write_text(path.read_text()[:99])),
    "config gone": ("config.yaml", Path.unlink),
}  # fmt: skip


@pytest.mark.parametrize("what", RUN_FILES)
def test_files_of_a_run(what: str, run: Path) -> None:
    name, damage = RUN_FILES[what]
    damage(run / name)
    evaluation_refused(run)


def test_a_moved_run_is_told_its_backbones(tiny: Path, finished: Path, tmp_path: Path) -> None:
    """Equal content is accepted from elsewhere, other content is not."""
    moved, run = tmp_path / "moved", shutil.copytree(finished, tmp_path / "run")
    for name in ("vit", "roberta", "data"):
        shutil.copytree(tiny / name, moved / name)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny), str(tmp_path / "gone")))
    for name in ("last", "best"):
        path = run / name / "adapter_config.json"
        path.write_text(path.read_text().replace(str(tiny), str(tmp_path / "gone")))
    places = ("--model.vision", moved / "vit", "--model.text", moved / "roberta")
    data = ("--data.annotations", moved / "data", "--data.images", moved / "data")
    line = ("evaluate", run, "--quiet", *places, *data, "--output", tmp_path / "out")
    command("evaluate", run, "--quiet").assert_refused()
    command(*line).assert_fine()
    edit_tensors(moved / "roberta" / "model.safetensors", one(lambda tensor: tensor + 1))
    command(*line).assert_refused("text backbone")


# ----------------------------------------------------------------------------------------------- PEFT, published code


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = randomise(captioner(RoutingConfig(rank=4, alpha=8, routing="none")))
    export_peft(model.gpt if hasattr(model, "gpt") else model, tmp_path / "peft")
    return tmp_path / "peft"


def plain_model() -> torch.nn.Module:
    model = captioner(RoutingConfig(rank=4, alpha=8, routing="none"))
    return model.gpt if hasattr(model, "gpt") else model


PEFT: dict[str, Callable[[Path], object]] = {
    "config cut short": lambda f: (f / "adapter_config.json").write_text('{"r": 4'),
    "config a list": lambda f: (f / "adapter_config.json").write_text("[]"),
    "no r": lambda f: edit_json(f / "adapter_config.json", lambda c: c.pop("r") and None),
    **{
        f"{key} {value}": lambda f, key=key, value=value: edit_json(
            f / "adapter_config.json", lambda c: c.update({key: value})
        )
        for key, value in [
            ("r", None), ("r", -4), ("r", 0), ("r", 10**9), ("lora_alpha", float("nan")), ("use_dora", True),
            ("bias", "all"),
        ]
    },
    "weights cut short": lambda f: BYTES["cut short"](f / "adapter_model.safetensors"),
    "weights empty": lambda f: BYTES["empty"](f / "adapter_model.safetensors"),
    "integers": lambda f: edit_tensors(f / "adapter_model.safetensors", every(lambda tensor: tensor.long())),
    "NaN": lambda f: edit_tensors(f / "adapter_model.safetensors", one(lambda tensor: tensor * float("nan"))),
    "one missing": lambda f: edit_tensors(f / "adapter_model.safetensors", lambda t: t.pop(sorted(t)[0])),
    "one more": lambda f: edit_tensors(f / "adapter_model.safetensors", lambda t: t.update(more=torch.zeros(2))),
}  # fmt: skip


@pytest.mark.parametrize("what", PEFT)
def test_peft_adapters_are_honoured_or_refused(what: str, adapter: Path) -> None:
    """And a refusal leaves the model as it was."""
    PEFT[what](adapter)
    model = plain_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        import_peft(model, adapter)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_is_exported_to_peft_is_imported_whole(tmp_path: Path) -> None:
    model = randomise(captioner(RoutingConfig(rank=4, alpha=8, routing="none"))).eval()
    export_peft(model, tmp_path / "peft")
    other = captioner(RoutingConfig(rank=4, alpha=8, routing="none")).eval()
    import_peft(other, tmp_path / "peft")
    inputs = batch()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize("what", ["None", "a value None", "a number", "numpy", "sparse", "NaN", "inf", "empty"])
def test_published_weights_are_refused_before_the_model_changes(what: str) -> None:
    model = answerer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor.clone() for name, tensor in before.items()}
    key = next(name for name, tensor in state.items() if tensor.ndim == 2 and "lora" in name.lower())
    wrong = {
        "a value None": None, "a number": 3, "numpy": state[key].numpy(), "sparse": state[key].to_sparse(),
        "NaN": state[key] * float("nan"), "inf": state[key] + float("inf"),
    }  # fmt: skip
    given = {"None": None, "empty": {}}.get(what, {**state, key: wrong.get(what)})
    with pytest.raises(CheckpointError):
        load_reference_state_dict(model, given)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
