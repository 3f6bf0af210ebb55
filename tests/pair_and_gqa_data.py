"""The GQA and NLVR2 fixtures with images to them: plain squares, whose colours the texts speak of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from PIL import Image
from tiny import COLOURS, tiny_config

FIXTURES = Path(__file__).parent / "fixtures"


def write_gqa(folder: Path) -> Path:
    """The annotations in ``folder`` itself, and images in images/: that of 23000NN has colour NN modulo 4."""
    shutil.copytree(FIXTURES / "gqa", folder)
    (folder / "images").mkdir()
    for number in range(1, 15):
        colour = list(COLOURS.values())[number % 4]
        Image.new("RGB", (24, 20), colour).save(folder / "images" / f"23{number:05d}.jpg")
    return folder


def write_nlvr2(folder: Path) -> Path:
    """The annotations in ``folder`` itself, and images in images/, as in the authors' archives."""
    shutil.copytree(FIXTURES / "nlvr2", folder)
    for split in ("train", "dev", "test1"):
        for row in map(json.loads, (folder / f"{split}.json").read_text().splitlines()):
            place = folder / "images" / split / str(row.get("directory", ""))
            place.mkdir(parents=True, exist_ok=True)
            pair = row["identifier"].rpartition("-")[0]
            for number, side in enumerate(("left_url", "right_url")):
                colour = COLOURS[Path(row[side]).stem]
                Image.new("RGB", (24, 20), colour).save(place / f"{pair}-img{number}.png")
    return folder


def config_of(tiny: Path, folder: Path, output: Path, task: str, **settings):
    """A few steps of ``task`` on the data in ``folder`` with the backbones in ``tiny``."""
    given = {"annotations": str(folder), "images": str(folder / "images"), "max_text_length": 36}
    return tiny_config(tiny, output, task, **given | settings)
