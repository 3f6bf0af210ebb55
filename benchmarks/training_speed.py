"""Training throughput with cached features against the published recipe's step, both sides in turns.

    python -m benchmarks.training_speed --output results.jsonl

ViT-B/16 with RoBERTa-base (VQA, batch 32) or GPT-2 (captions, batch 8), LoRA of rank 128, routing add, random weights.
The published step sends each image through the ViT, pads texts to 20 (VQA, prefix included) or 50 tokens and keeps all
logits, in float32. Ours is a step of any epoch after the first: features from a memory-mapped file, texts in the order
and batches of `train.group_by_length`, the loss at supervised positions only, float32 and bfloat16; with --compile each
of the two as `train.compile` runs it as well. Lengths of the made-up texts are log-normal: captions with mean 12 and
99 % under 25 tokens, questions with mean 8.

First the gate: on one batch both sides must give the same loss and gradients. A ratio is printed only then.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from routingvl.training.compile import compiler_obstacle

from .environment import describe_environment
from .memory import can_measure, process_peak, tensor_peak
from .published_models import published_model
from .random_models import routed_model
from .timing import Timer, append_rows, cpu_threads
from .training_steps import (
    PUBLISHED_STEPS,
    STEPS,
    TASKS,
    TOLERANCES,
    Data,
    Step,
    batches_of_each_length,
    long_batch,
    make_ours,
    our_side,
    our_step,
    published_step,
    seconds_a_step,
)

COMPILED = "_compiled"  # ends the name of a side that runs through torch.compile


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script out")
    parser.add_argument(
        "--size", choices=["base", "large"], default="base", help="large: ViT-L/16, RoBERTa-large, GPT-2 medium"
    )
    parser.add_argument(
        "--published-dtype", choices=list(STEPS), default="float32", help="precision of the published step, once gated"
    )
    parser.add_argument(
        "--compile", action="store_true", help="time our steps through torch.compile too (minutes of compiling)"
    )
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this (repeatable; default: both)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda:0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument(
        "--peak-of",
        choices=["published", *STEPS],
        help="only print the peak memory of this process in MiB while it takes one side's captioning step",
    )
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    return parser


def one_side(task: str, side: str, size: str, published_dtype: str, folder: Path) -> tuple[Data, Step]:
    """Data and step of one side, "published" or a dtype of ours, on the CPU; of the other nothing is kept in memory."""
    model, device = routed_model(task, size), torch.device("cpu")
    if side == "published":
        model = published_model(model).train()
        if task == "caption":
            model.caption_loss = "reference"
        data = Data(task, model, folder)
        return data, published_step(data, model, device, published_dtype)
    make_ours(model, side)
    data = Data(task, model.train(), folder)
    return data, our_step(data, model, side, device)


def own_peak(side: str, size: str, published_dtype: str) -> float:
    """MiB that this process occupies during a captioning step of one side, model, optimiser and libraries included."""
    with tempfile.TemporaryDirectory() as folder:
        data, step = one_side("caption", side, size, published_dtype, Path(folder))
        longest = long_batch(data)
        for _ in range(2):  # the optimiser's state comes into being
            step(longest)
        return round(process_peak(lambda: step(longest)), 1)


def peak_elsewhere(side: str, args: argparse.Namespace) -> float:
    """:func:`own_peak` of a new process, because freed memory of the other side may stay with this one."""
    command = [sys.executable, "-m", f"{__package__}.training_speed", "--peak-of", side, "--threads", str(args.threads)]
    command += ["--size", args.size, "--published-dtype", args.published_dtype]
    done = subprocess.run(command + ["--quick"] * args.quick, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr.strip()}")
    return float(done.stdout)


def our_sides(compiling: bool) -> dict[str, str]:
    """Our sides by name and their precision: each as it is, then each compiled."""
    return {dtype: dtype for dtype in STEPS} | {f"{dtype}{COMPILED}": dtype for dtype in STEPS if compiling}


def measure(task: str, args: argparse.Namespace, folder: Path, compiling: ExitStack) -> dict:
    """One row: examples per second of each side, ratios to the published step, memory."""
    device = torch.device(args.device)
    model = routed_model(task, "tiny" if args.quick else args.size)
    if task == "caption":
        model.caption_loss = "reference"  # on both sides, so that the gate compares like with like
    reference = published_model(model).to(device)
    data, sides = Data(task, model, folder), {}
    row = {"case": f"training_{task}", "size": "tiny" if args.quick else args.size, "routing": "add"}
    row |= {"R": model.routing.rank, "B": data.batch, "published_dtype": args.published_dtype}
    environment = describe_environment(device, args.threads)
    ours = our_sides(args.compile)
    for name, dtype in ours.items():
        compiler = compiling if name.endswith(COMPILED) else None
        row[f"{name}_error"], sides[name] = our_side(data, model, reference, dtype, device, compiler)
        if not row[f"{name}_error"] <= TOLERANCES[dtype]:
            return {**row, "gate": "failed", **environment}
    begun = time.perf_counter()
    for batch in batches_of_each_length(data):
        for step in sides.values():
            step(batch)
    row["warm_up_s"] = round(time.perf_counter() - begun, 1)  # every text length once, with all compiling for training
    published = published_step(data, reference, device, args.published_dtype)
    timer = Timer(device, args.threads, "wall")
    in_turns = {"published": (published, PUBLISHED_STEPS)}
    in_turns |= {name: (step, STEPS[ours[name]]) for name, step in sides.items()}
    spent = seconds_a_step(data, in_turns, timer, args.rounds)
    rates = {name: data.batch * len(values) / sum(values) for name, values in spent.items()}
    row |= {f"{name}_examples_s": round(rate, 3) for name, rate in rates.items()}
    longest = long_batch(data)
    for name, step in sides.items():
        row[f"{name}_speedup"] = round(rates[name] / rates["published"], 3)
        each = np.array(spent["published"]) / np.array(spent[name])
        row[f"{name}_speedup_rounds"] = [round(float(value), 3) for value in np.sort(each)]
        row[f"{name}_step_mib"] = round(tensor_peak(lambda step=step: step(longest), device), 1)
    reference.zero_grad()  # as ours, which are dropped at the end of a step
    row["published_step_mib"] = round(tensor_peak(lambda: published(longest), device), 1)
    if task == "caption" and device.type == "cpu" and can_measure():
        row |= {f"{name}_process_mib": peak_elsewhere(name, args) for name in ("published", *STEPS)}
    return {**row, "rounds": args.rounds, "clock": timer.clock, "gate": "passed", **environment}


def describe(row: dict) -> str:
    """A row in words."""
    if row["gate"] == "failed":
        return f"{row['case']}: loss or gradients differ from the published step's: nothing was timed"
    lines = [
        f"{row['case']}: published {row['published_examples_s']} examples/s, {row['published_step_mib']} MiB per step"
    ]
    lines += [
        f"  {name}: {row[f'{name}_examples_s']} examples/s = {row[f'{name}_speedup']}x "
        f"(rounds {row[f'{name}_speedup_rounds'][0]} to {row[f'{name}_speedup_rounds'][-1]}), "
        f"{row[f'{name}_step_mib']} MiB"
        for name in our_sides(f"bfloat16{COMPILED}_speedup" in row)
    ]
    if "published_process_mib" in row:
        peaks = [f"{name} {row[f'{name}_process_mib']} MiB" for name in ("published", *STEPS)]
        lines.append(f"  the whole process at its peak: {', '.join(peaks)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a gate stayed shut, else 0."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.compile and (reason := compiler_obstacle(torch.device(args.device))):
        parser.error(f"--compile: {reason}")
    rows = []
    with cpu_threads(args.threads):
        if args.peak_of:
            print(own_peak(args.peak_of, "tiny" if args.quick else args.size, args.published_dtype))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            for task in args.task or TASKS:
                with ExitStack() as compiling:
                    rows.append(measure(task, args, Path(folder), compiling))
                append_rows(args.output, rows[-1:])
                print(describe(rows[-1]), flush=True)
    return 1 if any(row["gate"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
