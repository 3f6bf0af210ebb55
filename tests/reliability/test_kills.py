"""A training run that is killed anywhere goes on without help, to the results of one that was not."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from children import Child, command, config_file, leftovers
from training_runs import assert_same_weights, weights

SETTINGS = {"max_steps": 4, "eval_every": 2, "save_every": 1}
MOVES = ((os, "replace"), (os, "rename"), (shutil, "rmtree"))
RANDOM_KILLS = 20
pytestmark = pytest.mark.slow  # the whole file runs about a hundred small trainings


def records(run: Path) -> list[dict]:
    """The log without its clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines]


def names(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    command("train", "--config", config_file(tiny, run, **SETTINGS)).assert_fine()
    return run


@pytest.fixture(scope="module")
def duration(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    begin = time.monotonic()
    command("train", "--config", config_file(tiny, tmp_path_factory.mktemp("timed") / "run", **SETTINGS)).assert_fine()
    return time.monotonic() - begin


def assert_goes_on(run: Path, config: Path, whole: Path) -> None:
    """Resumed, or started again where nothing had been saved: complete, clean, and equal to the whole run."""
    resumed = command("train", "--resume", run)
    if resumed.status != 0:
        resumed.assert_refused()  # nothing to resume, in one sentence
        started = command("train", "--config", config)
        if started.status != 0:
            started.assert_refused("--overwrite")
            command("train", "--config", config, "--overwrite").assert_fine()
    assert leftovers(run) == []
    assert names(run) == names(whole)
    assert records(run) == records(whole)
    for name in ("last", "best"):
        assert_same_weights(weights(run, name), weights(whole, name))


def dies_at(number: int, after: bool):
    """Patch every move and removal: at the ``number``-th of them the process kills itself, before it or after."""
    calls = 0

    def patched(original):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            mine = calls == number
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    def patch() -> None:
        for module, name in MOVES:
            setattr(module, name, patched(getattr(module, name)))

    return patch


@pytest.mark.timeout(900)
def test_killed_at_every_rename(tiny: Path, tmp_path: Path, whole: Path) -> None:
    """Until the run gets through alive: then every move and removal of a run has had its kill, before and after it."""
    number = 0
    while True:
        number += 1
        for after in (False, True):
            run = tmp_path / f"{number}-{after}" / "run"
            config = config_file(tiny, run, **SETTINGS)
            killed = command("train", "--config", config, before=dies_at(number, after))
            if killed.status == 0:
                assert number > 10, "a run that saves four times moves more files than that"
                return
            assert killed.status == -signal.SIGKILL, killed
            assert_goes_on(run, config, whole)
            shutil.rmtree(run.parent)


@pytest.mark.parametrize("attempt", range(RANDOM_KILLS))
def test_killed_at_a_random_moment(attempt: int, tiny: Path, tmp_path: Path, whole: Path, duration: float) -> None:
    run = tmp_path / "place" / "run"
    config = config_file(tiny, run, **SETTINGS)
    child = Child("train", "--config", config)
    time.sleep(random.Random(attempt).random() * duration)
    child.send(signal.SIGKILL)
    assert child.wait().status in (0, -signal.SIGKILL)
    assert_goes_on(run, config, whole)
