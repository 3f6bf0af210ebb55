"""``routingvl evaluate``: a run folder and a split in, metrics and predictions out."""

from __future__ import annotations

from collections.abc import Sequence

from routingvl.commands import RunParser, json_text, say

EXAMPLE = "routingvl evaluate runs/caption-lora --split test --eval.num_beams 3"


def run(args: Sequence[str]) -> int:
    """Evaluate and print the metrics as JSON."""
    parser = RunParser(
        "evaluate", "Score a run on a split. Predictions and metrics.json go into RUN/eval-SPLIT.", EXAMPLE
    )
    parser.add_argument("--split", default="test", help="split to score, of a mixture also NAME:SPLIT (default: test)")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the results (default: RUN/eval-SPLIT[-CONTROL])")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")
    parser.add_argument(
        "--image-control", metavar="CONTROL",
        help="score without the images: shuffled (each example sees another's), zeros, ones or noise in their place",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    options = parser.parse_args(args)

    from routingvl.evaluate import evaluate

    metrics = evaluate(
        options.run,
        options.split,
        checkpoint=options.checkpoint,
        output=options.output,
        limit=options.limit,
        image_control=options.image_control,
        log="quiet" if options.quiet else None,
        **options.settings,
    )
    say(json_text(metrics, indent=2))
    return 0
