"""``routingvl benchmark``: time and memory of the bottleneck operations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from routingvl.commands import CommandParser


def run(args: Sequence[str]) -> int:
    """Hand over to the benchmark runner, which has its own options."""
    from routingvl.benchmarks.run import build_parser, main

    parser = build_parser()
    parser.error = partial(CommandParser.error, parser)  # our form of an error in place of argparse's
    return main(list(args), parser) or 0
