"""The level "launch": host time with launches that do nothing, in a process of its own."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from routingvl.benchmarks import launch_level, main

pytest.importorskip("triton")
COMMAND = ["--levels", "launch", "--case", "launch_linear_mul", "--repeats", "2", "--dropout", "0"]


@pytest.fixture(autouse=True)
def _in_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_level, "NEEDED", ())


def rows_of(tmp_path: Path, status: int = 0) -> list[dict]:
    output = tmp_path / "rows.jsonl"
    assert main([*COMMAND, "--output", str(output)]) == status
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_rows_of_what_the_process_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def run(command: list[str], **options) -> SimpleNamespace:
        assert command[-5:] == ["--json", "--case", "linear/mul", "--repeats", "4"]
        assert "TRITON_INTERPRET" not in options["env"]
        lines = [
            json.dumps({"case": "linear/mul", "provider": name, "mode": "fwdbwd", "us": [us, us]})
            for name, us in (("reference", 400.0), ("eager", 500.0), ("triton", 320.0))
        ]
        return SimpleNamespace(returncode=0, stdout="\n".join(["a warning", *lines]), stderr="")

    monkeypatch.setattr(launch_level, "subprocess", SimpleNamespace(run=run))
    rows = rows_of(tmp_path)
    assert {(row["provider"], row["ms_p50"], row["level"]) for row in rows} == {
        ("reference", 0.4, "launch"),
        ("eager", 0.5, "launch"),
        ("triton", 0.32, "launch"),
    }
    assert "| launch_linear_mul | mul (triton) | float32 | 0.40 | 0.32 |" in capsys.readouterr().out


def test_a_process_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nKeyError: 'x'")
    process = SimpleNamespace(run=lambda *args, **options: failed)
    monkeypatch.setattr(launch_level, "subprocess", process)
    rows = rows_of(tmp_path, status=1)
    assert [row["gate"] for row in rows] == ["failed"]
    assert rows[0]["gate_missed"][0].endswith("failed with status 1: KeyError: 'x'")


def test_without_a_checkout_the_reason_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_level, "NEEDED", (launch_level.ROOT / "nowhere",))
    rows = rows_of(tmp_path)
    assert [row["gate"] for row in rows] == ["skipped"]
    assert "need nowhere of a checkout" in rows[0]["skipped"]
