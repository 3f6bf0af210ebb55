"""benchmarks/targets.py as far as it goes without a GPU: gate, sides, and whose kernels are whose."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from routingvl.kernels.optional_triton import interpreted

pytest.importorskip("triton")
if not interpreted():
    pytest.skip("without Triton's interpreter these cases need a GPU", allow_module_level=True)

from routingvl.benchmarks import layer_providers as providers
from routingvl.benchmarks import targets
from routingvl.benchmarks.layer_cases import CASES, Case
from routingvl.benchmarks.targets import Clocks, Target, between, main, rows_of, table

SMALL = {"B": 10, "T": 3, "L": 1, "K": 24, "R": 4}


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    """On a CPU: nothing to wait for, kernels made up, no graphs."""
    cases = {"lora": 24, "merged_lora": 72, "adapter": 24}
    monkeypatch.setattr(targets, "CASES", [Case(op, op, N=width, **SMALL) for op, width in cases.items()])
    monkeypatch.setattr(targets, "COLD_BYTES", 64)
    monkeypatch.setattr(providers, "_triton_obstacle", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: nullcontext())
    # A turn is a forward and a backward pass, each a kernel of 3 us after the cache was overwritten.
    one_pass = [(targets.COLD, 0.0, 1.0), ("k", 1.0, 3.0)]
    turns: list[int] = []
    monkeypatch.setattr(targets, "device_events", lambda _: one_pass * 2 * turns.pop())
    clocks, inner = Clocks("cpu", 2), Clocks.kernels

    def kernels(self, sides):
        turns.append(len(list(targets.turns(sides, 2))))
        return inner(self, sides)

    monkeypatch.setattr(Clocks, "kernels", kernels)
    monkeypatch.setattr(targets, "capture", lambda run: (_ for _ in ()).throw(RuntimeError("no graphs here")))
    return clocks


@pytest.mark.parametrize("target", [
    Target("T1", "lora", "mul", dtype="float32", prepared=True),
    Target("T2", "lora", "vllora", dtype="float32", prepared=True, stock=True),
    Target("T5", "merged_lora", "mul", dtype="float32", dropout=0.1, stock=True),
    Target("T9", "adapter", "vllora", dtype="float32", prepared=True),
    Target("T11", "merged_lora", "vllora", dtype="float32", prepared=True, stock=True, decoding=True),
], ids=lambda target: target.name)  # fmt: skip
def test_rows(target: Target, clocks: Clocks) -> None:
    if target.decoding:
        targets.CASES[:] = [Case("merged_lora", "merged_lora", N=72, **SMALL | {"T": 1})]
    rows = {row["side"]: row for row in rows_of(target, clocks)}
    assert {"reference", "eager", "triton"} <= rows.keys()
    for name, row in rows.items():
        assert row.get("gate", "passed") == "passed", row
        assert ("us" in row) == ("wall_fwd" in row.get("us", {}))
        if name in ("triton", "eager"):
            assert row["same_bits"]
            assert row["us"]["kernels_fwd"] == [3.0] * 3
            assert ("kernels_fwdbwd" in row["us"]) != target.decoding
            assert row["graph_refused"].startswith("RuntimeError: no graphs")
    assert ("prepared" in rows) == target.prepared
    assert any(name.endswith("_stock") for name in rows) == target.stock
    assert f"{target.name} {target.routing} float32 triton | 3.0 (1.00)" in table(list(rows.values()))


def test_events_are_those_after_a_mark() -> None:
    events = [("early", 0, 1), ("cold", 1, 1), ("a", 2, 1), ("b", 3, 1), ("cold", 4, 1), ("cold", 5, 1), ("c", 6, 1)]
    assert [[name for name, *_ in piece] for piece in between(events, "cold")] == [["a", "b"], [], ["c"]]


def test_every_target_names_a_case_and_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert {target.case for target in targets.TARGETS} <= {case.name for case in CASES}
    if not torch.cuda.is_available():
        assert main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err
