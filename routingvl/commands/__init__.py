"""One module per sub-command of the command line, and the arguments they share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from routingvl.config.files import CommandParser, add_settings


class RunParser(CommandParser):
    """A parser for a command that applies a finished run, whose settings can be changed by flags unless ``fixed``."""

    def __init__(self, command: str, description: str, example: str, fixed: bool = False) -> None:
        note = "" if fixed else "\nSettings of data, eval, device and model.backend can be changed: --eval.num_beams 3."
        super().__init__(command, description + note, example)
        self.add_argument("run", metavar="RUN", help="run folder of a training")
        self.add_argument(
            "--checkpoint", choices=("best", "last"), default="best", help="adapter to use (default: best)"
        )
        if not fixed:
            add_settings(self, show=False)

    def predictor(self, args: Sequence[str]) -> tuple[argparse.Namespace, Any]:
        """The command's own arguments, and the :class:`~routingvl.predict.Predictor` of the run."""
        options = self.parse_args(args)
        from routingvl.predict import Predictor

        return options, Predictor(options.run, checkpoint=options.checkpoint, **options.settings)


def say(text: str) -> None:
    """Print a result, once when several processes run the command (``accelerate launch``)."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
