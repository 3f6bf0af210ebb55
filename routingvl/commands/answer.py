"""``routingvl answer``: an image and a question in, the likeliest answers out."""

from __future__ import annotations

from collections.abc import Sequence

from routingvl.commands import RunParser, json_text, say

EXAMPLE = 'routingvl answer runs/vqa-lora photo.jpg "what color is the cat?" --top 3'


def run(args: Sequence[str]) -> int:
    """Print one line per answer: its probability, a tab, the answer."""
    parser = RunParser(
        "answer",
        "Answer a question about an image. Each probability stands for itself (they do not sum to 1):\n"
        "the model is trained with one yes-or-no decision per answer.",
        EXAMPLE,
    )
    parser.add_argument("image", metavar="IMAGE", help="image file")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="number of answers (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    options, predictor = parser.predictor(args)
    for answer, probability in predictor.answer(options.image, options.question, top=options.top):
        row = {"answer": answer, "probability": round(probability, 6)}
        say(json_text(row) if options.json else f"{probability:.4f}\t{answer}")
    return 0
