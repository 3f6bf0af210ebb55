"""The tables of docs/benchmarks.md are what the command writes, and follow the rows and the routing functions."""

import json
from pathlib import Path

import pytest

from routingvl.benchmarks import tables
from routingvl.kernels import ROUTINGS


def test_the_committed_page_is_what_the_command_writes() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    assert tables.fill(text) == text


def test_a_number_that_was_not_measured_is_found_and_put_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = tables.PAGE.read_text(encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(right.replace("| GPT-2, add, 8 images", "| 9.99 | GPT-2, add, 8 images"), encoding="utf-8")
    monkeypatch.setattr(tables, "PAGE", page)
    assert tables.main(["--check"]) == 1
    assert "out of date: cpu-captions" in capsys.readouterr().out
    assert tables.main([]) == 0
    assert page.read_text(encoding="utf-8") == right
    assert tables.main(["--check"]) == 0


def test_a_table_without_its_marker_is_named() -> None:
    text = tables.PAGE.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="cpu-models"):
        tables.fill(text.replace("<!-- table: cpu-models -->", ""))


def test_a_further_routing_function_gets_a_column_once_it_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = {"case": "layer", "dtype": "float32", "gate": "passed", "clock": "cpu", "mode": "fwdbwd"}
    fixed |= {"device": "some CPU", "threads": 1, "torch": "2.6", "commit": "abc1234", "dirty": False}
    times = {
        ("none", "reference"): 3.0,
        ("none", "eager"): 2.0,
        ("unheard", "reference"): 5.0,
        ("unheard", "eager"): 2.0,
    }

    def write(file: str, *routings: str) -> tables.Line:
        rows = [
            {**fixed, "routing": name, "provider": provider, "ms_p50": ms}
            for (name, provider), ms in times.items()
            if name in routings
        ]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tables.Line(file, file, "layer")

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "ROUTINGS", {**ROUTINGS, "unheard": None})
    before, after = write("before", "none"), write("after", "none", "unheard")
    assert tables.by_routing("title", before).splitlines()[::2] == ["| title | none |", "| before | 1.50 |"]
    assert tables.by_routing("title", before, after).splitlines() == [
        *("| title | none | unheard |", "|---|---:|---:|", "| before | 1.50 |  |", "| after | 1.50 | 2.50 |"),
    ]
