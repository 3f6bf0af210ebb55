"""One module a sub-command of the command line, and the argument parser they share."""

from __future__ import annotations

import argparse
from typing import NoReturn

from routingvl.config import ConfigError, nearest


class CommandParser(argparse.ArgumentParser):
    """An argument parser without abbreviations that raises :class:`ConfigError`, with the nearest flag, not exit.

    ``example`` is a complete command line, shown under --help.
    """

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"routingvl {command}",
            description=description,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into an exception."""
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            name = message.removeprefix(prefix).split()[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown {'flag' if name.startswith('-') else 'argument'} {name}{nearest(name, flags)}"
        raise ConfigError(f"{self.prog}: {message} (--help lists the options)")


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """The run folder and which of its adapters to use."""
    parser.add_argument("run", metavar="RUN", help="run folder of a training")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="adapter to use (default: best)")
