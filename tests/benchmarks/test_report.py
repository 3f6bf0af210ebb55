"""The report of rows: ratios, what was slower, what missed the gate, and files that are no results."""

import json
from pathlib import Path

import pytest

from routingvl.benchmarks import report


def row(provider: str, mode: str, ms: float, **changes) -> dict:
    fixed = {"case": "c", "routing": "mul", "dtype": "float32", "gate": "passed", "saved_mib": 1.0, "dirty": False}
    machine = {"device": "some CPU", "threads": 1, "torch": "2.6", "commit": "abc1234"}
    return {**fixed, **machine, "provider": provider, "mode": mode, "ms_p50": ms, **changes}


def test_report_ratios_and_overhead() -> None:
    times = {"base": (10, 10), "reference": (15, 25), "eager": (12, 18)}
    rows = []
    for provider, (forward, backward) in times.items():
        modes = {"fwd": forward, "bwd": backward, "fwdbwd": forward + backward}
        rows += [row(provider, mode, ms) for mode, ms in modes.items()]
    printed = report.summarise(rows)
    # 40 / 30, and above the base of 20: 20 / 10.
    assert "| c | mul | float32 | 40.00 | 30.00 | 1.25x | 1.39x | 1.33x | 2.00x | 1.00, 1.00 | - | - | - |" in printed
    assert "Measured on some CPU, 1 thread(s), cpu time, torch 2.6, commit abc1234." in printed
    launched = [{**one, "host_ms_p50": one["ms_p50"] / 8} for one in rows]
    assert "| 2.00x | 1.00, 1.00 | - | - | 5.00, 3.75 |" in report.summarise(launched)
    # A later measurement replaces an earlier one, and a shut gate withdraws it.
    later = report.summarise([*rows, row("eager", "fwdbwd", 80.0, dirty=True)])
    assert "| 0.50x | 0.33x |" in later
    assert "- c mul float32, fwd+bwd: 0.50x" in later
    assert "Slower than the published chain" not in printed
    assert "commit abc1234 (changed since)" in later
    withdrawn = report.summarise([*rows, {**row("eager", "", 0.0), "gate": "failed", "gate_missed": ["y bad"]}])
    assert "| c | mul |" not in withdrawn
    assert "GATE FAILED" in withdrawn


def test_report_reads_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [row(provider, mode, 2.0) for provider in ("reference", "eager") for mode in ("fwd", "bwd", "fwdbwd")]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert report.main([str(file)]) == 0
    assert "| c | mul | float32 | 2.00 | 2.00 | 1.00x | 1.00x | 1.00x | - |" in capsys.readouterr().out


def test_one_failed_provider_leaves_the_others() -> None:
    rows = [row(name, mode, 2.0) for name in ("reference", "eager", "peft") for mode in ("fwd", "bwd", "fwdbwd")]
    printed = report.summarise([*rows, {**row("peft", "", 0.0), "gate": "failed", "gate_missed": ["y bad"]}])
    assert "| c | mul | float32 |" in printed
    assert "(peft)" not in printed.split("GATE FAILED")[0]


def test_report_names_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{}\n")
    with pytest.raises(SystemExit):
        report.main([str(file)])
    assert "line 1: not a row of this benchmark" in capsys.readouterr().err


def test_report_of_models_beside_layers() -> None:
    machine = {"device": "some CPU", "threads": 1, "torch": "2.6", "commit": "abc1234", "dirty": False}
    fixed = {"routing": "add", "dtype": "float32", "gate": "passed", "saved_mib": 1.0, "peak_mib": None, **machine}
    model = {**fixed, "case": "m", "task": "vqa", "level": "step", "B": 4}
    rows = []
    for provider, times in {"reference": (15.0, 25.0), "eager": (12.0, 30.0)}.items():
        for mode, ms in zip(("fwd", "bwd", "fwdbwd"), (*times, sum(times)), strict=True):
            measured = {"provider": provider, "mode": mode, "ms_p50": ms}
            rows += [{**model, **measured, "examples_s": 4e3 / ms}, {**fixed, **measured, "case": "layer"}]
    rows.append({**model, "provider": "base", "mode": "vit", "ms_p50": 3.0})
    printed = report.summarise(rows)
    assert "| layer | add | float32 | 40.00 | 42.00 | 1.25x | 0.83x | 0.95x | - | 1.00, 1.00 | - | - |" in printed
    assert (
        "| m | add | eager | float32 | 40.0 | 42.0 | 1.25x | 0.83x | 0.95x | 100.00 | 95.24 | 1.0, 1.0 | - |" in printed
    )
    assert "- m add float32, bwd: 0.83x" in printed
    assert "- m add float32, fwd+bwd: 0.95x" in printed
