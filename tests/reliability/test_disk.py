"""Full disks, limits on a file's size and read-only folders: one sentence, old files intact, nothing half-written."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import Child, at_step, command, config_file, files_below, leftovers, obey_permissions
from training_runs import assert_same_weights, weights

SHORT = {"max_steps": 4, "save_every": 1, "eval_every": 2}


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which nobody changes."""
    run = tmp_path_factory.mktemp("finished") / "run"
    command("train", "--config", config_file(tiny, run, **SHORT)).assert_fine()
    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, free: int = 0) -> Path:
    """Leave so many bytes free; the file to remove for more."""
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(ballast, max(0, ballast.stat().st_size - free))
    return ballast


def largest(size: int):
    """In a child: no file grows beyond ``size`` bytes, which is how a full disk looks from inside."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [4_000, 12_000, 22_000])
def test_training_where_files_cannot_grow(size: int, tiny: Path, tmp_path: Path, finished: Path) -> None:
    run = tmp_path / "place" / "run"
    config = config_file(tiny, run, **SHORT)
    command("train", "--config", config, before=largest(size)).assert_refused(str(run))
    assert leftovers(run) == []
    again = command("train", "--config", config)
    if again.status != 0:
        again.assert_refused("--overwrite")
        command("train", "--config", config, "--overwrite").assert_fine()
    assert_same_weights(weights(run), weights(finished))


@pytest.mark.parametrize("size", [4_000, 12_000, 22_000])
def test_resuming_where_files_cannot_grow(size: int, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "place" / "run"
    command("train", "--config", config_file(tiny, run, **SHORT)).assert_fine()
    longer = ("--train.max_steps", "4", "--train.save_every", "1")
    state, before = run / "state", files_below(run)
    stopped = command("train", "--resume", run, *longer, before=largest(size))
    if stopped.status != 0:  # a finished run has little to write
        stopped.assert_refused(str(run))
    assert leftovers(run) == []
    assert files_below(state) == {
        name.removeprefix("state/"): data for name, data in before.items() if name.startswith("state/")
    }
    assert_same_weights(weights(run), weights(run))
    command("train", "--resume", run).assert_fine()


@pytest.mark.parametrize("free", [0, 40_000, 120_000])
def test_training_on_a_full_disk(free: int, small_disk: Path, tiny: Path, tmp_path: Path, finished: Path) -> None:
    run, config = small_disk / "run", config_file(tiny, tmp_path / "configs" / "run", **SHORT)
    line = ("train", "--config", config, "--output_dir", run)
    ballast = fill(small_disk, free)
    command(*line).assert_refused(str(run))
    assert leftovers(run) == []
    ballast.unlink()
    again = command("train", "--resume", run)
    if again.status != 0:
        again.assert_refused()
        command(*line, "--overwrite").assert_fine()
    assert_same_weights(weights(run), weights(finished))


@pytest.mark.parametrize(
    "args",
    [
        ("evaluate", "{run}", "--output", "{new}", "--quiet"),
        ("export", "{run}", "{new}"),
        ("cache-features", "--config", "{config}", "--feature-cache", "{new}"),
        ("prepare-data", "coco", "--dataset_coco", "{tiny}/data/dataset_coco.json", "--output", "{new}"),
    ],
    ids=lambda args: args[0],
)
@pytest.mark.parametrize("free", [0, 8_192])
def test_other_commands_on_a_full_disk(args, free: int, small_disk: Path, tiny: Path, finished: Path) -> None:
    new = small_disk / "new"
    places = {"run": finished, "new": new, "config": finished / "config.yaml", "tiny": tiny}
    line = [arg.format(**places) for arg in args]
    before = files_below(finished)
    ballast = fill(small_disk, free)
    stopped = command(*line)
    if stopped.status != 0:
        stopped.assert_refused(str(new))
        assert leftovers(new) == []
    assert free or stopped.status == 2
    assert files_below(finished) == before
    ballast.unlink()
    command(*line).assert_fine()


def test_evaluate_into_the_run_keeps_the_old_results(small_disk: Path, finished: Path) -> None:
    run = shutil.copytree(finished, small_disk / "run")
    line = ("evaluate", run, "--split", "val", "--quiet")
    command(*line).assert_fine()
    before = files_below(run / "eval-val")
    fill(small_disk)
    command(*line, "--limit", "2").assert_refused("eval-val")
    assert files_below(run / "eval-val") == before


@pytest.mark.parametrize("place", ["file", "read-only", "/proc"])
def test_a_run_folder_that_cannot_be_made(place: str, tiny: Path, tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    if place == "file":
        parent.write_text("a file")
    elif place == "read-only":
        parent.mkdir(mode=0o555)
    else:
        parent = Path("/proc/routingvl")
    config = config_file(tiny, tmp_path / "configs" / "run", **SHORT)
    refused = command("train", "--config", config, "--output_dir", parent / "run", before=obey_permissions)
    refused.assert_refused(str(parent))


def test_a_run_folder_that_becomes_read_only(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "place" / "run"
    config = config_file(tiny, run, **SHORT)

    def lock() -> None:
        obey_permissions()
        for folder in (run, *(path for path in run.iterdir() if path.is_dir())):
            folder.chmod(0o555)

    stopped = command("train", "--config", config, before=at_step(2, lock))
    for folder in (run, *(path for path in run.iterdir() if path.is_dir())):
        folder.chmod(0o755)
    stopped.assert_refused(str(run))
    command("train", "--resume", run).assert_fine()
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4
    assert leftovers(run) == []


def test_prepared_data_are_replaced_together(tiny: Path, tmp_path: Path) -> None:
    """Killed at any move, prepare-data leaves the old files or the new ones, never some of each."""
    from test_kills import dies_at

    source = json.loads((tiny / "data" / "dataset_coco.json").read_text())
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(source))
    for image in source["images"]:
        for sentence in image["sentences"]:
            sentence["raw"] += " again"
    new.write_text(json.dumps(source))
    expected = []
    for number, file in enumerate((old, new)):
        folder = tmp_path / f"expected-{number}"
        command("prepare-data", "coco", "--dataset_coco", file, "--output", folder).assert_fine()
        expected.append(files_below(folder))
    number = 0
    while True:
        number += 1
        folder = tmp_path / f"{number}" / "data"
        command("prepare-data", "coco", "--dataset_coco", old, "--output", folder).assert_fine()
        line = ("prepare-data", "coco", "--dataset_coco", new, "--output", folder)
        status = command(*line, before=dies_at(number, after=False)).status
        whole = {name: data for name, data in files_below(folder).items() if not name.endswith(".tmp")}
        manifest = json.loads(whole["manifest.json"]) if "manifest.json" in whole else {}
        assert whole in expected or not manifest, f"killed at move {number}: a manifest over other files"
        if status == 0:
            assert number > 1
            return
        command(*line).assert_fine()
        assert files_below(folder) == expected[1]


def test_the_child_of_these_tests_can_be_stopped() -> None:
    """A test that passes because nothing ran would be none."""
    child = Child(task=lambda: print("hello"))
    assert child.wait().out == "hello\n"
