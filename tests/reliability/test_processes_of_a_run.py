"""Two processes of one run: bad data end in one sentence of the library, not in torch.distributed's own."""

import shutil
from pathlib import Path

import pytest
from processes import needs_gloo, run_in_processes
from tiny import tiny_config

from routingvl.train import train

pytestmark = [pytest.mark.slow, needs_gloo]


def damaged(tiny: Path, folder: Path, split: str, good: int) -> Path:
    """The tiny inputs, of whose images in this split all but ``good`` are unreadable."""
    shutil.copytree(tiny, folder)
    first = {"train": 101, "val": 113}[split]
    count = {"train": 12, "val": 4}[split]
    for number in range(first + good, first + count):
        (folder / f"data/val2014/COCO_val2014_{number:012d}.jpg").write_text("no image")
    return folder


def fails_in_words(rank: int, folder: Path) -> None:
    config = tiny_config(folder / "inputs", folder / "run", "vqa", **{"data.on_bad_image": "skip", "eval_every": 2})
    message = None
    try:
        train(config, log="quiet")
    except (ValueError, OSError) as error:
        message = str(error)
        (folder / f"refused-{rank}").touch()
    assert message is None or "image" in message, message


@pytest.mark.parametrize(("split", "good"), [("train", 1), ("train", 0), ("val", 0)], ids=str)
def test_hardly_any_image_can_be_read(split: str, good: int, tiny: Path, tmp_path: Path) -> None:
    """Both processes end alike: with the error, or (where each has something) with a run."""
    damaged(tiny, tmp_path / "inputs", split, good)
    run_in_processes(fails_in_words, tmp_path)
    refused = [(tmp_path / f"refused-{rank}").exists() for rank in range(2)]
    assert refused[0] == refused[1]
    assert refused[0] or (tmp_path / "run" / "last").is_dir()
