"""The host time of whole models beside the published chain: a line per case, with every side."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_line_per_case() -> None:
    command = [sys.executable, "-m", "benchmarks.model_host_time", "--repeats", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for case, line in zip(("gpt2/train", "roberta/train", "gpt2/decode"), lines, strict=True):
        side = r"{} \d+\.\d\d ms \(\d+\.\d\d\)"
        wanted = ", ".join(side.format(name) for name in ("reference", "eager", "triton"))
        assert re.fullmatch(f"{case}: {wanted}", line)
