"""Benchmarks of the routed layers: cases as data, a correctness gate before every timing, rows as JSON lines."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark's command line; see ``python -m benchmarks.run --help``. Returns the exit status."""
    # Imported here: `python -m benchmarks.run` imports this package first and must not find run already loaded.
    from .run import main as run

    return run(argv)
