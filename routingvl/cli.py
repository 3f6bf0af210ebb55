"""The ``routingvl`` command: a table of sub-commands, each in its own module of ``routingvl.commands``.

Nothing heavy is imported here, so that ``routingvl --help`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from routingvl import __version__
from routingvl.atomic_files import STANDARD_OUTPUT, naming
from routingvl.interrupts import INTERRUPTED, message_of, signals_interrupt

# name -> module of routingvl.commands with run(args) -> exit status, and the line of --help
COMMANDS = {
    "train": ("train", "train routed bottlenecks from a YAML config and command-line overrides"),
    "evaluate": ("evaluate", "score a run on a split and write its predictions"),
    "predict": ("predict", "predict for image files, with a text where the task takes one, by a run of any task"),
    "caption": ("caption", "caption image files with a run"),
    "answer": ("answer", "answer a question about an image with a run"),
    "cache-features": ("cache_features", "run the frozen ViT once over the images of a run and keep its output"),
    "prepare-data": ("prepare_data", "derive every annotation file from the official COCO and VQAv2 files"),
    "demo": ("demo", "train and compare every routing function on a small embedded data set"),
    "benchmark": ("benchmark", "time the bottleneck operations against their alternatives"),
    "doctor": ("doctor", "report versions, devices, the backend and what is missing on this machine"),
    "export": ("export", "copy a run's adapter to a folder, in our format or PEFT's"),
}
USAGE_ERROR = 2


def help_text() -> str:
    """What ``routingvl --help`` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: routingvl COMMAND [options]

Fine-tune ViT + RoBERTa and ViT + GPT-2 through routed low-rank bottlenecks (arXiv 2403.09377).

commands:
{commands}

options:
  -h, --help  this text; routingvl COMMAND --help explains a command
  --version   the version
  --debug     show the traceback of an error (with any command)

example: routingvl train --config vqa-lora --train.lr 1e-4"""


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 (failed), 2 (bad input) or 130 (interrupted)."""
    args = list(sys.argv[1:] if args is None else args)
    own = args[: args.index("--")] if "--" in args else args  # behind it are names of files
    debug = "--debug" in own
    args = [arg for arg in own if arg != "--debug"] + args[len(own) :]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show ends no program
    try:
        with signals_interrupt():
            status = _run(args)
        _leave_process_group()
        with naming(STANDARD_OUTPUT):
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        _drop_output()
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        # Every error of bad input in this library is one of these; anything else is a fault and shows its traceback.
        if debug:
            raise
        if getattr(error, "filename", None) == str(STANDARD_OUTPUT):
            _drop_output()
        return _fail(message_of(error), 1 if isinstance(error, FloatingPointError) else USAGE_ERROR)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if args else USAGE_ERROR
    if args[0] == "--version":
        print(f"routingvl {__version__}")
        return 0
    if args[0] not in COMMANDS:
        from difflib import get_close_matches

        close = get_close_matches(args[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; routingvl --help lists the commands"
        return _fail(f"unknown command {args[0]!r}{hint}")
    return importlib.import_module(f"routingvl.commands.{COMMANDS[args[0]][0]}").run(args[1:])


def _drop_output() -> None:
    """Send to nowhere what could not be printed, or Python tries it again when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave_process_group() -> None:
    """End the process group that a command has joined (several processes): torch wants that before a process ends."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _fail(message: str, status: int = USAGE_ERROR) -> int:
    print(f"routingvl: {message.removeprefix('routingvl ')}", file=sys.stderr)  # a parser's begins with its command
    return status
