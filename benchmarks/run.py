"""Measure the routed layers: first the correctness gate, then time, with every provider's turn taken in each
repetition.

    python -m benchmarks.run --suite quick
    python -m benchmarks.run --suite gpu --output results.jsonl
    routingvl benchmark --case gpt2_lora_m2040 --repeats 30 --output results.jsonl

A row of the output (JSON lines) is one provider in one mode. A provider whose output or any gradient misses the
tolerance of benchmarks/gate.py is not timed and gets no speed-up; docs/benchmarks.md explains the rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from routingvl.kernels import ROUTINGS

from .cases import CASES, DTYPES, LEVELS, Case
from .ceilings import Limits, measure_ceilings
from .environment import describe_environment
from .measure import Checked, check, measure, memory, obstacle
from .providers import PROVIDERS, providers
from .report import summarise
from .suites import SUITES, Plan, Suite
from .timing import CLOCKS, Timer, append_rows, cpu_threads, quantiles


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
        description="Compare the routed layers with the published chain of operations: correctness first, then time.",
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
    add("--dropout", type=_share, help="of LoRA layers, instead of the suite's; 0 turns it off")
    add("--clock", choices=CLOCKS, help="instead of the suite's: CPU time, wall time, time on the GPU")
    add("--repeats", type=int, help="repetitions of each measurement (default: the suite's)")
    add("--device", help="torch device, such as cpu or cuda:0 (default: the suite's)")
    add("--threads", type=int, default=1, help="CPU threads (default 1, whose CPU time is measured)")
    add("--time-limit", type=float, metavar="S", help="begin nothing new after S seconds (default: the suite's)")
    add("--output", type=Path, help="append the rows to this file (JSON lines)")
    return parser


def suite_of(args: argparse.Namespace) -> Suite:
    """The suite with what the command line says instead; passes that become the same are run once."""
    suite = SUITES["quick" if args.quick else args.suite or "cpu"]
    given = {name: getattr(args, name) for name in ("dtype", "dropout", "clock") if getattr(args, name) is not None}
    if torch.device(args.device or suite.device).type != "cuda":
        given.setdefault("clock", None)
    plans = {}
    for plan in suite.plans:
        changed = replace(plan, **given)
        plans.setdefault((changed.dtype, changed.dropout, changed.clock), changed)
    changes = {name: getattr(args, name) for name in ("repeats", "device", "time_limit") if getattr(args, name)}
    chosen = {"providers": tuple(args.provider)} if args.provider else {}
    return replace(suite, plans=tuple(plans.values()), **changes, **chosen)


def cases_of(suite: Suite, args: argparse.Namespace) -> list[Case]:
    """The cases named on the command line, or else the suite's; those made for a GPU first, as time may run out."""
    kind = torch.device(suite.device).type
    chosen = [case for case in CASES if args.levels is None or case.level in args.levels]
    if args.case:
        return [case for case in chosen if case.name in args.case]
    chosen = [case for case in chosen if kind in case.devices and (case.quick or not suite.quick)]
    return sorted(chosen, key=lambda case: len(case.devices))


class Bench:
    """One run of a suite: its device, clocks, ceilings and what time is left."""

    def __init__(self, suite: Suite, threads: int) -> None:
        self.suite, self.device = suite, torch.device(suite.device)
        self.begun = time.monotonic()
        self.timers = {plan.clock: Timer(self.device, threads, plan.clock) for plan in suite.plans}
        self.environment = describe_environment(self.device, threads)
        # Events rather than wall time on a GPU: a limit is of the device, not of launching.
        timer = Timer(self.device, threads, "gpu") if self.device.type == "cuda" else self.timers[suite.plans[0].clock]
        self.limits = Limits(measure_ceilings(timer, list(dict.fromkeys(plan.dtype for plan in suite.plans))))

    def is_late(self, share: float = 1.0) -> bool:
        """Whether this share of the time limit is spent."""
        return self.suite.time_limit is not None and time.monotonic() - self.begun > share * self.suite.time_limit

    def rows(self, case: Case, routing: str, plan: Plan) -> Iterator[dict]:
        """Gate and measure one case: a row for each provider and mode, one for each provider left out."""
        timer = self.timers[plan.clock]
        shared = {"case": case.name, "op": case.op, "level": case.level, "routing": routing, "dtype": plan.dtype}
        shared |= {**case.sizes(), "dropout": plan.dropout, "clock": timer.clock}
        if self.is_late():
            yield {**shared, "provider": "all", "gate": "skipped", "skipped": "time limit", **self.environment}
            return
        layers, skipped, gate = self._gated(case, routing, plan)
        missed = {name: found.missed for name, found in gate.items() if found.missed}
        for name, what in missed.items():
            yield {**shared, "provider": name, "gate": "failed", "gate_missed": what, **self.environment}
        for name, why in skipped.items():
            yield {**shared, "provider": name, "gate": "skipped", "skipped": why, **self.environment}
        if "reference" in missed:
            return  # nothing to compare with
        layers = {name: layer for name, layer in layers.items() if name not in missed}
        seconds = measure(case, layers, DTYPES[plan.dtype], timer, self.suite.repeats)
        for provider, modes in seconds.items():
            kept = memory(case, layers[provider], DTYPES[plan.dtype], self.device)
            for mode, values in modes.items():
                fields = {**shared, "provider": provider, "mode": mode, **quantiles(values), **kept}
                fields |= self._work(case, provider, mode, plan.dtype, fields["ms_p50"] / 1e3)
                yield {**fields, "repeats": self.suite.repeats, **_passed(gate.get(provider)), **self.environment}

    def _gated(self, case: Case, routing: str, plan: Plan) -> tuple[dict, dict[str, str], dict[str, Checked]]:
        """The layers to time, why others are left out, and what the gate found; it looks at them without dropout."""
        wanted, skipped = self.suite.providers, {}
        if "compile" in wanted and (not plan.compiled or self.is_late(0.5)):
            skipped["compile"] = "not compiled in this pass of the suite" if not plan.compiled else "time limit"
            wanted = tuple(name for name in wanted if name != "compile")
        torch.compiler.reset()  # else the compiler gives up after some cases that share their code
        layers, unable = providers(case, routing, plan.dropout, self.suite.device, wanted)
        judged = providers(case, routing, 0.0, self.suite.device, wanted)[0] if plan.dropout else layers
        judged = {name: layer for name, layer in judged.items() if name != "base"}
        gate = check(case, routing, judged, DTYPES[plan.dtype], self.device)
        if "compile" in gate and gate["compile"].raised:  # the compiler's failure is none of the layer
            skipped["compile"] = gate.pop("compile").missed[0]
            del layers["compile"]
        if plan.dropout:
            for name in gate:
                what = obstacle(case, layers[name], DTYPES[plan.dtype], self.device)
                gate[name].missed += [what] if what else []
        return layers, skipped | unable, gate

    def _work(self, case: Case, provider: str, mode: str, dtype: str, seconds: float) -> dict:
        flops, moved = case.work(mode, DTYPES[dtype].itemsize, bottleneck=provider != "base")
        least, bound = self.limits.seconds(flops, moved, dtype)
        return {
            "flops": flops,
            "tflop_s": round(flops / seconds / 1e12, 4),
            "bytes_moved": moved,
            "gb_s": round(moved / seconds / 1e9, 3),
            "limit": bound,
            "limit_ms": round(least * 1e3, 5),
            "limit_percent": round(100 * least / seconds, 2),
        }


def _passed(found: Checked | None) -> dict:
    """The gate's fields of a provider that is timed; the frozen projection alone has no gate."""
    return {
        "gate": "passed",
        "gate_worst_error": found.worst_error if found else None,
        "first_call_s": found.first_call_s if found else None,
    }


def all_rows(suite: Suite, args: argparse.Namespace) -> Iterator[dict]:
    """Every row of a run, in the order measured."""
    chosen = cases_of(suite, args)
    bench = Bench(suite, args.threads)
    for plan in suite.plans:
        for case in chosen:
            if plan.dropout and not case.takes_dropout and suite.plans[0] is not plan:
                continue  # measured in the pass without
            of_case = plan if case.takes_dropout else replace(plan, dropout=0.0)
            for routing in case.routings:
                if not args.routing or routing in args.routing:
                    print(f"{case.name} {routing} {plan.dtype} dropout {of_case.dropout:g} ...", file=sys.stderr)
                    yield from bench.rows(case, routing, of_case)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every gate was passed, 1 when one was not."""
    parser = build_parser()
    args = parser.parse_args(argv)
    suite = suite_of(args)
    device = torch.device(suite.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"no CUDA device for {suite.device}: use --suite cpu, or --device cpu")
    if device.type != "cuda" and args.clock == "gpu":
        parser.error(f"--clock gpu needs a CUDA device, not {device}: use --clock cpu or wall")
    with cpu_threads(args.threads):
        rows = list(all_rows(suite, args))
    # One write for each run: a run that is stopped leaves the file as it was.
    append_rows(args.output, rows)
    print(summarise(rows))
    return 1 if any(row["gate"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
