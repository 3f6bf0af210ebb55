"""The regression gate: noise, drift of the machine, memory, lost providers, and files that cannot be compared."""

import json
from pathlib import Path

import pytest

from routingvl.benchmarks import compare

MACHINE = {"device": "some GPU", "threads": 1, "torch": "2.11", "triton": "3.6", "transformers": "5", "commit": "a1"}


def row(provider: str, ms: float, noise: float = 0.01, **changes) -> dict:
    fixed = {"case": "c", "routing": "mul", "dtype": "float32", "gate": "passed", "saved_mib": 2.0, "dirty": False}
    times = {"ms_p20": ms * (1 - noise), "ms_p50": ms, "ms_p80": ms * (1 + noise)}
    return {**fixed, **MACHINE, "provider": provider, "mode": "fwdbwd", **times, **changes}


def run(tmp_path: Path, base: list[dict], head: list[dict], *flags: str) -> int:
    files = []
    for name, rows in (("base", base), ("head", head)):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return compare.main([*map(str, files), *flags])


BASE = [row("reference", 2.0), row("compile", 1.0), row("triton", 1.0)]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (BASE, 0),
        ([row("reference", 2.0), row("triton", 1.08)], 0),  # 5 % and four times 1 % of noise
        ([row("reference", 2.0), row("triton", 1.10)], 1),
        ([row("reference", 2.0), row("triton", 1.10, noise=0.05)], 0),
        ([row("reference", 3.0), row("triton", 1.5)], 0),  # the machine has become slower
        ([row("reference", 1.6), row("triton", 1.0)], 1),  # faster, but ours has not
        ([row("triton", 1.06)], 0),  # without the published chain by itself
        ([row("triton", 1.10)], 1),
        ([row("reference", 2.0), row("compile", 9.0), row("triton", 1.0)], 0),  # a competitor's business
        ([row("reference", 2.0), row("triton", 1.0, saved_mib=2.2)], 1),
        ([row("reference", 2.0), row("triton", 0.5, saved_mib=2.05)], 0),
    ],
)
def test_what_is_worse(tmp_path: Path, head: list[dict], status: int) -> None:
    assert run(tmp_path, BASE, head) == status


def test_the_table_names_what_is_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, BASE, [row("reference", 2.0), row("triton", 1.5, torch="2.12")]) == 1
    printed = capsys.readouterr().out
    assert "| c mul float32 | triton | fwdbwd | 1 | 1.5 | 1.500 | 1.090 | WORSE |" in printed
    assert "note: torch 2.11 against" in printed
    assert "2 numbers compared, 1 worse, 0 lost" in printed
    assert "saved" not in printed
    assert run(tmp_path, BASE, BASE, "--all") == 0
    assert "| c mul float32 | triton | saved | 2 | 2 | 1.000 | 1.050 | ok |" in capsys.readouterr().out


def test_a_provider_that_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {**row("triton", 1.0), "gate": "failed", "gate_missed": ["y is wrong"]}
    assert run(tmp_path, BASE, [row("reference", 2.0), failed]) == 1
    assert "LOST: c mul float32 | triton |  y is wrong" in capsys.readouterr().out
    assert run(tmp_path, BASE, [row("reference", 2.0), row("eager", 1.0)]) == 1
    assert "no longer measured" in capsys.readouterr().out
    other = row("triton", 1.0, case="other")
    assert run(tmp_path, [*BASE, other], BASE) == 0  # a case that was not measured again


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ([row("triton", 1.0, device="other GPU")], "the runs have device some GPU and other GPU"),
        ([row("triton", 1.0, threads=2)], "the runs have threads 1 and 2"),
        ([row("triton", 1.0, case="other")], "no measurement of ours in common"),
        ([{"case": "c", "routing": "mul", "gate": "passed"}], "give files of routingvl benchmark or"),
        ([{"case": "c"}], "line 1: not a row of this benchmark"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], head: list[dict], message: str
) -> None:
    assert run(tmp_path, BASE, head) == 2
    assert message in capsys.readouterr().err


def test_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path / "none"), str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_rows_of_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def side(name: str, us: float) -> dict:
        fixed = {"target": "T1", "case": "c", "routing": "mul", "dtype": "bfloat16", "dropout": 0.0, "gate": "passed"}
        return {**fixed, **MACHINE, "dirty": False, "side": name, "us": {"kernels_fwd": [us, us, us]}}

    base = [side("reference", 20.0), side("triton", 10.0)]
    assert run(tmp_path, base, base) == 0
    assert run(tmp_path, base, [side("reference", 20.0), side("triton", 11.0)]) == 1
    assert "| c mul bfloat16 (kernels time) | triton | fwd | 0.01 | 0.011 | 1.100 |" in capsys.readouterr().out


def test_the_committed_rows_compare_with_themselves() -> None:
    results = Path(compare.__file__).with_name("results")
    for name in ("cpu_layers.jsonl", "gpu/targets.jsonl"):
        file = results / name
        assert compare.main([str(file), str(file)]) == 0
