"""The run folder: locked, replaced without loss, tidied up after killed runs, never emptied of what is not its own."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
from training_runs import run, weights

from routingvl.predict import Predictor
from routingvl.training import folder_lock
from routingvl.training.folder_lock import FolderLock
from routingvl.training.run_folder import RunError, RunFolder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of two steps that nobody changes."""
    return run(tiny, tmp_path_factory.mktemp("finished") / "run", "vqa", max_steps=2).run_dir


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------------------------------------------------- replacing


def test_files_of_others_stay_when_a_run_is_replaced(tiny, folder):
    mine = ("notes.txt", "best/notes.txt", "data/train.json", "eval-test/notes.txt", "cache/features", "tokenizer/mine")
    for name in mine:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("years of work")
    for name in ("eval-test/metrics.json", "eval-test/vqa_results.json", "tensorboard/x/events"):  # of the old run
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    before = weights(folder)
    run(tiny, folder, "vqa", overwrite=True, max_steps=3)
    assert not any((before[name] == value).all() for name, value in weights(folder).items())
    found = contents(folder)
    assert all(found[name] == b"years of work" for name in mine)
    assert not [
        name for name in found if "metrics.json" in name.split("/")[-1:] or "results" in name or "events" in name
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trackers": ["wandb"]}, "wandb is not installed"),
        ({"images": "/nowhere"}, "does not exist"),
        ({"vision": "/nowhere"}, "nowhere"),
        ({"train_split": "nosuch"}, "nosuch"),
        ({"train.batch_size": 7, "accumulation": 2}, "not divisible"),
        ({"lr": 1e30, "max_steps": 20}, "loss is (nan|inf)|no longer finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_whatever_fails_before_the_new_run_has_saved_leaves_the_old_one(tiny, folder, settings, message):
    before = contents(folder)
    with pytest.raises((ValueError, OSError, FloatingPointError), match=message):
        run(tiny, folder, "vqa", overwrite=True, **settings)
    assert contents(folder) == before


def test_inputs_in_the_folder_are_not_replaced(tiny, folder):
    before = contents(folder)
    with pytest.raises(RunError, match=r"would replace .*label2ans.json, which the new run needs"):
        run(tiny, folder, "vqa", overwrite=True, answers=str(folder / "label2ans.json"))
    assert contents(folder) == before


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"made_by": "routingvl", "format": 99}'])
def test_a_folder_that_only_looks_like_a_run_is_not_replaced(tiny, tmp_path, text):
    (tmp_path / "config.yaml").write_text("mine: 1")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run.json"):
        run(tiny, tmp_path, "vqa", overwrite=True)
    assert set(contents(tmp_path)) == {"config.yaml", "run.json"}


def test_killed_at_any_rename_while_replacing_the_old_run_comes_back(tiny, folder, monkeypatch):
    """What stands on the disk when a rename does not come back is what a kill leaves there."""
    before, rename = contents(folder), os.replace

    class Killed(BaseException):
        pass

    def killed_at(stop):
        count = 0

        def replace(*paths):
            nonlocal count
            if (count := count + 1) > stop:
                raise Killed
            rename(*paths)

        return replace

    finished = False
    for stop in range(100):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed_at(stop))
            try:
                RunFolder(folder).move_aside()
                finished = True
            except Killed:
                pass
        (folder / "config.yaml").write_text("of the new run") if finished else None
        with monkeypatch.context() as patch:  # killed again while it is put back
            patch.setattr(os, "replace", killed_at(stop % 7))
            with pytest.raises(Killed) if stop % 7 < stop else nullcontext():
                RunFolder(folder).tidy()
        RunFolder(folder).tidy()
        assert contents(folder) == before, stop
        if finished:
            break
    assert finished


def test_the_old_run_goes_once_the_new_one_has_saved(folder):
    run_folder = RunFolder(folder)
    run_folder.move_aside()
    assert not run_folder.has_state()
    run_folder.state.mkdir()
    (run_folder.state / "training_state.json").touch()  # killed after the new run's first save
    run_folder.tidy()
    assert set(contents(folder)) == {"state/training_state.json"}


# ------------------------------------------------------------------------------------------------------ killed runs


def test_leftovers_of_killed_runs_are_removed(tiny, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.yaml.f582abbe5b9f.tmp").touch()  # all that a run killed at its first file leaves
    result = run(tiny, folder, "vqa", max_steps=2)
    for name in (".last.0123456789ab.tmp", "state/.training_state.json.0123456789ab.tmp"):
        (folder / name).touch()
    run(tiny, folder, "vqa", max_steps=2, resume=True)
    assert not [name for name in contents(folder) if "/." in f"/{name}"]
    assert result.steps == 2


def test_a_state_that_was_moved_aside_when_the_run_was_killed_is_found(tiny, folder):
    (folder / "state").rename(folder / ".state.0123456789ab.old")
    (folder / ".state.fedcba987654.tmp").mkdir()
    assert run(tiny, folder, "vqa", max_steps=2, resume=True).steps == 2


def test_a_run_that_saved_nothing_may_be_started_again(tiny, tmp_path):
    with pytest.raises(FloatingPointError):
        run(tiny, tmp_path / "run", "vqa", lr=1e30, max_steps=20)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert run(tiny, tmp_path / "run", "vqa", max_steps=2).steps == 2


# ----------------------------------------------------------------------------------------------------------- locking


HOLD = """
import sys
from pathlib import Path
from routingvl.training.folder_lock import FolderLock
FolderLock(Path(sys.argv[1])).acquire()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(folder):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        yield process
        process.kill()


@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_folder_in_use_is_refused_naming_the_holder(tiny, folder, holder, how):
    before = contents(folder)
    with pytest.raises(RunError, match=rf"in use by process {holder.pid} on .* since"):
        run(tiny, folder, "vqa", max_steps=2, **{how: True})
    assert contents(folder) == before


@pytest.mark.parametrize("locks", [True, False])
def test_the_lock_of_a_dead_process_is_taken_over(folder, holder, locks, monkeypatch):
    if not locks:  # a file system without
        monkeypatch.setattr(folder_lock, "fcntl", None)
        with pytest.raises(RunError, match=rf"in use by process {holder.pid}"), RunFolder(folder).locked():
            pass
    holder.kill()
    holder.wait()
    assert (folder / ".lock").is_file()
    with RunFolder(folder).locked():
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
    assert not (folder / ".lock").exists()


def test_without_locks_the_process_of_another_machine_counts_as_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "fcntl", None)
    (tmp_path / ".lock").write_text("process 1 on elsewhere since 2026-01-01 00:00:00")
    assert "elsewhere" in FolderLock(tmp_path / ".lock").acquire()
    (tmp_path / ".lock").write_text("what is this?")
    assert FolderLock(tmp_path / ".lock").acquire() is None


def test_one_process_does_not_train_twice_into_one_folder(tiny, tmp_path):
    def again(record):
        if record["step"] > 1:  # saved
            return
        with pytest.raises(RunError, match="in use by this process"):
            run(tiny, tmp_path / "run", "vqa")

    run(tiny, tmp_path / "run", "vqa", max_steps=2, log=again)


def test_a_folder_made_for_a_lock_goes_again(tmp_path):
    folder = tmp_path / "a" / "b"
    with RunFolder(folder).locked():
        assert folder.is_dir()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_config_of_which_a_part_is_gone_is_refused(folder, keep):
    path = folder / "config.yaml"
    text = path.read_text()
    path.write_text(text[: int(len(text) * keep)] or "{}")
    with pytest.raises(ValueError, match=r"config\.yaml") as found:
        RunFolder(folder).load_config()
    assert keep or "lacks data." in str(found.value)


@pytest.mark.parametrize("name", ["label2ans.json", "tokenizer/tokenizer_config.json", "preprocessor_config.json"])
def test_a_run_predicts_only_with_the_files_that_it_was_trained_with(folder, name):
    RunFolder(folder).check_unchanged()
    (folder / name).write_text("[]")
    with pytest.raises(RunError, match=f"{name} was edited or deleted; put the files back"):
        Predictor(folder)


def test_a_run_predicts_only_with_the_settings_that_decided_its_training(folder):
    path = folder / "config.yaml"
    path.write_text(re.sub("max_text_length: .*", "max_text_length: 5", path.read_text()))
    with pytest.raises(RunError, match=r"data\.max_text_length was \d+ and is now 5"):
        Predictor(folder)
