"""``routingvl predict``: image files, and a text where the task takes one, in; what the run says of them out."""

from __future__ import annotations

from collections.abc import Sequence

from routingvl.commands import RunParser, print_predictions

EXAMPLE = 'routingvl predict runs/classify-lora photo.jpg --text "Two people ride a bike."'


def run(args: Sequence[str]) -> int:
    """Print one JSON object per image: its path, and the label, answer or caption, with probabilities."""
    parser = RunParser(
        "predict",
        "Predict for image files with a run of any task: a label, an answer, or a caption; a JSON object per image.",
        EXAMPLE,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--text", nargs="+", metavar="TEXT", help="the text about each image, or two sentences")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="choices to list (default: 5)")
    options, predictor = parser.predictor(args)
    text = options.text[0] if options.text and len(options.text) == 1 else options.text
    return print_predictions(predictor, options.images, text, options.top)
