"""The machine's limits, and the least time of a case that follows from them."""

import json
from pathlib import Path

import pytest
import torch

from routingvl.benchmarks import ceilings
from routingvl.benchmarks.timing import Timer


def test_a_low_rate_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a tiny product can take long, and limits are computed by division."""
    monkeypatch.setattr(Timer, "__call__", lambda self, call: (2.0, call()))
    rows = ceilings.measure_ceilings(Timer(torch.device("cpu"), 1), ["float32"], (2**16, 32, 32, 32))
    limits = ceilings.Limits(rows)
    assert limits.seconds(2 * 32**3, 1, "float32")[0] == pytest.approx(2.0, rel=1e-4)
    assert limits.seconds(1, 2 * 2**16, "float32") == (pytest.approx(2.0, rel=1e-4), "copy")


def test_ceilings_and_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ceilings.SIZES, "cpu", (2**16, 32, 32, 32))
    output = tmp_path / "ceilings.jsonl"
    assert ceilings.main(["--device", "cpu", "--dtype", "float32", "--output", str(output)]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["ceiling"], row["tflop_s"] is None) for row in rows] == [
        *(("copy", True), ("matmul", False), ("addmm", False)),
    ]
    assert all(row["gb_s"] > 0 and row["device"] for row in rows)
    assert "GB/s" in capsys.readouterr().out
    limits = ceilings.Limits([{**rows[0], "gb_s": 2.0}, {**rows[1], "tflop_s": 0.5}])
    assert limits.seconds(10**12, 10**9, "float32") == (2.0, "matmul")
    assert limits.seconds(10**12, 10**10, "float32") == (5.0, "copy")
