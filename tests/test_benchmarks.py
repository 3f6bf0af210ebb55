"""The benchmark: its baseline computes the same thing, its gate shuts, its rows and ratios are right."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tolerances import assert_as_good_as

from routingvl.benchmarks import cases, gate, main, report, run
from routingvl.benchmarks.cases import CASES, Case, definition, make_tensors, providers

TINY = (
    Case("tiny_lora", "lora", B=2, T=3, L=1, K=8, N=8, R=4, quick=True),
    Case("tiny_merged", "merged_lora", B=2, T=3, L=1, K=8, N=12, R=4),
    Case("tiny_tokens", "lora", B=2, T=3, L=5, K=8, N=8, R=4, routings=("vllora",)),
    Case("tiny_adapter", "adapter", B=2, T=3, L=1, K=8, N=8, R=4, activation="gelu_new", quick=True),
)
EACH = [(case, routing) for case in TINY for routing in case.routings]
FIELDS = {
    *("case", "op", "provider", "routing", "mode", "dtype", "B", "T", "L", "K", "N", "R", "ms_p20", "ms_p50", "ms_p80"),
    *("peak_mib", "saved_mib", "bytes_moved", "gb_s", "flops", "tflop_s", "gate", "gate_worst_error", "device"),
    *("driver", "torch", "triton", "transformers", "commit", "dirty", "timestamp", "threads", "clock", "repeats"),
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CASES", TINY)


@pytest.mark.parametrize("provider", ["reference", "eager"])
@pytest.mark.parametrize(("case", "routing"), EACH, ids=lambda value: getattr(value, "name", value))
def test_every_provider_is_the_definition(case: Case, routing: str, provider: str) -> None:
    given = make_tensors(case, seed=3, dtype=torch.float64, device="cpu")
    assert_as_good_as(providers(case, routing)[provider], definition(case, routing), given)


def test_case_names_are_unique_and_the_published_sizes_are_there() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert any((case.B * case.T, case.K, case.R, case.op) == (1280, 768, 128, "lora") for case in CASES)
    assert any(case.quick for case in CASES)


def test_work_counted_by_hand() -> None:
    case = Case("one", "lora", B=2, T=5, L=1, K=3, N=7, R=4)
    # 10 rows: frozen 3 x 7, down 3 x 4, up 4 x 7; the image's 2 rows through the down-projection.
    assert case.work("fwd", 4)[0] == 2 * (10 * (21 + 12 + 28) + 2 * 12)
    assert case.work("bwd", 4)[0] == 2 * (10 * (21 + 2 * (12 + 28)) + 2 * 12)
    assert case.work("fwd", 4, bottleneck=False) == (2 * 10 * 21, 4 * (10 * 3 + 10 * 7 + 21))
    total = [a + b for a, b in zip(case.work("fwd", 4), case.work("bwd", 4), strict=True)]
    assert list(case.work("fwdbwd", 4)) == total
    merged = Case("two", "merged_lora", B=1, T=1, L=1, K=3, N=6, R=4)
    # Code of both groups 8 wide; 2 of the 3 slices of the output, each from its own 4 components.
    assert merged.work("fwd", 4)[0] == 2 * (18 + (3 * 8 + 4 * 4) + 3 * 8)


def test_rounded_values_are_exact_in_half_precision() -> None:
    given = make_tensors(TINY[0], seed=0, dtype=torch.float64, device="cpu", rounded_to=torch.bfloat16)
    assert all(torch.equal(tensor, tensor.bfloat16().double()) for tensor in given.values())
    assert {name for name, tensor in given.items() if not tensor.requires_grad} == {"v", "weight"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    output = tmp_path / "rows.jsonl"
    assert main(["--quick", "--repeats", "2", "--output", str(output), "--dtype", dtype, "--routing", "mul"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert all(row.keys() == FIELDS for row in rows)
    assert {(row["case"], row["provider"]) for row in rows} == {
        *(("tiny_lora", name) for name in ("base", "reference", "eager")),
        *(("tiny_adapter", name) for name in ("reference", "eager")),
    }
    for row in rows:
        assert (row["routing"], row["dtype"], row["gate"], row["repeats"]) == ("mul", dtype, "passed", 2)
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
    printed = capsys.readouterr().out
    assert "| tiny_lora | mul |" in printed
    assert "| tiny_adapter | mul |" in printed


def test_shut_gate_prints_no_speed_up(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer whose gradient of b is 1 % off is caught, named, and not timed; the other case still is."""
    good = cases.routed_lora_linear

    def wrong(x, v, weight, bias, a, b, **options):
        skewed = 1.01 * b - 0.01 * b.detach()  # the same value, another gradient
        return good(x, v, weight, bias, a, skewed, **options)

    monkeypatch.setattr(cases, "routed_lora_linear", wrong)
    output = tmp_path / "rows.jsonl"
    assert main(["--quick", "--repeats", "1", "--output", str(output), "--routing", "add"]) == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    failed = [row for row in rows if row["gate"] == "failed"]
    assert [row["case"] for row in failed] == ["tiny_lora"]
    assert "ms_p50" not in failed[0]
    assert failed[0]["gate_missed"] == [failed[0]["gate_missed"][0]]
    assert failed[0]["gate_missed"][0].startswith("eager: db relative RMS error 1.00e-02")
    printed = capsys.readouterr().out
    assert "| tiny_lora |" not in printed
    assert "GATE FAILED, not timed: tiny_lora add float32: eager: db" in printed
    assert "| tiny_adapter | add |" in printed


def test_gate_knows_nan_shape_and_the_plain_error() -> None:
    want = {"y": torch.ones(4, dtype=torch.float64)}
    check = partial(gate.failures, oracle=want, dtype=torch.float32)
    assert check({"y": torch.ones(4)}, {"y": torch.ones(4)}) == {}
    assert "nan" in check({"y": torch.full((4,), torch.nan)}, {"y": torch.ones(4)})["y"]
    assert check({"y": torch.ones(5)}, {"y": torch.ones(4)}) == {"y": "has shape [5], not [4]"}
    # 4e-6 is below the cap but more than twice the error of the plain composition.
    assert "above 1.00e-06" in check({"y": torch.ones(4) + 4e-6}, {"y": torch.ones(4)})["y"]
    assert gate.allowed_error(torch.float32, 1e-6) == pytest.approx(3e-6)
    assert gate.allowed_error(torch.float32, 1.0) == gate.CAPS[torch.float32]
    assert gate.relative_rms(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0


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
    assert "| c | mul | float32 | 40.00 | 30.00 | 1.25x | 1.39x | 1.33x | 2.00x | 1.00, 1.00 |" in printed
    assert "Measured on some CPU, 1 thread(s), torch 2.6, commit abc1234." in printed
    # A later measurement replaces an earlier one, and a shut gate withdraws it.
    later = report.summarise([*rows, row("eager", "fwdbwd", 80.0, dirty=True)])
    assert "| 0.50x | 0.33x |" in later
    assert "commit abc1234 (changed since)" in later
    withdrawn = report.summarise([*rows, {**row("", "", 0.0), "gate": "failed", "gate_missed": ["eager: y bad"]}])
    assert "| c | mul |" not in withdrawn
    assert "GATE FAILED" in withdrawn


def test_report_reads_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [row(provider, mode, 2.0) for provider in ("reference", "eager") for mode in ("fwd", "bwd", "fwdbwd")]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert report.main([str(file)]) == 0
    assert "| c | mul | float32 | 2.00 | 2.00 | 1.00x | 1.00x | 1.00x | - |" in capsys.readouterr().out


def test_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--case", "nope"])
    assert "invalid choice: 'nope'" in capsys.readouterr().err


def test_threads_are_put_back(tiny: None) -> None:
    before = torch.get_num_threads()
    main(["--case", "tiny_adapter", "--routing", "none", "--repeats", "1", "--threads", str(before + 1)])
    assert torch.get_num_threads() == before
