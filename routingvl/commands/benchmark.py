"""``routingvl benchmark``: time and memory of the bottleneck operations."""

from __future__ import annotations

from collections.abc import Sequence


def run(args: Sequence[str]) -> int:
    """Hand over to the benchmark runner, which has its own options."""
    from routingvl.benchmarks.run import main

    return main(list(args)) or 0
