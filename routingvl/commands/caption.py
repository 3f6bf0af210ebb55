"""``routingvl caption``: image files in, captions out."""

from __future__ import annotations

from collections.abc import Sequence

from routingvl.commands import RunParser, print_predictions

EXAMPLE = "routingvl caption runs/caption-lora photo1.jpg photo2.jpg --eval.num_beams 3"


def run(args: Sequence[str]) -> int:
    """Print one line per image: its path, a tab, its caption; JSON where a path holds tabs or line breaks."""
    parser = RunParser("caption", "Caption image files with the adapter of a captioning run.", EXAMPLE)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options, predictor = parser.predictor(args)
    predictor.check_command("caption")
    plain = None if options.json else lambda path, row: f"{path}\t{row['caption']}"
    return print_predictions(predictor, options.images, plain=plain)
