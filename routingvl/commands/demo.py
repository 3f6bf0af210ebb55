"""``routingvl demo``: every routing function trained and compared on the embedded data set."""

from __future__ import annotations

from collections.abc import Sequence

from routingvl.commands import CommandParser

EXAMPLE = "routingvl demo --quick --output runs/demo"


def run(args: Sequence[str]) -> int:
    """Parse the size of the demo and run it."""
    parser = CommandParser(
        "demo",
        "Make images, questions and captions, pretrain small backbones, train every variant on both tasks, and write\n"
        "a report (Markdown and HTML). Finished work in the output folder is used again.",
        EXAMPLE,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="without routing and with mul only")
    size.add_argument("--full", action="store_true", help="search the learning rate of every variant, three seeds")
    parser.add_argument("--output", default="runs/demo", metavar="FOLDER", help="default: runs/demo")
    parser.add_argument("--fresh", action="store_true", help="remove the output folder first")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="trainings at a time (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of examples (default: 0)")
    options = parser.parse_args(args)

    from routingvl.demo.main import DemoOptions
    from routingvl.demo.main import run as run_demo

    run_demo(DemoOptions(**vars(options)))
    return 0
