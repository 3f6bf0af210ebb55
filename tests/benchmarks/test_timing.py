"""Clocks: what the profiler saw is given to its call, and the host's time is a column of its own."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch

from routingvl.benchmarks import ceilings, kernel_times, main, run, suite_run, timing
from routingvl.benchmarks.kernel_times import COLD, KernelTimesError, events_of_each, total
from routingvl.benchmarks.layer_cases import Case
from routingvl.benchmarks.passes import Pass, measure_passes, turns
from routingvl.benchmarks.suite_run import SuiteRun
from routingvl.benchmarks.suites import Plan, Suite
from routingvl.benchmarks.timing import Spent, Timer

CASE = Case("layer", "lora", B=2, T=3, L=1, K=8, N=8, R=4, routings=("mul",))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CPU that passes for a GPU: whatever is put on the list "ran" on it, each for 5 us."""
    ran: list[str] = []

    class Cold:
        """In place of the memory that is overwritten."""

        zero_ = staticmethod(lambda: None)
        bitwise_not_ = staticmethod(lambda: ran.append(COLD))

    def timer(device: torch.device, threads: int, clock: str | None = None) -> Timer:
        made = Timer(torch.device("cpu"), threads)
        made.clock, made._cold = clock or "wall", Cold()
        made._read = time.perf_counter
        return made

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(
        kernel_times, "device_events", lambda profile: [(name, 5.0 * at, 5.0) for at, name in enumerate(ran)]
    )

    def events(self: Timer, call) -> tuple[float, object]:
        spent, result = self._from_idle_to_idle(call)
        return spent.seconds, result

    monkeypatch.setattr(suite_run, "Timer", timer)
    monkeypatch.setattr(Timer, "_between_events", events)
    monkeypatch.setitem(ceilings.SIZES, "cpu", (2**16, 32, 32, 32))
    ran.append("of something earlier")
    return ran


def test_kernels_belong_to_the_call_that_launched_them(gpu: list[str]) -> None:
    timer = suite_run.Timer(torch.device("cpu"), 1, "gpu")

    def calls():
        yield lambda: gpu.extend(["a", "b"])
        gpu.append("between two calls")
        yield lambda: gpu.append("c")

    assert timer.all(calls()) == [Spent(pytest.approx(10e-6)), Spent(pytest.approx(5e-6))]
    gpu.clear()
    found = events_of_each([lambda: gpu.extend(["a", "b", "a"])], timer._cold)
    assert total(found[0], "a") == pytest.approx(10e-6)


def test_lost_marks_are_an_error(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    timer = suite_run.Timer(torch.device("cpu"), 1, "gpu")
    monkeypatch.setattr(kernel_times, "device_events", lambda profile: [])
    with pytest.raises(KernelTimesError, match="saw 0 of 2 marks between 1 calls"):
        timer.all([lambda: None])


def test_host_time_is_measured_without_the_profiler(gpu: list[str]) -> None:
    x = torch.ones(3, requires_grad=True)

    def forward() -> torch.Tensor:
        gpu.append("forward")
        time.sleep(0.01)
        return x.half()

    timer, order = suite_run.Timer(torch.device("cpu"), 1, "gpu"), turns(["one"], 3)
    found = measure_passes({"one": Pass(forward, [x])}, torch.ones(3), timer, order)["one"]
    assert [one.seconds for one in found["fwd"]] == [pytest.approx(5e-6)] * 3
    assert all(one.host > 0.01 for one in found["fwd"])
    assert [one.seconds for one in found["bwd"]] == [0] * 3
    assert all(both.host == f.host + b.host for f, b, both in zip(*found.values(), strict=True))


def test_rows_have_the_host_time_of_a_gpu(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one_each = [(COLD, 0.0, 5.0), ("k", 5.0, 5.0)]
    monkeypatch.setattr(kernel_times, "device_events", lambda profile: one_each * gpu.count(COLD))
    plan = Plan(clock="gpu")
    rows = list(SuiteRun(Suite("cpu", 2, 1, (plan,), providers=("eager",)), 1).rows(CASE, "mul", plan))
    assert {row["provider"] for row in rows} == {"base", "reference", "eager"}
    for row in rows:
        assert row["clock"] == "gpu"
        assert row["ms_p50"] == (0.01 if row["mode"] == "fwdbwd" else 0.005)
        assert 0 < row["host_ms_p20"] <= row["host_ms_p50"] <= row["host_ms_p80"]


def test_without_a_profiler_the_case_is_left_out(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "device_events", lambda profile: [])
    plan = Plan(clock="gpu")
    rows = list(SuiteRun(Suite("cpu", 2, 1, (plan,), providers=("eager",)), 1).rows(CASE, "mul", plan))
    assert [row["gate"] for row in rows] == ["skipped"]
    assert rows[0]["skipped"].startswith("no kernel times: the profiler saw 0 of ")


def test_a_cpu_has_no_host_time_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(run, "CASES", (CASE,))
    monkeypatch.setitem(ceilings.SIZES, "cpu", (2**16, 32, 32, 32))
    output = tmp_path / "rows.jsonl"
    assert main(["--provider", "eager", "--repeats", "1", "--dropout", "0", "--output", str(output)]) == 0
    assert "host_ms" not in output.read_text()
    assert timing.default_clock(torch.device("cpu"), 1) == "cpu"
