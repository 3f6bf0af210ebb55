"""The benchmark's levels of whole models: what each side computes, the gate, the rows, the order and the report."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from routingvl.benchmarks import main, model_comparisons, model_providers, run
from routingvl.benchmarks.comparison import TIME_LIMIT, Setting
from routingvl.benchmarks.layer_cases import LEVELS
from routingvl.benchmarks.layer_providers import PROVIDERS
from routingvl.benchmarks.model_cases import ALL, MODEL_CASES, ModelCase
from routingvl.benchmarks.random_models import SIZES, autocast, errors_of, loss_and_gradients, routed_model, step_inputs
from routingvl.benchmarks.suites import SUITES, Plan
from routingvl.benchmarks.timing import Timer
from routingvl.benchmarks.training_steps import TASKS
from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.kernels.reference import reference_lora

CPU = torch.device("cpu")
TINY = (
    ModelCase("answers", "step", "vqa", "tiny", B=4, T=5, R=4, routings=("none", "add"), vit=True, quick=("add",)),
    ModelCase("captions", "step", "caption", "tiny", B=4, T=5, R=4, routings=ALL),
    ModelCase("training", "train", "vqa", "tiny", B=16, T=12, R=4),
    ModelCase("writing", "generate", "caption", "tiny", B=2, R=4, beams=3, tokens=6, quick=("add",)),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CASES", TINY)


def rows_of(tmp_path: Path, *command: str, status: int = 0) -> list[dict]:
    output = tmp_path / "rows.jsonl"
    assert main([*command, "--repeats", "1", "--dropout", "0", "--output", str(output)]) == status
    return [json.loads(line) for line in output.read_text().splitlines()]


def in_float64(model):
    """``model`` itself in float64, its layers computed as kernels/reference.py defines them."""

    def forward(self, x):
        weight = self.weight.T if self.weight_layout == "kn" else self.weight
        v = self.context.read(x) if self.routing.uses_image else None
        options = {
            "routing": self.routing.name,
            "scaling": self.scaling,
            "groups": self.groups,
            "columns": self.columns,
        }
        return reference_lora(x, v, self.lora_A, self.lora_B, base=F.linear(x, weight, self.bias), **options)

    for module in model.double().modules():
        if isinstance(module, RoutedLoRALinear):
            module.forward = partial(forward, module)
    return model


@pytest.mark.parametrize("routing", ALL)
@pytest.mark.parametrize("task", ["vqa", "caption"])
def test_every_side_is_the_definition_in_float64(task: str, routing: str) -> None:
    """The gate compares with the published model in float32, so that one has to be right by itself."""
    model = routed_model(task, "tiny", routing, vision=False).eval()
    inputs = step_inputs(task, model, 3, 5)
    names = ["reference", "eager"] + (["peft"] if (task, routing) == ("vqa", "none") else [])
    sides = {name: model_providers.make_side(name, model) for name in names}
    got = {name: loss_and_gradients(side.model, inputs, autocast(CPU, "float32")) for name, side in sides.items()}
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    want = loss_and_gradients(in_float64(model), exact, autocast(CPU, "float32"))
    for name, found in got.items():
        assert max(errors_of(found, want).values()) < 1e-6, name
    assert min(errors_of((0.999 * want[0], 0.999 * want[1]), want).values()) > 9e-4


def test_the_compiled_side_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_providers.torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    model = routed_model("caption", "tiny", "mul", vision=False).eval()
    inputs = step_inputs("caption", model, 2, 4)
    sides = [model_providers.make_side(name, model) for name in ("compile", "reference")]
    got, want = (loss_and_gradients(side.model, inputs, autocast(CPU, "float32"), side.call) for side in sides)
    assert max(errors_of(got, want).values()) < 1e-6


def test_rows_of_steps(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    wanted = ("--provider", "eager", "--provider", "peft", "--provider", "triton")
    rows = rows_of(tmp_path, "--levels", "step", "--case", "answers", *wanted)
    timed = [row for row in rows if row["gate"] == "passed"]
    modes = ("fwd", "bwd", "fwdbwd")
    assert [(row["routing"], row["provider"], row["mode"]) for row in timed] == [
        *(("none", name, mode) for name in ("reference", "peft", "eager") for mode in modes),
        ("none", "base", "vit"),
        *(("add", name, mode) for name in ("reference", "eager") for mode in modes),
    ]
    for row in timed:
        assert (row["task"], row["level"], row["size"]) == ("vqa", "step", "tiny")
        assert (row["B"], row["T"], row["R"], row["dropout"], row["dtype"]) == (4, 5, 4, 0.0, "float32")
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        whole = row["mode"] in ("fwdbwd", "vit")
        assert row["examples_s"] == (pytest.approx(4e3 / row["ms_p50"], rel=1e-2) if whole else None)
        assert row["provider"] == "base" or 0 < row["saved_mib"] < row["peak_mib"]
        assert {"commit", "torch", "device", "timestamp", "clock", "gate_worst_error", "first_call_s"} <= row.keys()
    left_out = {(row["routing"], row["provider"], row["skipped"].split()[0]) for row in rows if row not in timed}
    assert left_out == {*((routing, "triton", "Triton") for routing in ("none", "add")), ("add", "peft", "PEFT")}
    printed = capsys.readouterr().out
    assert "| answers | none | peft | float32 |" in printed
    assert "| answers | add | eager | float32 |" in printed
    assert "overhead" not in printed  # no table of layers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_training_and_generation(
    tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    rows = rows_of(tmp_path, "--levels", "train,generate", "--dtype", dtype, "--provider", "eager")
    assert [(row["case"], row["provider"], row["mode"]) for row in rows] == [
        *(("training", name, "step") for name in ("reference", "eager")),
        *(("writing", name, "generate") for name in ("reference", "eager")),
    ]
    for row in rows:
        rate = "captions_s" if row["case"] == "writing" else "examples_s"
        assert row[rate] == pytest.approx(1e3 * row["B"] / row["ms_p50"], rel=1e-2)
        assert (row["dtype"], row["gate"], row["saved_mib"]) == (dtype, "passed", None)
        assert row["peak_mib"] > 0
        assert row["case"] == "writing" or row["published_dtype"] == "float32"
    assert (rows[2]["beams"], rows[2]["tokens"]) == (3, 6)
    printed = capsys.readouterr().out
    published, ours = (row["ms_p50"] for row in rows[:2])
    times = f"{published:.1f} | {ours:.1f} | - | - | {published / ours:.2f}x"
    assert f"| training | add | eager | {dtype} | {times} |" in printed


def test_models_are_not_measured_in_float16(tiny: None, tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "--case", "training", "--dtype", "float16")
    assert (row["provider"], row["skipped"]) == ("all", "models are measured in float32 and bfloat16")


@pytest.mark.parametrize(("case", "dtype"), [(case, "float32") for case in TINY] + [(TINY[3], "bfloat16")])
def test_a_wrong_layer_shuts_the_gate(
    tiny: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    case: ModelCase,
    dtype: str,
) -> None:
    forward = RoutedLoRALinear.forward
    factor = 1.01 if dtype == "float32" else 1.3
    monkeypatch.setattr(RoutedLoRALinear, "forward", lambda self, x, v=None: forward(self, x, v) * factor)
    command = ("--case", case.name, "--routing", "add", "--provider", "eager", "--dtype", dtype)
    rows = rows_of(tmp_path, *command, status=1)
    failed = [row for row in rows if row["gate"] == "failed"]
    assert [row["provider"] for row in failed] == ["eager"]
    assert "relative RMS error" in failed[0]["gate_missed"][0]
    assert {row["provider"] for row in rows if "ms_p50" in row} == {"reference"}
    printed = capsys.readouterr().out
    assert f"GATE FAILED, not timed: {case.name} add {dtype}: eager:" in printed
    assert "x |" not in printed  # no speed-up


def test_other_captions_shut_the_gate(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = model_comparisons.write_captions, []

    def spoiled(*args, **options):
        calls.append(args)
        return write(*args, **options) + (len(calls) > 2)  # after both searches of the reference

    monkeypatch.setattr(model_comparisons, "write_captions", spoiled)
    rows = rows_of(tmp_path, "--case", "writing", "--provider", "eager", status=1)
    assert rows[0]["gate_missed"] == ["100.0% of the tokens are others"]


def test_a_model_that_cannot_be_built_is_a_failure_of_its_case_alone(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = model_comparisons.routed_model

    def poor(task, *args, **options):
        if task == "vqa":
            raise torch.OutOfMemoryError("none left")
        return build(task, *args, **options)

    monkeypatch.setattr(model_comparisons, "routed_model", poor)
    rows = rows_of(tmp_path, "--quick", "--provider", "eager", status=1)
    assert rows[0]["gate_missed"] == ["OutOfMemoryError: none left"]
    assert {(row["case"], row["gate"]) for row in rows} == {("answers", "failed"), ("writing", "passed")}


def test_the_vit_is_timed_in_the_dtype_of_the_pass() -> None:
    seen = []
    for dtype in ("float32", "bfloat16"):
        setting = Setting(Plan(dtype), CPU, (), lambda share: False, None)
        comparison = model_comparisons.StepComparison(TINY[0], "none", setting)
        comparison.gated()
        layer = next(module for module in comparison.vit.modules() if isinstance(module, torch.nn.Linear))
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        found = comparison.seconds(["reference"], Timer(CPU, 1), 2)
        assert len(found["base"]["vit"]) == 2
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3


def test_the_time_limit_is_looked_at_before_each_provider() -> None:
    setting = Setting(Plan(), CPU, PROVIDERS, lambda share: share <= 1, None)
    comparison = model_comparisons.StepComparison(TINY[0], "add", setting)
    skipped, gate = comparison.gated()
    assert skipped == dict.fromkeys(set(PROVIDERS) - {"base", "reference"}, TIME_LIMIT)
    assert list(gate) == ["reference"]


def test_the_quick_suite_takes_few_routings_and_named_cases_all(tiny: None) -> None:
    def chosen(*command: str) -> list[tuple[str, str]]:
        args = run.build_parser().parse_args(command)
        return [(case.name, routing) for case, routing, _ in run.work_of(run.suite_of(args), args)]

    assert chosen("--quick") == [("answers", "add"), ("writing", "add")]
    assert chosen("--quick", "--levels", "generate") == [("writing", "add")]
    assert chosen("--quick", "--case", "answers") == [("answers", "none"), ("answers", "add")]
    assert len(chosen("--suite", "cpu")) == sum(len(case.routings) for case in TINY)  # none with dropout


def test_layers_come_first_on_a_gpu() -> None:
    args = run.build_parser().parse_args(["--suite", "gpu"])
    levels = [case.level for case, _, _ in run.work_of(SUITES["gpu"], args)]
    models = [level not in ("op", "layer") for level in levels]
    assert sorted(models) == models
    assert set(levels) == set(LEVELS) - {"launch"}  # which needs no GPU


def test_the_cases_of_models() -> None:
    assert len({case.name for case in run.CASES}) == len(run.CASES)
    assert ("launch", "op", "layer", *model_comparisons.MODEL_COMPARISONS) == LEVELS
    assert {case.level for case in MODEL_CASES} == set(model_comparisons.MODEL_COMPARISONS)
    assert all(case.devices == ("cuda",) for case in MODEL_CASES if case.size == "large")
    for case in MODEL_CASES:
        assert case.size in SIZES
        if case.level == "train":  # the recipe's sizes, as in benchmarks.training_speed
            assert (TASKS[case.task][0], TASKS[case.task][4]) == (case.B, case.T)
    quick = [(case.level, case.quick) for case in MODEL_CASES if case.quick]
    assert sorted(quick) == [("generate", ("add",)), ("step", ("add",))]
