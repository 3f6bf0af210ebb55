"""What a run began with is what it is resumed with: changed data, settings, models and files are named and refused."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import at_step, command, config_file, files_below
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import assert_same_weights, weights

SETTINGS = {"max_steps": 6, "eval_every": 2, "save_every": 1}


@pytest.fixture(scope="module")
def begun(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs and a run that was stopped at step 2, all in one folder that can be copied."""
    folder = tmp_path_factory.mktemp("begun") / "all"
    shutil.copytree(tiny, folder)
    stopping = at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = command("train", "--config", config_file(folder, folder / "run", **SETTINGS), before=stopping)
    stopped.assert_refused("interrupted", status=130)
    return folder


@pytest.fixture
def inputs(begun: Path) -> Path:
    """The same, at the same place (a run names its paths), put back afterwards."""
    kept = begun.with_name("kept")
    shutil.copytree(begun, kept, dirs_exist_ok=True)
    yield begun
    shutil.rmtree(begun)
    shutil.move(kept, begun)


def edit_json(path: Path, change: Callable) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def edit_weights(path: Path, key: str) -> None:
    tensors = load_file(path)
    tensors[key] = tensors[key] + 1
    save_file(tensors, path, metadata={"format": "pt"})


def first_key(path: Path) -> str:
    return sorted(load_file(path))[0]


def swap_two_tokens(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


CHANGES = {
    "one answer": lambda f: edit_json(f / "data/karpathy_train.json", lambda c: c[0].update(label={"blue": 1.0})),
    "one question": lambda f: edit_json(f / "data/karpathy_train.json", lambda c: c[3].update(sent="is it?")),
    "fewer questions": lambda f: edit_json(f / "data/karpathy_train.json", lambda c: c[:-1]),
    "validation data": lambda f: edit_json(f / "data/karpathy_val.json", lambda c: c[:-1]),
    "the order of answers": lambda f: edit_json(f / "data/trainval_label2ans.json", lambda c: c[::-1]),
    "an image": lambda f: Image.new("RGB", (24, 20), "black").save(next((f / "data/val2014").glob("*101.jpg"))),
    "the preprocessing": lambda f: edit_json(
        f / "vit/preprocessor_config.json", lambda c: c.update(image_mean=[0.1, 0.2, 0.3])
    ),
    "the tokenizer": lambda f: edit_json(f / "roberta/tokenizer.json", swap_two_tokens),
    "the vision tower": lambda f: edit_weights(f / "vit/model.safetensors", "embeddings.cls_token"),
    "the language model": lambda f: edit_weights(
        f / "roberta/model.safetensors", first_key(f / "roberta/model.safetensors")
    ),
    "the run's config": lambda f: (f / "run/config.yaml").write_text(
        (f / "run/config.yaml").read_text().replace("rank: 4", "rank: 8").replace("lr: 0.01", "lr: 0.02")
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_decides_the_result_may_not_change(what: str, inputs: Path) -> None:
    CHANGES[what](inputs)
    before = files_below(inputs / "run")
    command("train", "--resume", inputs / "run").assert_refused()
    changed = {name for name, data in files_below(inputs / "run").items() if before.get(name) != data}
    assert not changed - {"train.log", "metrics.jsonl"}, changed


@pytest.mark.parametrize("flags", [("--train.lr", "0.5"), ("--routing.rank", "8"), ("--train.seed", "7")], ids=str)
def test_other_settings_are_refused(flags: tuple[str, ...], inputs: Path) -> None:
    command("train", "--resume", inputs / "run", *flags).assert_refused(flags[0].lstrip("-"))


def test_other_places_with_equal_content_are_the_same_run(inputs: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference" / "run"
    command("train", "--config", config_file(inputs, reference, **SETTINGS)).assert_fine()
    moved = shutil.copytree(inputs / "data", tmp_path / "moved")
    places = ("--data.annotations", str(moved), "--data.images", str(moved), "--data.workers", "1")
    command("train", "--resume", inputs / "run", *places, "--train.log_every", "2").assert_fine()
    assert_same_weights(weights(inputs / "run"), weights(reference))


def test_a_resumed_run_equals_one_that_ran_through(inputs: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference" / "run"
    command("train", "--config", config_file(inputs, reference, **SETTINGS)).assert_fine()
    command("train", "--resume", inputs / "run").assert_fine()
    for name in ("last", "best"):
        assert_same_weights(weights(inputs / "run", name), weights(reference, name))


def test_the_files_of_a_run_itself_are_written_again(inputs: Path) -> None:
    """They follow from what was recorded, so an edited one is mended, or refused; it never renames the answers."""
    answers = (inputs / "run/label2ans.json").read_bytes()
    edit_json(inputs / "run/label2ans.json", lambda content: content[::-1])
    resumed = command("train", "--resume", inputs / "run")
    if resumed.status != 0:
        resumed.assert_refused("label2ans.json")
    else:
        assert "label2ans.json" in resumed.err
        assert (inputs / "run/label2ans.json").read_bytes() == answers


def change_state(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = run / "state" / "training_state.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def one_more_row(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = torch.cat([tensor, tensor[:1]])


STATES = {
    "truncated": lambda run: truncate(run / "state" / "training_state.safetensors", 200),
    "header of 10 GB": lambda run: (run / "state" / "training_state.safetensors").write_bytes(
        (10**10).to_bytes(8, "little") + b"{}"
    ),
    "empty": lambda run: (run / "state" / "training_state.safetensors").write_bytes(b""),
    "other shapes": lambda run: change_state(run, one_more_row),
    "without a tensor": lambda run: change_state(run, lambda tensors: tensors.pop(sorted(tensors)[0])),
    "a tensor too many": lambda run: change_state(run, lambda tensors: tensors.update(extra=torch.zeros(2))),
    "half precision": lambda run: change_state(
        run, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items() if t.dtype == torch.float32})
    ),
    "not finite": lambda run: change_state(
        run, lambda tensors: [t.fill_(float("nan")) for t in tensors.values() if t.is_floating_point()]
    ),
    "step 10^9": lambda run: edit_json(run / "state" / "training_state.json", lambda c: c.update(step=10**9)),
    "step -5": lambda run: edit_json(run / "state" / "training_state.json", lambda c: c.update(step=-5)),
    "step NaN": lambda run: edit_json(run / "state" / "training_state.json", lambda c: c.update(step=float("nan"))),
    "a list": lambda run: (run / "state" / "training_state.json").write_text("[]"),
    "nested": lambda run: (run / "state" / "training_state.json").write_text("[" * 100_000),
    "no numbers": lambda run: (run / "state" / "training_state.json").unlink(),
}


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("what", STATES)
def test_a_damaged_state_is_refused(what: str, inputs: Path) -> None:
    """By one sentence, not by a crash of the optimiser."""
    STATES[what](inputs / "run")
    command("train", "--resume", inputs / "run").assert_refused("state")


def test_a_state_that_could_hold_code_is_not_read(inputs: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    state = inputs / "run" / "state"
    for file in state.iterdir():
        file.unlink()
    torch.save({"step": 1, "code": Code()}, state / "training_state.pt")
    command("train", "--resume", inputs / "run").assert_refused()
    assert not (tmp_path / "ran").exists()
