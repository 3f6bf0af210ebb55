"""Ctrl-C, SIGTERM, SIGHUP and dead workers: what there is gets saved, one sentence, exit status 130."""

import importlib
import json
import os
import signal
import time
from pathlib import Path

import pytest
from children import Child, Meeting, at_step, command, config_file, leftovers
from training_runs import assert_same_weights, weights

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
SETTINGS = {"max_steps": 6, "eval_every": 0}
by_signal = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    command("train", "--config", config_file(tiny, run, **SETTINGS)).assert_fine()
    return run


def assert_interrupted(outcome) -> None:
    assert outcome.status == 130, outcome
    assert "Traceback" not in outcome.err, outcome
    assert "routingvl: interrupted" in outcome.err, outcome


def assert_finishes_as(run: Path, whole: Path) -> None:
    command("train", "--resume", run).assert_fine()
    assert leftovers(run) == []
    assert_same_weights(weights(run), weights(whole))


def started(run: Path, tiny: Path, step: int, **settings: object) -> Child:
    """A run that is at ``step`` for half a second."""
    config, meeting = config_file(tiny, run, **{**SETTINGS, **settings}), Meeting()
    child = Child("train", "--config", config, before=at_step(step, lambda: meeting.reach(0.5)))
    meeting.wait_for(child)
    meeting.let_go()
    return child


def slow(module: str, name: str, meeting: Meeting):
    """A patch: this function of this module waits for a while before it does its work."""

    def patch() -> None:
        place = importlib.import_module(module)
        original = getattr(place, name)

        def waiting(*args, **kwargs):
            meeting.reach(2)
            return original(*args, **kwargs)

        setattr(place, name, waiting)

    return patch


@by_signal
def test_in_training(number: signal.Signals, tiny: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "place" / "run"
    child = started(run, tiny, step=3)
    child.send(number)
    assert_interrupted(child.wait())
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert 3 <= max(logged) < SETTINGS["max_steps"]
    assert_finishes_as(run, whole)


@by_signal
def test_the_whole_group_with_workers(number: signal.Signals, tiny: Path, tmp_path: Path, whole: Path) -> None:
    """As Ctrl-C in a terminal and the end of a batch job do."""
    run = tmp_path / "place" / "run"
    child = started(run, tiny, step=3, **{"data.workers": 2})
    child.send(number, group=True)
    assert_interrupted(child.wait())
    assert_finishes_as(run, whole)


@by_signal
@pytest.mark.parametrize("place", ["build_task", "make_accelerator"])
def test_before_the_first_step(number: signal.Signals, place: str, tiny: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "place" / "run"
    config, meeting = config_file(tiny, run, **SETTINGS), Meeting()
    child = Child("train", "--config", config, before=slow("routingvl.train", place, meeting))
    meeting.wait_for(child)
    child.send(number)
    assert_interrupted(child.wait())
    assert leftovers(run) == []
    command("train", "--config", config).assert_fine()
    assert_same_weights(weights(run), weights(whole))


@by_signal
def test_other_commands(number: signal.Signals, whole: Path, tmp_path: Path) -> None:
    """Evaluation writes nothing when it is stopped."""
    meeting = Meeting()
    patch = slow("routingvl.evaluate", "predict_dataset", meeting)
    child = Child("evaluate", whole, "--output", tmp_path / "out", "--quiet", before=patch)
    meeting.wait_for(child)
    child.send(number)
    assert_interrupted(child.wait())
    assert not (tmp_path / "out").exists() or leftovers(tmp_path / "out") == []


def workers_of(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if not children.exists():
        pytest.skip("needs /proc")
    return [int(child) for child in children.read_text().split()]


def test_a_killed_data_worker(tiny: Path, tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "place" / "run"
    child = started(run, tiny, step=2, **{"data.workers": 2, "save_every": 100, "max_steps": 40})
    for worker in workers_of(child.pid):
        os.kill(worker, signal.SIGKILL)
    outcome = child.wait()
    assert outcome.status in (1, 2), outcome
    outcome.assert_refused("worker", status=outcome.status)
    state = json.loads((run / "state" / "training_state.json").read_text())
    assert state["step"] >= 2
    assert leftovers(run) == []


def test_a_second_signal_acts_at_once(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "place" / "run"
    child = started(run, tiny, step=1, max_steps=2000)
    child.send(signal.SIGTERM)
    time.sleep(0.05)
    child.send(signal.SIGTERM)
    assert child.wait(20).status in (130, -signal.SIGTERM)
