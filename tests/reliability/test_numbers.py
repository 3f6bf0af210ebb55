"""Numbers that are none, or out of range, are named; weights that are no longer numbers are never saved."""

import json
import math
from pathlib import Path

import pytest
import torch
from children import command, config_file
from safetensors.torch import load_file
from tiny import answerer, batch, captioner

MODELS = {"vqa": answerer, "caption": captioner}
both = pytest.mark.parametrize("task", MODELS)


def inputs(task: str) -> dict[str, torch.Tensor]:
    given = batch()
    given["labels"] = torch.zeros(3, 7) if task == "vqa" else given["input_ids"].clone()
    return given


@both
@pytest.mark.parametrize("what", ["NaN pixels", "NaN features", "an empty batch", "a negative token", "a token beyond"])
def test_inputs_of_models(what: str, task: str) -> None:
    model, given = MODELS[task]().train(), inputs(task)
    if what == "NaN pixels":
        given["pixel_values"][0, 0, 0, 0] = float("nan")
    elif what == "NaN features":
        given["vision_features"] = torch.full((3, 1, 32), float("nan"))
        del given["pixel_values"]
    elif what == "an empty batch":
        given = {name: value[:0] for name, value in given.items()}
    else:
        given["input_ids"][1, 1] = -1 if what == "a negative token" else 10**6
    with pytest.raises(ValueError, match=r"pixel_values|vision_features|empty|batch|input_ids|token"):
        model(**given)


def test_labels_beyond_the_vocabulary() -> None:
    given = inputs("caption")
    given["labels"][0, 0] = 1_000_028
    with pytest.raises(ValueError, match="label"):
        captioner()(**given)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_labels_outside_zero_to_one(value: float) -> None:
    given = inputs("vqa")
    given["labels"][0, 0] = value
    with pytest.raises(ValueError, match="label"):
        answerer()(**given)


def test_more_new_tokens_than_positions() -> None:
    model = captioner().eval()
    with pytest.raises(ValueError, match=r"max_new_tokens|positions"):
        model.generate(pixel_values=batch()["pixel_values"], max_new_tokens=200)


@pytest.mark.parametrize("settings", [{"lr": 1e38, "max_steps": 1}, {"lr": 1e38, "log_every": 1, "eval_every": 1},
                                      {"lr": 1e38, "save_every": 1, "log_every": 100}], ids=str)  # fmt: skip
def test_weights_that_are_no_numbers_are_never_saved(settings: dict, tiny: Path, tmp_path: Path) -> None:
    """The run ends with the step named, and what is in its folder is finite."""
    run = tmp_path / "place" / "run"
    outcome = command("train", "--config", config_file(tiny, run, **settings))
    for path in run.glob("*/*.safetensors"):
        for name, tensor in load_file(path).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), (path, name)
    outcome.assert_refused("step", status=1)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert all(math.isfinite(value) for value in json.loads(line).values() if isinstance(value, float))
