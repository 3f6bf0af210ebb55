"""Measure the routed layers and models: first the correctness gate, then time, with every provider's turn taken in
each repetition.

    python -m benchmarks.run --suite quick
    python -m benchmarks.run --suite gpu --output results.jsonl
    routingvl benchmark --case gpt2_lora_m2040 --repeats 30 --output results.jsonl

A row of the output (JSON lines) is one provider in one mode. A provider whose output or any gradient misses the
tolerance of benchmarks/gate.py is not timed and gets no speed-up; docs/benchmarks.md explains the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from routingvl.kernels import ROUTINGS

from .comparison import TIME_LIMIT
from .launch_level import LAUNCH_CASES, LaunchCase
from .layer_cases import CASES as LAYER_CASES
from .layer_cases import DTYPES, LEVELS, Case
from .layer_providers import COMPETITORS, PROVIDERS
from .model_cases import MODEL_CASES, ModelCase
from .report import read_rows, summarise
from .suite_run import SuiteRun
from .suites import SUITES, Plan, Suite
from .timing import CLOCKS, append_rows, cpu_threads

AnyCase = LaunchCase | Case | ModelCase
CASES = (*LAUNCH_CASES, *LAYER_CASES, *MODEL_CASES)
# What has to be the same for a row to be a measurement of the same thing.
IDENTITY = ("case", "routing", "dtype", "pure", "dropout", "clock", "device", "threads", "commit")


def _levels(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in LEVELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown level {unknown[0]!r}; there are {', '.join(LEVELS)}")
    return chosen


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="routingvl benchmark",
        description="Compare routed layers and models with the published chain of operations: correctness first, then "
        "time.",
        epilog="example: routingvl benchmark --quick --routing mul",
    )
    names = [case.name for case in CASES]
    add = parser.add_argument
    add("--suite", choices=list(SUITES), help="quick: minutes; cpu (default): all CPU cases; gpu: under nine minutes")
    add("--quick", action="store_true", help="the same as --suite quick")
    add("--levels", type=_levels, help=f"levels, joined by commas, of {', '.join(LEVELS)} (default: all)")
    add("--case", action="append", choices=names, help="measure this case (repeatable; default: the suite's)")
    add("--routing", action="append", choices=list(ROUTINGS), help="only this routing (repeatable)")
    add("--provider", action="append", choices=list(PROVIDERS), help="only this one beside the reference (repeatable)")
    add("--dtype", choices=list(DTYPES), help="instead of the suite's; half types run under autocast")
    add("--pure", action="store_true", help="half types of layers without autocast: tensors have the dtype itself")
    add("--dropout", type=_share, help="of LoRA layers, instead of the suite's; 0 turns it off")
    add("--clock", choices=CLOCKS, help="instead of the suite's: CPU time, wall time, time on the GPU")
    add("--repeats", type=int, help="repetitions of each measurement (default: the suite's)")
    add("--device", help="torch device, such as cpu or cuda:0 (default: the suite's)")
    add("--threads", type=int, default=1, help="CPU threads (default 1, whose CPU time is measured)")
    add("--cuda-graphs", action="store_true", help="time forward and backward pass as a CUDA graph too (CUDA only)")
    add("--time-limit", type=float, metavar="S", help="begin nothing new after S seconds (default: the suite's)")
    add("--output", type=Path, help="append the rows to this file (JSON lines), those of a case once it is measured")
    add("--resume", action="store_true", help="leave out what the file of --output has of this device and commit")
    return parser


def suite_of(args: argparse.Namespace) -> Suite:
    """The suite with what the command line says instead; passes that become the same are run once."""
    suite = SUITES["quick" if args.quick else args.suite or "cpu"]
    given = {name: getattr(args, name) for name in ("dtype", "dropout", "clock") if getattr(args, name) is not None}
    if torch.device(args.device or suite.device).type != "cuda":
        given.setdefault("clock", None)
    given |= {"pure": True} if args.pure else {}
    plans = {}
    for plan in suite.plans:
        changed = replace(plan, **given)
        changed = replace(changed, pure=changed.pure and DTYPES[changed.dtype].itemsize == 2)
        plans.setdefault((changed.dtype, changed.dropout, changed.clock, changed.pure), changed)
    changes = {name: getattr(args, name) for name in ("repeats", "device", "time_limit") if getattr(args, name)}
    changes |= {"model_repeats": args.repeats} if args.repeats else {}
    changes |= {"providers": tuple(args.provider)} if args.provider else {}
    return replace(suite, plans=tuple(plans.values()), graphs=args.cuda_graphs, **changes)


def cases_of(suite: Suite, args: argparse.Namespace) -> list[AnyCase]:
    """The cases named on the command line, or else the suite's: layers before models, as time may run out, and of the
    layers first those made for a GPU.
    """
    kind = torch.device(suite.device).type
    chosen = [case for case in CASES if args.levels is None or case.level in args.levels]
    if args.case:
        chosen = [case for case in chosen if case.name in args.case]
    else:
        chosen = [case for case in chosen if kind in case.devices and (case.quick or not suite.quick)]
    layers = sorted((case for case in chosen if isinstance(case, Case)), key=lambda case: len(case.devices))
    others = {kind: [case for case in chosen if isinstance(case, kind)] for kind in (LaunchCase, ModelCase)}
    return [*others[LaunchCase], *layers, *others[ModelCase]]


def routings_of(case: AnyCase, suite: Suite, args: argparse.Namespace) -> list[str]:
    """The routing functions to measure a case with."""
    few = suite.quick and isinstance(case, ModelCase) and not args.case
    return [name for name in (case.quick if few else case.routings) if not args.routing or name in args.routing]


def work_of(suite: Suite, args: argparse.Namespace) -> Iterator[tuple[AnyCase, str, Plan]]:
    """Every case, routing and pass of a run, in the order measured."""
    chosen = cases_of(suite, args)
    for kind in (LaunchCase, Case, ModelCase):
        for plan in suite.plans:
            for case in (case for case in chosen if isinstance(case, kind)):
                if plan.dropout and not case.takes_dropout and suite.plans[0] is not plan:
                    continue  # measured in the pass without
                if plan.pure and kind is ModelCase and len(suite.plans) > 1:
                    continue  # of layers only
                of_case = plan if case.takes_dropout else replace(plan, dropout=0.0)
                for routing in routings_of(case, suite, args):
                    yield case, routing, of_case


def identity(row: dict) -> tuple:
    """What a row measures, and where."""
    return tuple(row.get(name) for name in IDENTITY)


def measured_before(rows: Sequence[dict], graphs: bool = False) -> dict[tuple, list[dict]]:
    """Rows that need not be measured again, by :func:`identity`; ``graphs``: with those of CUDA graphs.

    A commit does not tell what a changed file was, so rows of a changed checkout do not count; nor does a case of which
    a gate was not passed, or that the time limit left unfinished.
    """
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if not row["dirty"]:
            found.setdefault(identity(row), []).append(row)
    lacking = {key for key, group in found.items() if graphs and not any(row.get("graphs") for row in group)}
    return {key: group for key, group in found.items() if key not in lacking and all(map(_is_final, group))}


def _is_final(row: dict) -> bool:
    return row["gate"] != "failed" and row.get("skipped") != TIME_LIMIT


def main(argv: Sequence[str] | None = None, parser: argparse.ArgumentParser | None = None) -> int:
    """Run the benchmark; 0 when every gate was passed, those of competitors apart, 1 when one was not."""
    parser = parser or build_parser()
    args = parser.parse_args(argv)
    suite = suite_of(args)
    device = torch.device(suite.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"no CUDA device for {suite.device}: use --suite cpu, or --device cpu")
    if device.type != "cuda" and args.clock == "gpu":
        parser.error(f"--clock gpu needs a CUDA device, not {device}: use --clock cpu or wall")
    if device.type != "cuda" and args.cuda_graphs:
        parser.error(f"--cuda-graphs needs a CUDA device, not {device}: leave it out, or use --suite gpu")
    for flag, number in (("--threads", args.threads), ("--repeats", args.repeats)):
        if number is not None and number < 1:
            parser.error(f"{flag} {number} must be at least 1")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.absolute().parent}; make it first")
    if args.resume and args.output is None:
        parser.error("--resume needs --output, the file to go on with")
    try:
        known = read_rows([args.output]) if args.resume and args.output.exists() else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    before, rows = measured_before(known, args.cuda_graphs), []
    with cpu_threads(args.threads):
        suite_run = SuiteRun(suite, args.threads)
        for case, routing, plan in work_of(suite, args):
            group = before.get(identity(suite_run.fields(case, routing, plan)))
            if group is None:
                print(f"{case.name} {routing} {plan.dtype} dropout {plan.dropout:g} ...", file=sys.stderr)
                group = list(suite_run.rows(case, routing, plan))
                # One write, and only of a whole case: a run that is stopped leaves what it has measured until then.
                append_rows(args.output, group)
            rows += group
    print(summarise(rows))
    return 1 if any(row["gate"] == "failed" and row["provider"] not in COMPETITORS for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
