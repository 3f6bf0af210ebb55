"""The code of docs/howto-trainer.md runs, one block after the other, on tiny models."""

import re
from pathlib import Path

import torch
from tiny import batch, small_gpt2, small_vit

PAGE = Path(__file__).resolve().parents[2] / "docs" / "howto-trainer.md"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs = batch(rows=6)
    rows = [{**{key: tensor[i] for key, tensor in inputs.items()}, "labels": inputs["input_ids"][i]} for i in range(6)]
    names = {"vision": small_vit(), "text": small_gpt2(), "vision_again": small_vit(), "text_again": small_gpt2()}
    names |= {"train_data": rows, "folder": str(tmp_path / "run")}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["captions"].shape[0] == 6
    trained = dict(names["trainer"].model.named_parameters())
    for name, parameter in names["model"].named_parameters():
        torch.testing.assert_close(parameter, trained[name])
