"""One module per sub-command of the command line, and the arguments they share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from routingvl.config.files import CommandParser as CommandParser  # for the commands
from routingvl.config.files import parse_config
from routingvl.config.schema import changed_settings
from routingvl.training.run_folder import RunFolder


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The run folder and which of its adapters to use."""
    parser.add_argument("run", metavar="RUN", help="run folder of a training")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="adapter to use (default: best)")


def say(text: str) -> None:
    """Print a result, once when several processes run the command (``accelerate launch``)."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def split_settings(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part settings such as ``--eval.num_beams 3`` (a dotted name, or --device) from the command's own arguments."""
    own, settings = [], []
    rest = iter(args)
    for arg in rest:
        name, has_value, _ = arg.partition("=")
        if name.startswith("--") and ("." in name or name == "--device"):
            settings += [arg] if has_value else [arg, *islice(rest, 1)]
        else:
            own.append(arg)
    return own, settings


def read_overrides(run: str, settings: Sequence[str]) -> dict[str, Any]:
    """The settings among ``--key value`` arguments that differ from those of a run, by dotted name."""
    folder = RunFolder(Path(run))
    trained = folder.load_config()
    if not settings:
        return {}
    changed = parse_config(["--config", str(folder.config_file), *settings])
    return {key: new for key, (_, new) in changed_settings(trained, changed).items()}


SETTINGS_NOTE = "Settings of data, eval, device and model.backend can be changed for this call: --eval.num_beams 3."
