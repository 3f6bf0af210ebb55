"""Plots of benchmark rows: which are drawn, and what the lines of the scaling plots join."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from routingvl.benchmarks import plots, report, results
from routingvl.benchmarks.layer_cases import CASES

MACHINE = {"device": "some CPU", "threads": 1, "torch": "2.6", "commit": "abc1234", "dirty": False}
FIXED = {"dtype": "float32", "gate": "passed", "saved_mib": 1.0, "peak_mib": 2.0, "clock": "cpu", **MACHINE}
SERIES = {
    "by_tokens": {"mul": [64, 128, 320, 640, 1280, 2040, 5120]},
    "by_rank": {"add": [8, 16, 32, 64, 128, 256], "mul": [8, 16, 32, 64, 128, 256]},
    "by_visual_tokens": {"vllora": [1, 16, 64, 197]},
}


def layer_rows() -> list[dict]:
    """Rows of every layer of the CPU suite; ours is the faster the more rank and tokens there are."""
    rows = []
    for case in (case for case in CASES if "cpu" in case.devices and case.level == "layer"):
        for routing in case.routings:
            fixed = {**case.labels(), **case.sizes(), **FIXED, "routing": routing, "limit_percent": 50.0}
            times = {"base": 1.0, "reference": 4.0 + case.R * case.L, "eager": 4.0}
            if case.op == "adapter":
                del times["base"]
            rows += [{**fixed, "provider": name, "mode": "fwdbwd", "ms_p50": ms} for name, ms in times.items()]
    return rows


def model_rows() -> list[dict]:
    rows = []
    for level, mode, rate in (("step", "fwdbwd", "examples_s"), ("generate", "generate", "captions_s")):
        fixed = {**FIXED, "case": level, "task": "caption", "level": level, "routing": "add", "mode": mode, "B": 2}
        rows += [{**fixed, "provider": name, "ms_p50": 2.0, rate: 1e3} for name in ("reference", "eager")]
    return rows


def test_every_plot_has_something_to_show(tmp_path: Path) -> None:
    written = plots.draw(results.collect([*layer_rows(), *model_rows()]), tmp_path / "new")
    assert [file.stem for file in written] == list(plots.PLOTS)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in written)


@pytest.mark.parametrize("name", list(plots.AXES))
def test_series_are_joined(name: str) -> None:
    """The series of cases are lines of their own, and nothing of two layers or routings is joined."""
    axes = Figure().add_subplot()
    plots.PLOTS[name](results.collect([*layer_rows(), *model_rows()]), axes)
    lines = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    found = {routing: [] for routing in SERIES[name]}
    for label, line in lines.items():
        level, op, *_, routing, _, who = label.split()
        assert (level, who) == ("layer", "eager")
        if op == "lora" and routing in found:
            found[routing].append(list(line.get_xdata()))
    for routing, series in SERIES[name].items():
        assert series in found[routing]
    if name == "by_rank":
        (ratios,) = (line.get_ydata() for label, line in lines.items() if " mul " in label)
        assert list(ratios) == [(4.0 + rank) / 4.0 for rank in SERIES[name]["mul"]]


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("cpu_layers", ["speed_up", "by_tokens", "by_rank", "by_visual_tokens", "overhead", "saved", "limit"]),
        ("cpu_layers_amd", ["speed_up", "by_tokens", "by_rank", "by_visual_tokens", "overhead", "saved", "limit"]),
        ("cpu_models", ["speed_up", "saved", "peak", "examples", "captions"]),
    ],
)
def test_plots_of_the_committed_results(tmp_path: Path, name: str, drawn: list[str]) -> None:
    rows = results.read_rows([Path(report.__file__).parent / "results" / f"{name}.jsonl"])
    written = plots.draw(results.collect(rows), tmp_path / "new")
    assert [file.stem for file in written] == drawn


def test_rows_from_before_some_fields_were_there_are_drawn_without_them(tmp_path: Path) -> None:
    rows = results.read_rows([Path(report.__file__).parent / "results" / "cpu_layers.jsonl"])
    later = {"level", "dropout", "first_call_s", "limit", "limit_ms", "limit_percent"}
    cases = ("roberta_lora_m1280", "linear_lora_m2040")
    kept = [row for row in rows if row["case"] in cases and not row.get("dropout") and row["gate"] == "passed"]
    old = [{field: value for field, value in row.items() if field not in later} for row in kept]
    written = plots.draw(results.collect(old), tmp_path / "new")
    assert [file.stem for file in written] == ["speed_up", "by_tokens", "overhead", "saved"]
