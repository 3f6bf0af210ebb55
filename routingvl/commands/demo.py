"""``routingvl demo``: every routing function trained and compared on the embedded data set."""

from __future__ import annotations

from collections.abc import Sequence


def run(args: Sequence[str]) -> int:
    """Hand over to the demo, which has its own options."""
    from routingvl.demo.main import main

    return main(list(args)) or 0
