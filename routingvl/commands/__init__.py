"""One module per sub-command of the command line, and the arguments they share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from routingvl.atomic_files import STANDARD_OUTPUT, naming
from routingvl.config.files import CommandParser, add_settings


class RunParser(CommandParser):
    """A parser for a command that applies a finished run, and takes its settings, all or the ``keys``, as flags."""

    def __init__(self, command: str, description: str, example: str, keys: Collection[str] | None = None) -> None:
        if keys is None:
            description += "\nSettings of data, eval, device and model.backend can be changed: --eval.num_beams 3."
        description += "\nBackbones that have moved: --model.vision PATH --model.text PATH, of the same content."
        super().__init__(command, description, example)
        self.add_argument("run", metavar="RUN", help="run folder of a training")
        self.add_argument(
            "--checkpoint", choices=("best", "last"), default="best", help="adapter to use (default: best)"
        )
        add_settings(self, keys, show=False)

    def predictor(self, args: Sequence[str]) -> tuple[argparse.Namespace, Any]:
        """The command's own arguments, and the :class:`~routingvl.predict.Predictor` of the run."""
        options = self.parse_args(args)
        from routingvl.predict import Predictor

        return options, Predictor(options.run, checkpoint=options.checkpoint, **options.settings)


def print_predictions(
    predictor: Any, images: Sequence[str], text: Any = None, top: int = 5, plain: Callable | None = None
) -> int:
    """Print a line per image (or per example, where it has several), ``plain(path, row)`` or JSON, and on stderr each
    file that cannot be read.

    Where a name could be mistaken in a plain line (a tab, a line break, bytes that are no UTF-8), all lines are JSON.

    Returns:
        The exit status: 2 when a file could not be read.
    """
    status = 0
    if plain is not None and not all(image.isprintable() for image in images):
        plain = None
        print("routingvl: a file name holds unprintable characters, so the lines are JSON", file=sys.stderr)
    for names, row in zip(predictor.groups(images), predictor.predict_each(images, text, top), strict=True):
        image, key = (names[0], "image") if len(names) == 1 else (list(names), "images")
        if isinstance(row, ValueError):
            status = 2
            print(f"routingvl: {' '.join(str(row).split())}", file=sys.stderr)
        else:
            say(json_text({key: image, **row}) if plain is None else plain(image, row))
    return status


def json_text(data: Any, indent: int | None = None) -> str:
    """JSON in which characters that standard output cannot show are escaped."""
    text = json.dumps(data, indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent)
    return text


def say(text: str) -> None:
    """Print a result, once when several processes run the command (``accelerate launch``)."""
    if os.environ.get("RANK", "0") == "0":
        with naming(STANDARD_OUTPUT):
            print(text, flush=True)
