"""Two programs on one run folder, and --overwrite: nothing is removed before everything is checked, and only a run's
own files.
"""

import shutil
import time
from pathlib import Path

import pytest
from children import Child, Meeting, at_step, command, config_file, files_below, leftovers
from training_runs import assert_same_weights, weights

SETTINGS = {"max_steps": 4, "eval_every": 2, "save_every": 1}


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    command("train", "--config", config_file(tiny, run, **SETTINGS)).assert_fine()
    return run


@pytest.fixture
def own_run(finished: Path, tiny: Path, tmp_path: Path) -> Path:
    """A finished run at another place, whose config names that place."""
    run = tmp_path / "place" / "run"
    command("train", "--config", config_file(tiny, run, **SETTINGS)).assert_fine()
    return run


def held(run: Path, config: Path, *more: str, at: int = 1) -> tuple[Child, Meeting]:
    """A run that waits at this step until it is let go."""
    meeting = Meeting()
    child = Child("train", "--config", config, *more, before=at_step(at, meeting.reach))
    meeting.wait_for(child)
    return child, meeting


@pytest.mark.parametrize("second", [(), ("--overwrite",), ("--resume", "{run}")], ids=["new", "overwrite", "resume"])
def test_a_second_program_is_refused_and_told_who_has_the_folder(
    second: tuple[str, ...], tiny: Path, tmp_path: Path, finished: Path
) -> None:
    run = tmp_path / "place" / "run"
    config = config_file(tiny, run, **SETTINGS)
    child, meeting = held(run, config, at=2)  # it has saved step 1
    line = [arg.format(run=run) for arg in second]
    try:
        args = line if "--resume" in line else ["--config", config, *line]
        command("train", *args).assert_refused(str(run), str(child.pid))
    finally:
        meeting.let_go()
    child.wait().assert_fine()
    assert_same_weights(weights(run), weights(finished))
    assert leftovers(run) == []


def test_two_started_at_once(tiny: Path, tmp_path: Path, finished: Path) -> None:
    """One runs, undisturbed; the other says why it does not."""
    run = tmp_path / "place" / "run"
    config = config_file(tiny, run, **SETTINGS)
    children = [Child("train", "--config", config) for _ in range(2)]
    outcomes = sorted((child.wait() for child in children), key=lambda outcome: outcome.status)
    outcomes[0].assert_fine()
    outcomes[1].assert_refused(str(run))
    assert_same_weights(weights(run), weights(finished))


def test_the_lock_of_a_dead_program_is_taken_over(tiny: Path, tmp_path: Path, finished: Path) -> None:
    run = tmp_path / "place" / "run"
    config = config_file(tiny, run, **SETTINGS)
    child, meeting = held(run, config)
    child.send(9)
    child.wait()
    meeting.let_go()
    again = command("train", "--config", config)
    if again.status != 0:
        again.assert_refused("--overwrite")
        command("train", "--config", config, "--overwrite").assert_fine()
    assert_same_weights(weights(run), weights(finished))


BROKEN = {
    "a missing tracker": ("--train.trackers", '["comet_ml"]'),
    "missing annotations": ("--data.annotations", "/nowhere"),
    "a missing backbone": ("--model.vision", "/nowhere"),
    "a split that is not there": ("--data.val_split", "nothing"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_overwrite_checks_everything_before_it_removes_anything(what: str, own_run: Path) -> None:
    before = files_below(own_run)
    config = own_run / "config.yaml"
    command("train", "--config", config, "--overwrite", *BROKEN[what]).assert_refused()
    assert files_below(own_run) == before


def test_overwrite_keeps_the_old_run_until_the_new_one_has_saved(own_run: Path, finished: Path) -> None:
    """Killed at its first step: the old run is there again when something is started next."""
    child, meeting = held(own_run, own_run / "config.yaml", "--overwrite", "--train.save_every", "100")
    child.send(9)
    child.wait()
    meeting.let_go()
    command("train", "--resume", own_run).assert_fine()
    assert_same_weights(weights(own_run), weights(finished))


def test_overwrite_leaves_the_files_of_others(own_run: Path) -> None:
    others = {"notes.txt": b"mine", "best/notes.txt": b"mine too", "figures/plot.svg": b"<svg/>"}
    for name, content in others.items():
        (own_run / name).parent.mkdir(exist_ok=True)
        (own_run / name).write_bytes(content)
    command("train", "--config", own_run / "config.yaml", "--overwrite").assert_fine()
    after = files_below(own_run)
    assert {name: after.get(name) for name in others} == others


@pytest.mark.parametrize("content", ["name: another program\n", "task: vqa\n", ""], ids=["other", "alike", "empty"])
def test_a_folder_that_merely_holds_a_config_is_not_overwritten(content: str, tiny: Path, tmp_path: Path) -> None:
    place = tmp_path / "place" / "run"
    config = config_file(tiny, place, **SETTINGS)
    place.mkdir()
    (place / "config.yaml").write_text(content)
    (place / "thesis.tex").write_text("years of work")
    before = files_below(place)
    command("train", "--config", config, "--overwrite").assert_refused(str(place))
    assert files_below(place) == before


def test_overwrite_keeps_data_and_features_inside_the_run_folder(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "place" / "run"
    data, features = run / "data", run / "features"
    shutil.copytree(tiny / "data", data)
    elsewhere = tmp_path / "configs" / "run"
    places = {"data.annotations": str(data), "data.images": str(data), "data.feature_cache": str(features)}
    config = config_file(tiny, elsewhere, **SETTINGS, **places)
    line = ("train", "--config", config, "--output_dir", run)
    first = command(*line)
    if first.status != 0:  # a folder that holds data may be refused for a run
        first.assert_refused(str(run))
        assert (data / "karpathy_train.json").is_file()
        return
    kept = {**files_below(data), **files_below(features)}
    command(*line, "--overwrite").assert_fine()
    assert {**files_below(data), **files_below(features)} == kept


def test_a_run_beside_an_interrupted_one_is_independent(tiny: Path, tmp_path: Path, finished: Path) -> None:
    one, two = tmp_path / "place" / "one", tmp_path / "place" / "two"
    child, meeting = held(one, config_file(tiny, one, **SETTINGS))
    command("train", "--config", config_file(tiny, two, **SETTINGS)).assert_fine()
    time.sleep(0.01)
    meeting.let_go()
    child.wait().assert_fine()
    for run in (one, two):
        assert_same_weights(weights(run), weights(finished))
