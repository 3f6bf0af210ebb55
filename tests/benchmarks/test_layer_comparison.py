"""The benchmark: its baseline computes the same thing, its gate shuts, its rows and ratios are right."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from tolerances import assert_as_good_as

from routingvl.benchmarks import ceilings, main, run
from routingvl.benchmarks import layer_providers as providers_module
from routingvl.benchmarks.competitors import closed_form, in_place_lora
from routingvl.benchmarks.gate import relative_rms
from routingvl.benchmarks.layer_cases import CASES, Case, definition, make_tensors
from routingvl.benchmarks.layer_comparison import check
from routingvl.benchmarks.layer_providers import providers
from routingvl.benchmarks.suites import SUITES
from routingvl.benchmarks.timing import Timer
from routingvl.kernels import ROUTINGS
from routingvl.kernels.lora import eager as eager_lora
from routingvl.kernels.optional_triton import interpreted

TINY = (
    Case("tiny_lora", "lora", B=2, T=3, L=1, K=8, N=8, R=4, quick=True),
    Case("tiny_merged", "merged_lora", B=2, T=3, L=1, K=8, N=12, R=4),
    Case("tiny_tokens", "lora", B=2, T=3, L=5, K=8, N=8, R=4, routings=("vllora",)),
    Case("tiny_adapter", "adapter", B=2, T=3, L=1, K=8, N=8, R=4, activation="gelu_new", quick=True),
    Case("tiny_op", "lora", B=2, T=3, L=1, K=8, N=8, R=4, level="op"),
)
EACH = [(case, routing) for case in TINY for routing in case.routings]
FIELDS = {
    *("case", "op", "provider", "routing", "mode", "dtype", "B", "T", "L", "K", "N", "R", "ms_p20", "ms_p50", "ms_p80"),
    *("peak_mib", "saved_mib", "bytes_moved", "gb_s", "flops", "tflop_s", "gate", "gate_worst_error", "device"),
    *("level", "dropout", "first_call_s", "limit", "limit_ms", "limit_percent"),
    *("driver", "torch", "triton", "transformers", "commit", "dirty", "timestamp", "threads", "clock", "repeats"),
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CASES", TINY)
    monkeypatch.setitem(ceilings.SIZES, "cpu", (2**16, 32, 32, 32))


@pytest.mark.parametrize("provider", ["reference", "eager"])
@pytest.mark.parametrize(("case", "routing"), EACH, ids=lambda value: getattr(value, "name", value))
def test_every_provider_is_the_definition(case: Case, routing: str, provider: str) -> None:
    given = make_tensors(case, seed=3, dtype=torch.float64, device="cpu")
    assert_as_good_as(providers(case, routing, 0.0, "cpu")[0][provider], definition(case, routing), given)


@pytest.mark.parametrize("dropout", [0.0, 1e-15])
@pytest.mark.parametrize(("case", "routing"), EACH, ids=lambda value: getattr(value, "name", value))
def test_the_closed_forms_are_the_definition(case: Case, routing: str, dropout: float) -> None:
    given = make_tensors(case, seed=3, dtype=torch.float64, device="cpu")
    assert_as_good_as(closed_form(case, routing, dropout), definition(case, routing), given)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_orders_of_others_are_the_definition(routing: str) -> None:
    layers = providers(TINY[0], routing, 0.0, "cpu", ("addmm",))[0]
    both = partial(in_place_lora, routing, lambda x, w, bias, z, b: x @ w + (0 if bias is None else bias) + z @ b)
    found = check(TINY[0], routing, {"addmm": layers["addmm"], "split": both}, torch.float64, torch.device("cpu"), True)
    assert {name: one.missed for name, one in found.items()} == {"addmm": [], "split": []}


@pytest.mark.skipif(not interpreted(), reason="on a CPU the kernel runs only when interpreted")
@pytest.mark.parametrize("bias", [True, False])
def test_two_products_in_one_kernel(bias: bool) -> None:
    from routingvl.benchmarks.split_graph import two_products

    random = torch.Generator().manual_seed(0)
    x, w, z, b = (torch.randn(*shape, generator=random) for shape in ((70, 33), (90, 33), (70, 5), (90, 5)))
    added = torch.randn(90, generator=random) if bias else None
    want = x.double() @ w.t().double() + z.double() @ b.t().double() + (added if bias else 0)
    assert relative_rms(two_products(x, w.t(), added, z, b.t()), want) < 1e-6


def test_competitors_that_cannot_say_why() -> None:
    wanted = ("addmm", "split", "peft")
    for case, dropout, words in ((TINY[1], 0.0, "is of nn.Linear"), (TINY[0], 0.1, "has no dropout")):
        skipped = providers(case, "mul", dropout, "cpu", wanted)[1]
        assert words in skipped["addmm"]
        assert words in skipped["split"]
    assert "need a GPU" in providers(TINY[0], "mul", 0.0, "cpu", wanted)[1]["split"]


@pytest.mark.slow
def test_compiled_competitors_are_gated_and_timed(tiny: None, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    names = ("closed", "closed_overhead", "addmm")
    flags = [word for name in names for word in ("--provider", name)]
    command = ["--case", "tiny_lora", "--routing", "vllora", "--dtype", "bfloat16", "--dropout", "0", "--repeats", "1"]
    assert main([*command, *flags, "--output", str(output)]) == 0
    rows, skipped = read(output)
    assert not skipped
    assert {row["provider"] for row in rows if row["gate"] == "passed"} == {"base", "reference", *names}


def test_without_autocast_the_tensors_have_the_dtype(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen, good = set(), providers_module.routed_lora_linear

    def looked_at(x, *args, **options):
        seen.add((x.dtype, torch.is_autocast_enabled("cpu")))
        return good(x, *args, **options)

    monkeypatch.setattr(providers_module, "routed_lora_linear", looked_at)
    output = tmp_path / "rows.jsonl"
    command = ["--case", "tiny_lora", "--routing", "mul", "--provider", "eager", "--provider", "addmm"]
    command += ["--repeats", "1", "--dropout", "0", "--output", str(output), "--dtype", "bfloat16"]
    assert main([*command, "--pure"]) == 0
    assert seen == {(torch.bfloat16, False)}
    assert main([*command]) == 0
    assert seen == {(torch.bfloat16, False), (torch.float32, True)}
    rows, _ = read(output)
    assert [row["gate"] for row in rows] == ["passed"] * 24
    assert [row.get("pure", False) for row in rows] == [True] * 12 + [False] * 12
    assert "| tiny_lora | mul (without autocast) | bfloat16 |" in capsys.readouterr().out.replace("addmm, ", "")
    assert main(["--case", "tiny_lora", "--routing", "mul", "--pure", "--dtype", "float32", "--repeats", "1"]) == 0


def test_case_names_are_unique_and_the_published_sizes_are_there() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert any((case.B * case.T, case.K, case.R, case.op) == (1280, 768, 128, "lora") for case in CASES)
    assert any(case.quick for case in CASES)
    tokens, ranks = {case.B * case.T for case in CASES if case.T > 1}, {case.R for case in CASES}
    assert min(tokens) == 64
    assert min(ranks) == 8
    assert {case.B for case in CASES if case.T == 1} >= {1, 64}


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
    rows, skipped = read(output)
    assert all(row.keys() == FIELDS for row in rows)
    reasons = {(row["provider"], row["skipped"].split()[0]) for row in skipped}
    assert reasons == {("triton", "Triton"), ("peft", "PEFT")}
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


def read(output: Path) -> tuple[list[dict], list[dict]]:
    """The rows that are measured or failed, and those that were left out."""
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return tuple([row for row in rows if (row["gate"] == "skipped") is skipped] for skipped in (False, True))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_peft_is_gated_and_timed_beside_ours(tiny: None, tmp_path: Path, dropout: float) -> None:
    pytest.importorskip("peft")
    output = tmp_path / "rows.jsonl"
    command = ["--case", "tiny_lora", "--routing", "none", "--provider", "peft", "--dropout", str(dropout)]
    assert main([*command, "--repeats", "1", "--output", str(output)]) == 0
    rows, skipped = read(output)
    assert not skipped
    assert {(row["provider"], row["dropout"]) for row in rows} == {(x, dropout) for x in ("base", "reference", "peft")}


def test_a_provider_that_fails_only_with_dropout_is_not_timed(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = providers_module.routed_lora_linear

    def wrong(*args, dropout, **options):
        return good(*args, dropout=dropout, **options) * (torch.nan if dropout else 1)

    monkeypatch.setattr(providers_module, "routed_lora_linear", wrong)
    output = tmp_path / "rows.jsonl"
    command = ["--case", "tiny_lora", "--routing", "mul", "--provider", "eager", "--repeats", "1"]
    assert main([*command, "--dropout", "0"]) == 0
    assert main([*command, "--dropout", "0.5", "--output", str(output)]) == 1
    failed = [row for row in read(output)[0] if row["gate"] == "failed"]
    assert failed[0]["gate_missed"] == ["with dropout: y, dx, dbias, da, db not finite"]


def test_peft_drops_its_inputs() -> None:
    pytest.importorskip("peft")
    case, given = TINY[0], make_tensors(TINY[0], seed=0, dtype=torch.float32, device="cpu")
    for name in ("reference", "peft", "eager"):
        kept, dropped = (providers(case, "none", p, "cpu")[0][name](**given) for p in (0.0, 0.5))
        assert not torch.equal(kept, dropped), name


def test_levels_and_dropout_choose_the_cases(tiny: None, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    command = ["--routing", "mul", "--provider", "eager", "--repeats", "1", "--output", str(output)]
    assert main([*command, "--levels", "op"]) == 0
    assert {(row["case"], row["level"], row["dropout"]) for row in read(output)[0]} == {("tiny_op", "op", 0.0)}
    output.unlink()
    assert main([*command, "--levels", "op,layer"]) == 0
    names = {(row["case"], row["dropout"]) for row in read(output)[0]}
    plain = {(case.name, 0.0) for case in TINY if "mul" in case.routings}
    assert names == plain | {("tiny_lora", 0.1), ("tiny_merged", 0.1)}


def test_without_a_compiler_the_reason_is_said(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--case", "tiny_lora", "--routing", "mul", "--provider", "compile", "--dropout", "0", "--repeats", "1"]
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main([*command, "--output", str(tmp_path / "rows.jsonl")]) == 0
    assert [row["provider"] for row in read(tmp_path / "rows.jsonl")[1]] == ["compile"]
    assert "Not measured, 1 time(s): compile: torch.compile needs a C++ compiler" in capsys.readouterr().out


def test_a_triton_that_the_compiler_cannot_use_is_said(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor.compile_fx", None)  # importing it fails
    command = ["--case", "tiny_lora", "--routing", "mul", "--provider", "compile", "--dropout", "0", "--repeats", "1"]
    assert main([*command, "--output", str(tmp_path / "rows.jsonl")]) == 0
    assert "compile: the compiler of torch" in capsys.readouterr().out


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_the_reference_compiles_whole(case: Case) -> None:
    """No graph break in the compiled baseline, which would make it look slower than it is."""
    given = make_tensors(case, seed=3, dtype=torch.float64, device="cpu")
    inside = providers_module._compilable(case, providers(case, "vllora", 0.0, "cpu", ())[0]["reference"])
    torch.compiler.reset()
    compiled = torch.compile(inside, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_as_good_as(compiled, definition(case, "vllora"), given)


def test_the_gpu_suite_by_its_passes(tiny: None, tmp_path: Path) -> None:
    """On a CPU its two clocks are one, so that four of its passes are left."""
    output = tmp_path / "rows.jsonl"
    command = ["--suite", "gpu", "--device", "cpu", "--provider", "eager", "--repeats", "1", "--routing", "mul"]
    assert main([*command, "--output", str(output)]) == 0
    rows, _ = read(output)
    passes = dict.fromkeys((row["dtype"], row["dropout"]) for row in rows if row["case"] == "tiny_lora")
    assert list(passes) == [("bfloat16", 0.0), ("bfloat16", 0.1), ("float32", 0.0)]
    assert {row["case"] for row in rows if row.get("pure")} == {row["case"] for row in rows}


def test_a_spent_time_limit_is_said(tiny: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--routing", "mul", "--time-limit", "1e-9"]) == 0
    assert "Not measured, 2 time(s): all: time limit" in capsys.readouterr().out


def test_broken_kernel_shuts_the_gate(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel whose result is a little off, deep inside the library: no speed-up, and the exit status says so."""
    right = eager_lora.DenseLoRA.forward

    def off(*args):
        results = right(*args)
        results[0].mul_(1.001)
        return results

    monkeypatch.setattr(eager_lora.DenseLoRA, "forward", off)
    output = tmp_path / "rows.jsonl"
    assert main(["--quick", "--repeats", "1", "--routing", "mul", "--output", str(output)]) == 1
    failed = [row for row in read(output)[0] if row["gate"] == "failed"]
    assert [(row["case"], row["provider"]) for row in failed] == [("tiny_lora", "eager")]
    assert failed[0]["gate_missed"][0].startswith("y relative RMS error")
    printed = capsys.readouterr().out
    assert "| tiny_lora |" not in printed
    assert "GATE FAILED, not timed: tiny_lora mul float32: eager: y relative RMS error" in printed


def test_a_competitor_that_misses_the_gate_is_no_failure_of_ours(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    right = providers_module.PeftLayer.__call__
    monkeypatch.setattr(
        providers_module.PeftLayer, "__call__", lambda self, *args, **kw: right(self, *args, **kw) * 1.1
    )
    output = tmp_path / "rows.jsonl"
    flags = ["--provider", "peft", "--provider", "eager", "--repeats", "1", "--routing", "none"]
    assert main(["--quick", *flags, "--output", str(output)]) == 0
    rows, _ = read(output)
    assert {row["provider"] for row in rows if row["gate"] == "failed"} == {"peft"}
    assert "GATE FAILED, not timed: tiny_lora none float32: peft" in capsys.readouterr().out


def test_shut_gate_prints_no_speed_up(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A layer whose gradient of b is 1 % off is caught, named, and not timed; the other case still is."""
    good = providers_module.routed_lora_linear

    def wrong(x, v, weight, bias, a, b, **options):
        skewed = 1.01 * b - 0.01 * b.detach()  # the same value, another gradient
        return good(x, v, weight, bias, a, skewed, **options)

    monkeypatch.setattr(providers_module, "routed_lora_linear", wrong)
    output = tmp_path / "rows.jsonl"
    assert main(["--quick", "--repeats", "1", "--output", str(output), "--routing", "add"]) == 1
    rows, _ = read(output)
    failed = [row for row in rows if row["gate"] == "failed"]
    assert [row["case"] for row in failed] == ["tiny_lora"]
    assert "ms_p50" not in failed[0]
    assert failed[0]["gate_missed"] == [failed[0]["gate_missed"][0]]
    assert failed[0]["provider"] == "eager"
    assert failed[0]["gate_missed"][0].startswith("db relative RMS error 1.00e-02")
    printed = capsys.readouterr().out
    assert "| tiny_lora |" not in printed
    assert "GATE FAILED, not timed: tiny_lora add float32: eager: db" in printed
    assert "| tiny_adapter | add |" in printed


def test_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--case", "nope"])
    assert "invalid choice: 'nope'" in capsys.readouterr().err


def test_threads_are_put_back(tiny: None) -> None:
    before = torch.get_num_threads()
    main(
        [
            "--case",
            "tiny_adapter",
            "--routing",
            "none",
            "--repeats",
            "1",
            "--provider",
            "eager",
            "--threads",
            str(before + 1),
        ]
    )
    assert torch.get_num_threads() == before


def test_gpu_suite_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert SUITES["gpu"].time_limit < 530
    args = run.build_parser().parse_args(["--suite", "gpu"])
    assert run.cases_of(run.suite_of(args), args)[0].name == "roberta_lora_m10240"
    for command in (["--device", "cuda"], ["--suite", "gpu"]):
        if not torch.cuda.is_available():
            with pytest.raises(SystemExit):
                main(command)
            assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--clock", "gpu"])
    assert "--clock gpu needs a CUDA device" in capsys.readouterr().err
    with pytest.raises(ValueError, match="needs a CUDA device"):
        Timer(torch.device("cpu"), 1, "gpu")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--repeats", "-1"], "--repeats -1 must be at least 1"),
        (["--output", "/nowhere/rows.jsonl"], "there is no folder /nowhere; make it first"),
    ],
)
def test_flags_that_cannot_be_meant(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    assert message in capsys.readouterr().err
