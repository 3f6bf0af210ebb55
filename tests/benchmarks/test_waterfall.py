"""The waterfall of the training step: every rung with its memory, gated, and its table."""

import itertools
import json
from pathlib import Path

import pytest

from routingvl.benchmarks import waterfall

COMMON = ["published", "features kept", "padded to the longest", "our layers"]


def test_rungs_of_tiny_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.jsonl"
    assert waterfall.main(["--quick", "--batch", "8", "--rounds", "2", "--threads", "1", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names = {task: [row["technique"] for row in rows if row["case"] == f"waterfall_{task}"] for task in waterfall.TASKS}
    assert names["vqa"] == [*COMMON, "bfloat16", "activation checkpointing"]
    assert names["caption"] == [*COMMON, "loss at targets only", "bfloat16", "activation checkpointing"]
    mib = {(row["case"], row["technique"]): row["step_mib"] for row in rows}
    for case in ("waterfall_vqa", "waterfall_caption"):
        falling = COMMON[:3]  # tiny models have no more to show
        assert all(mib[case, now] <= mib[case, before] for before, now in itertools.pairwise(falling)), mib
    printed = capsys.readouterr().out
    assert printed.count("| published |") == 2
    assert waterfall.main(["--read", str(output)]) == 0
    assert capsys.readouterr().out == printed


def test_a_gate_that_is_missed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(waterfall, "rungs", lambda *_: ({}, {"float32": 1.0, "bfloat16": 0.0}))
    assert waterfall.main(["--quick", "--task", "vqa"]) == 1
    assert "GATE FAILED: float32 1.00e+00" in capsys.readouterr().out


def test_flags_that_cannot_be_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        waterfall.main(["--rounds", "-1"])
    assert "--rounds -1 must be at least 0" in capsys.readouterr().err
