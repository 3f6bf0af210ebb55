"""``routingvl caption``: image files in, captions out."""

from __future__ import annotations

import json
from collections.abc import Sequence

from routingvl.commands import RunParser

EXAMPLE = "routingvl caption runs/caption-lora photo1.jpg photo2.jpg --eval.num_beams 3"


def run(args: Sequence[str]) -> int:
    """Print one line per image: its path, a tab, its caption."""
    parser = RunParser("caption", "Caption image files with the adapter of a captioning run.", EXAMPLE)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options, predictor = parser.predictor(args)
    for path, text in zip(options.images, predictor.caption(options.images), strict=True):
        print(json.dumps({"image": path, "caption": text}, ensure_ascii=False) if options.json else f"{path}\t{text}")
    return 0
