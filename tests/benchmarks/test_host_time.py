"""The host time of a step: one line per case and checkout."""

import re
from pathlib import Path

import pytest

from routingvl.benchmarks import host_time

pytest.importorskip("triton")


def test_a_line_per_case_and_checkout(capsys):
    root = str(Path(__file__).resolve().parents[2])
    cases = ["gpt2/lora/mul", "roberta/adapter/vllora"]
    arguments = [part for case in cases for part in ("--case", case)]
    assert host_time.main([root, *arguments, "--repeats", "1", "--layers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for case, line in zip(cases, lines, strict=True):
        assert re.fullmatch(rf"{case} .*: \d+\.\d\d ms, 1\.000 of the first", line)
