"""CUDA graphs in the benchmark, as far as they go without a GPU: a stand-in for torch's graph runs the pass again."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch

from routingvl.benchmarks import ceilings, main, report
from routingvl.benchmarks.layer_cases import Case
from routingvl.benchmarks.model_cases import ModelCase
from routingvl.benchmarks.passes import Pass
from routingvl.benchmarks.run import measured_before
from routingvl.benchmarks.suite_run import SuiteRun
from routingvl.benchmarks.suites import Plan, Suite

LAYER = Case("layer", "lora", B=2, T=3, L=1, K=8, N=8, R=4)
SUITE = Suite("cpu", 2, 1, (Plan(),), providers=("eager",), graphs=True)


class Graph:
    """Stands in for torch.cuda.CUDAGraph: a replay computes the gradients again, into the same memory."""

    captured: Pass
    error = 0.0

    def replay(self) -> None:
        static = self.captured.gradients()
        self.captured.clear()
        RUN(self.captured)
        for old, new in zip(static, self.captured.gradients(), strict=True):
            old.copy_(new * (1 + self.error))
        for leaf, old in zip((leaf for leaf in self.captured.leaves if leaf.grad is not None), static, strict=True):
            leaf.grad = old


RUN = Pass.run


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    monkeypatch.setitem(ceilings.SIZES, "cpu", (2**16, 32, 32, 32))
    last: list[Pass] = []

    def run(self: Pass) -> None:
        last.append(self)
        RUN(self)

    @contextmanager
    def capturing(graph: Graph) -> Iterator[None]:
        begun = len(last)
        yield
        (graph.captured,) = last[begun:]  # one pass and no more
        assert last[begun - 1] is graph.captured  # which had warmed up

    monkeypatch.setattr(Pass, "run", run)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Mine", (Graph,), {}))
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    for name in ("Stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    return torch.cuda.CUDAGraph


def rows_of(case: Case | ModelCase, plan: Plan = SUITE.plans[0]) -> list[dict]:
    return list(SuiteRun(replace(SUITE, plans=(plan,)), 1).rows(case, "add", plan))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_rows_of_graphs_beside_the_others(cuda: type[Graph], dropout: float) -> None:
    rows = rows_of(LAYER, Plan(dropout=dropout))
    graphs = [row for row in rows if row.get("graphs")]
    assert [(row["provider"], row["mode"], row["gate"]) for row in graphs] == [
        (name, "fwdbwd", "passed") for name in ("base", "reference", "eager")
    ]
    assert all(row["ms_p50"] > 0 and row["limit_percent"] > 0 and row["repeats"] == 2 for row in graphs)
    assert len(rows) == 9 + 3
    printed = report.summarise(rows)
    notes = ["dropout 0.5"] if dropout else []
    assert f"| layer | add{f' ({notes[0]})' if dropout else ''} | float32 |" in printed
    assert f"| layer | add ({', '.join([*notes, 'CUDA graph'])}) | float32 |" in printed


def test_a_step_is_captured_and_generation_is_not(cuda: type[Graph]) -> None:
    rows = rows_of(ModelCase("step", "step", "vqa", "tiny", B=2, T=3, R=4))
    assert [row["provider"] for row in rows if row.get("graphs")] == ["reference", "eager"]
    rows = rows_of(ModelCase("writing", "generate", "caption", "tiny", B=2, R=4, beams=2, tokens=2))
    left_out = [row for row in rows if row.get("graphs")]
    assert {row["skipped"] for row in left_out} == {"this level has no pass to capture in a CUDA graph"}


def test_a_replay_that_differs_is_not_timed(cuda: type[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "error", 0.01)
    graphs = [row for row in rows_of(LAYER) if row.get("graphs")]
    assert {row["gate"] for row in graphs} == {"failed"}
    assert graphs[0]["gate_missed"][0].startswith("replayed gradients relative RMS error 1.00e-02")
    printed = report.summarise(rows_of(LAYER))
    assert "CUDA graph) |" not in printed
    assert "| layer | add | float32 |" in printed


def test_what_cannot_be_captured_is_left_out(cuda: type[Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(graph: Graph) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    rows = rows_of(LAYER)
    graphs = [row for row in rows if row.get("graphs")]
    assert {row["gate"] for row in graphs} == {"skipped"}
    assert graphs[0]["skipped"].startswith("not captured in a CUDA graph: RuntimeError: operation not permitted")
    assert len(rows) == 9 + 3


def test_a_run_without_graphs_does_not_count_as_one_with(cuda: type[Graph]) -> None:
    rows = [{**row, "dirty": False} for row in rows_of(LAYER)]
    plain = [row for row in rows if not row.get("graphs")]
    assert measured_before(rows, graphs=True)
    assert measured_before(plain)
    assert not measured_before(plain, graphs=True)


def test_cuda_graphs_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--cuda-graphs"])
    assert "--cuda-graphs needs a CUDA device, not cpu" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("case", [LAYER, ModelCase("step", "step", "vqa", "tiny", B=2, T=3, R=4)])
def test_graphs_on_a_gpu(case: Case | ModelCase) -> None:
    suite = replace(SUITE, device="cuda", plans=(Plan(clock="gpu"),), providers=("eager", "triton"))
    rows = list(SuiteRun(suite, 1).rows(case, "add", suite.plans[0]))
    graphs = [row for row in rows if row.get("graphs")]
    assert {"reference", "eager", "triton"} <= {row["provider"] for row in graphs}
    assert {row["gate"] for row in graphs} == {"passed"}, [row.get("skipped", row.get("gate_missed")) for row in graphs]
