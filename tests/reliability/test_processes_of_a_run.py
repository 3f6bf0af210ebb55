"""Two processes of one run: bad data end in one sentence of the library, not in a traceback of torch.distributed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from children import config_file, leftovers
from processes import needs_gloo

pytestmark = [pytest.mark.slow, needs_gloo]
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "routingvl")
IMAGES = {"train": range(101, 113), "val": range(113, 117)}


def only(tiny: Path, folder: Path, split: str, good: int) -> Path:
    """The tiny inputs, of whose images in this split all but ``good`` are unreadable."""
    shutil.copytree(tiny, folder)
    for number in IMAGES[split][good:]:
        (folder / f"data/val2014/COCO_val2014_{number:012d}.jpg").write_text("no image")
    return folder


@pytest.mark.parametrize(("split", "good"), [("train", 1), ("train", 0), ("val", 0)], ids=str)
def test_hardly_any_image_can_be_read(split: str, good: int, tiny: Path, tmp_path: Path) -> None:
    """The run ends with one sentence, or goes on with what there is."""
    run = tmp_path / "place" / "run"
    inputs = only(tiny, tmp_path / "inputs", split, good)
    config = config_file(inputs, run, **{"data.on_bad_image": "skip", "eval_every": 2, "save_every": 1})
    done = subprocess.run(
        [*LAUNCH, "train", "--config", str(config)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False, timeout=200,
    )  # fmt: skip
    assert "routingvl/training" not in done.stderr, done.stderr[
        -3000:
    ]  # no traceback of ours; the launcher has its own
    if done.returncode == 0:
        assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6
    else:
        sentences = {line for line in done.stderr.splitlines() if line.startswith("routingvl: ")}
        assert sentences, done.stderr[-3000:]
        assert all("image" in sentence or "share" in sentence for sentence in sentences), sentences
    assert leftovers(run) == []
