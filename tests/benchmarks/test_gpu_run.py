"""benchmarks/gpu_run.sh as far as it goes without a GPU: every program it calls exists and takes --help."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script")


def gpu_run(*args: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_run.sh"), *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
def test_dry_run_of_the_demo() -> None:
    done = gpu_run("--dry-run", "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    for called in ("routingvl demo --quick", "routingvl train", "routingvl evaluate"):
        assert called in done.stdout


# Of the packages that routingvl or its tests use, those that a machine with torch, transformers, PEFT and pytest lacks.
OPTIONAL = "hypothesis matplotlib pycocoevalcap pycocotools tensorboard wandb".split()


@pytest.mark.slow
def test_every_phase_starts_with_few_packages(tmp_path: Path) -> None:
    """The phases' programs and tests import nothing that a bare GPU machine may lack."""
    # Python imports this module at its start, in every program of the script.
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n")
    bare = {"PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = gpu_run("--dry-run", **bare)
    assert done.returncode == 0, done.stdout + done.stderr
    for called in ("benchmarks.run --suite gpu", "compute-sanitizer --tool racecheck", "benchmarks.tune --output"):
        assert called in done.stdout
    assert "benchmarks.training_speed --device cuda --size large" in done.stdout
    assert "=== demo\n+ " in done.stdout
    calls = [shlex.split(line)[1:] for line in done.stdout.splitlines() if " -m pytest -m gpu " in line]
    assert len(calls) == 3
    environment = {**os.environ, **bare}
    for call in calls:
        files = [word for word in call if word.startswith("tests/")]
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout + found.stderr


def test_a_program_that_does_not_start_fails_the_dry_run(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    assert gpu_run("--dry-run", "golden", PYTHON=str(broken)).returncode == 1


FAKE = """#!/bin/sh
[ "$1" != -c ] || exit 0
echo "share $ROUTINGVL_TEST_SHARD of $*"
[ "$ROUTINGVL_TEST_SHARD" != "$BAD" ] || exit 1
[ "$ROUTINGVL_TEST_SHARD" != 2/3 ] || exit 5
"""


@pytest.mark.parametrize(("bad", "status"), [("", 0), ("1/3", 1)])
def test_tests_are_shared_out_to_processes(tmp_path: Path, bad: str, status: int) -> None:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(FAKE)
    python.chmod(0o755)
    done = gpu_run("golden", PYTHON=str(python), OUT=str(out), JOBS="3", BAD=bad)
    assert done.returncode == status, done.stdout + done.stderr
    lines = [line for line in (out / "golden.log").read_text().splitlines() if line.startswith("share")]
    assert [line.split()[1] for line in lines] == ["0/3", "1/3", "2/3"]
    assert all("-m pytest -m gpu -q" in line and line.endswith("-k golden") for line in lines)
    assert (out / "golden.done").exists() is (status == 0)
    assert not list(out.glob("share*"))


def test_shares_are_all_tests_once(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [SimpleNamespace(path=Path(f"test_{n}.py"), get_closest_marker=lambda name: None) for n in range(10)]

    def share(number: int) -> list[SimpleNamespace]:
        monkeypatch.setenv("ROUTINGVL_TEST_SHARD", f"{number}/3")
        items = list(whole)
        list(conftest.pytest_collection_modifyitems(items))
        return items

    shares = [share(number) for number in range(3)]
    assert [len(items) for items in shares] == [4, 3, 3]
    assert {item.path for items in shares for item in items} == {item.path for item in whole}


def test_bad_use(tmp_path: Path) -> None:
    done = gpu_run("--dry-run", "goldn")
    assert done.returncode == 2
    assert "unknown phase goldn; there are: ceilings tests" in done.stderr
    if not torch.cuda.is_available():
        done = gpu_run("golden", OUT=str(tmp_path / "out"))
        assert done.returncode == 2
        assert "no CUDA device" in done.stderr
        assert not (tmp_path / "out").exists()
