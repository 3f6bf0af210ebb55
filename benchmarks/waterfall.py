"""What each technique takes off the published training step: its memory, and its time.

    python -m benchmarks.waterfall --output waterfall.jsonl
    python -m benchmarks.waterfall --device cuda --task caption --rounds 10
    python -m benchmarks.waterfall --read waterfall.jsonl

The techniques come one after the other, each on top of those before: the image's features kept instead of computed by
the ViT in every step; texts padded to the longest of their batch; our layers; (captions) the loss where there are
targets only, without the other logits; bfloat16 with frozen weights in it; activation checkpointing, which pays time
for memory. Memory is what a step takes at most beside the model and its optimiser, on the longest of ten batches (by
torch's profiler on a CPU, its allocator on a GPU); the time is that of the same steps with all sides in turns.

First the gate: loss and gradients of our steps against the published step in float32. The exit status is 1 when one
misses it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from routingvl.models.base import RoutedVLModel

from .environment import describe_environment
from .memory import tensor_peak
from .published_models import published_model, published_optimizer
from .random_models import autocast, routed_model
from .timing import Timer, append_rows, cpu_threads, quantiles
from .training_steps import TASKS, TOLERANCES, Data, Step, gate, long_batch, make_ours, our_step, published_step

Inputs = Callable[[Sequence[int]], dict[str, Tensor]]


def features_step(data: Data, model: RoutedVLModel, texts: Inputs, device: torch.device) -> Step:
    """A step in float32 on kept features and ``texts``, with the published optimiser."""
    optimizer = published_optimizer(model)

    def step(indices: list[int]) -> None:
        features = torch.from_numpy(data.features[np.asarray(indices)]).to(device)
        inputs = {key: value.to(device) for key, value in texts(indices).items()}
        optimizer.zero_grad()
        with autocast(device, "float32"):
            loss = model(vision_features=features, **inputs).loss
        loss.backward()
        optimizer.step()

    return step


def rungs(data: Data, model: RoutedVLModel, device: torch.device) -> tuple[dict[str, Step], dict[str, float]]:
    """The steps by what has been added, in order; and the errors of our sides by dtype."""
    reference = published_model(model).to(device).train()
    without_vit = copy.deepcopy(reference)
    without_vit.vit = None
    ours = {dtype: make_ours(copy.deepcopy(model).to(device), dtype).train() for dtype in TOLERANCES}
    errors = {dtype: gate(data, reference, one, dtype, device) for dtype, one in ours.items()}

    def fixed(indices: Sequence[int]) -> dict[str, Tensor]:
        return data.texts(indices, data.fixed, all_count=True)

    steps = {
        "published": published_step(data, reference, device),
        "features kept": features_step(data, without_vit, fixed, device),
        "padded to the longest": features_step(data, without_vit, data.texts, device),
        "our layers": features_step(data, copy.deepcopy(ours["float32"]), data.texts, device),
    }
    if data.task == "caption":
        for one in ours.values():
            one.caption_loss = "sound"
        steps["loss at targets only"] = our_step(data, ours["float32"], "float32", device)
    checkpointed = copy.deepcopy(ours["bfloat16"])
    checkpointed.activation_checkpointing_enable()
    steps["bfloat16"] = our_step(data, ours["bfloat16"], "bfloat16", device)
    steps["activation checkpointing"] = our_step(data, checkpointed, "bfloat16", device)
    return steps, errors


def measure(task: str, args: argparse.Namespace, folder: Path) -> list[dict]:
    """A row for each rung, or one that says what missed the gate."""
    device = torch.device(args.device)
    model = routed_model(task, "tiny" if args.quick else args.size)
    if task == "caption":
        model.caption_loss = "reference"
    data = Data(task, model, folder, args.batch)
    shared = {"case": f"waterfall_{task}", "size": "tiny" if args.quick else args.size, "routing": "add"}
    shared |= {"R": model.routing.rank, "B": data.batch, **describe_environment(device, args.threads)}
    steps, errors = rungs(data, model, device)
    missed = [f"{name} {error:.2e}" for name, error in errors.items() if not error <= TOLERANCES[name]]
    if missed:
        return [{**shared, "gate": "failed", "gate_missed": missed}]
    longest, timer = long_batch(data), Timer(device, args.threads, "wall")
    peaks = {}
    for name, step in steps.items():
        step(longest)  # the optimiser's state comes into being
        peaks[name] = tensor_peak(lambda step=step: step(longest), device)
    order = data.order()
    batches = [next(order) for _ in range(args.rounds)]
    spent = timer.all(lambda step=step, batch=batch: step(batch) for batch in batches for step in steps.values())
    rows = []
    for number, name in enumerate(steps):
        times = [one.seconds for one in spent[number :: len(steps)]]
        row = {**shared, "gate": "passed", "rung": number, "technique": name, "step_mib": round(peaks[name], 2)}
        rows.append({**row, "rounds": args.rounds, "clock": timer.clock, **(quantiles(times) if times else {})})
    return rows


def table(rows: Sequence[dict]) -> str:
    """Markdown: each technique with what it changes, in percent of the rung before."""
    lines = ["| step | technique | MiB | change | ms (p20 to p80) | change |", "|---|---|---:|---:|---:|---:|"]
    before: dict | None = None
    for row in rows:
        if row["gate"] == "failed":
            lines.append(f"| {row['case']} | GATE FAILED: {'; '.join(row['gate_missed'])} | | | | |")
            continue
        before = None if row["rung"] == 0 else before
        timed = "ms_p50" in row
        time = f"{row['ms_p50']:.1f} ({row['ms_p20']:.1f} to {row['ms_p80']:.1f})" if timed else "-"
        changes = [_change(row, before, field) for field in ("step_mib", "ms_p50")]
        cells = (row["case"], row["technique"], f"{row['step_mib']:.1f}", changes[0], time, changes[1])
        lines.append(f"| {' | '.join(cells)} |")
        before = row
    return "\n".join(lines)


def _change(row: dict, before: dict | None, field: str) -> str:
    if before is None or field not in row:
        return ""
    return f"{100 * (row[field] / before[field] - 1):+.0f} %"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.waterfall", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script out")
    parser.add_argument("--size", choices=["base", "large"], default="base", help="large: RoBERTa-large, GPT-2 medium")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this (repeatable; default: both)")
    parser.add_argument("--batch", type=int, help="examples of a step (default: the published recipe's)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each side; 0: memory alone (default 10)")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda:0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    parser.add_argument("--read", type=Path, help="print the table of these rows; nothing is measured")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when a gate stayed shut, else 0."""
    parser = build_parser()
    args = parser.parse_args(argv)
    for name, least in {"rounds": 0, "batch": 1, "threads": 1}.items():
        number = getattr(args, name)
        if number is not None and number < least:
            parser.error(f"--{name} {number} must be at least {least}")
    if args.read:
        print(table([json.loads(line) for line in args.read.read_text(encoding="utf-8").splitlines()]))
        return 0
    rows = []
    with cpu_threads(args.threads), tempfile.TemporaryDirectory() as folder:
        for task in args.task or TASKS:
            rows += (found := measure(task, args, Path(folder)))
            append_rows(args.output, found)
    print(table(rows))
    return 1 if any(row["gate"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
