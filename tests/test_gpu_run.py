"""benchmarks/gpu_run.sh as far as it goes without a GPU: every program it calls exists and takes --help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script")


def gpu_run(*args: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_run.sh"), *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.mark.slow
def test_dry_run_finds_every_program() -> None:
    done = gpu_run("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    absent = {line.split()[1] for line in done.stdout.splitlines() if "is not in this checkout" in line}
    assert not {name for name in absent if (ROOT / name).exists()}
    for called in ("pytest -m gpu", "benchmarks.run", "compute-sanitizer --tool racecheck", "routingvl train"):
        assert called in done.stdout
    assert "benchmarks.training_speed --device cuda --size large" in done.stdout
    assert "benchmarks.tune --output" in done.stdout


def test_a_program_that_does_not_start_fails_the_dry_run(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    assert gpu_run("--dry-run", "golden", PYTHON=str(broken)).returncode == 1


def test_bad_use(tmp_path: Path) -> None:
    done = gpu_run("--dry-run", "goldn")
    assert done.returncode == 2
    assert "unknown phase goldn; there are: ceilings tests" in done.stderr
    if not torch.cuda.is_available():
        done = gpu_run("golden", OUT=str(tmp_path / "out"))
        assert done.returncode == 2
        assert "no CUDA device" in done.stderr
        assert not (tmp_path / "out").exists()
