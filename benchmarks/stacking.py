"""What projecting the image for all layers at once gains over every layer doing it by itself.

    python -m benchmarks.stacking --threads 2 --output results.jsonl

One model of random weights, its context switched between the two ways, in turns: a training step (forward and backward
pass, features given) of ViT + RoBERTa and of ViT + GPT-2, and a beam search. Before anything is timed, the gate: both
ways must give the same loss and gradients, or the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from routingvl.config import RoutingConfig
from routingvl.kernels import ROUTINGS
from routingvl.models.base import RoutedVLModel

from .environment import describe_environment
from .gate import relative_rms
from .random_models import build_model, step_inputs, write_captions
from .timing import Timer, append_rows, cpu_threads, quantiles

WAYS = {"stacked": True, "per_layer": False}
TASKS = {"vqa": (32, 10), "caption": (8, 13), "generate": (8, 15)}  # batch, tokens
# Largest relative RMS difference of a gradient: the two ways sum in another order, in float32.
TOLERANCE = 1e-4


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stacking", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the script out")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this (repeatable; default: all)")
    parser.add_argument("--routing", action="append", choices=list(ROUTINGS), help="repeatable (default add, vllora)")
    parser.add_argument("--method", choices=["lora", "adapter"], default="lora", help="default lora")
    parser.add_argument("--rank", type=int, default=128, help="rank of the bottlenecks (default 128)")
    parser.add_argument("--repeats", type=int, default=9, help="timed turns of each way (default 9)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1, whose CPU time is measured)")
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    return parser


def trained_model(task: str, size: str, routing: RoutingConfig) -> RoutedVLModel:
    """The model of a task without its ViT, its trained weights drawn at random too."""
    model = build_model(task, size, routing)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return model.eval()  # without dropout, which would draw other masks each time


def make_call(task: str, model: nn.Module) -> Callable[[], Tensor]:
    """What is timed: a training step that returns its loss, or a beam search that returns its tokens."""
    batch, tokens = TASKS[task]
    inputs = step_inputs(task, model, batch, tokens)
    if task == "generate":
        features = inputs["vision_features"]
        return lambda: write_captions(model, features, beams=5, tokens=tokens, dtype="float32")
    if task == "caption":
        inputs["return_logits"] = False

    def step() -> Tensor:
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    return step


def differences(model: nn.Module, call: Callable[[], Tensor]) -> float:
    """Largest relative RMS difference between the two ways, over the result and every gradient."""
    found = []
    for stacked in WAYS.values():
        model.context.stacked = stacked
        result = call()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([result, *gradients])
    if found[0][0].shape != found[1][0].shape or len(found[0]) != len(found[1]):
        return float("inf")
    return max(relative_rms(left, right) for left, right in zip(*found, strict=True))


def measure(task: str, routing: str, args: argparse.Namespace) -> dict:
    """One row: seconds a step or a caption search each way, and the gain."""
    config = RoutingConfig(method=args.method, routing=routing, rank=args.rank)
    model = trained_model(task, "tiny" if args.quick else "base", config)
    call = make_call(task, model)
    timer = Timer(torch.device("cpu"), args.threads)
    batch, tokens = TASKS[task]
    row = {"case": f"stacking_{task}", "method": args.method, "routing": routing, "R": args.rank, "B": batch}
    row |= {"T": tokens, "dtype": "float32", "worst_error": differences(model, call)}
    environment = describe_environment(timer.device, args.threads)
    if not row["worst_error"] <= (0 if task == "generate" else TOLERANCE):
        return {**row, "gate": "failed", **environment}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(args.repeats):
        for way in list(WAYS)[:: 1 if repeat % 2 else -1]:
            model.context.stacked = WAYS[way]
            seconds[way].append(timer(call)[0])
    gains = [alone / together for alone, together in zip(seconds["per_layer"], seconds["stacked"], strict=True)]
    return {
        **row,
        **{f"{way}_ms_p50": round(torch.tensor(values).median().item() * 1e3, 3) for way, values in seconds.items()},
        **quantiles(gains, "gain", 1.0),
        "repeats": args.repeats,
        "clock": timer.clock,
        "gate": "passed",
        **environment,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 when the two ways differ, else 0."""
    args = build_parser().parse_args(argv)
    rows = []
    with cpu_threads(args.threads):
        for task, routing in itertools.product(args.task or TASKS, args.routing or ["add", "vllora"]):
            rows.append(row := measure(task, routing, args))
            if row["gate"] == "failed":
                print(f"{task} {routing}: the two ways differ by {row['worst_error']:.1e}: not timed")
            else:
                print(
                    f"{task} {routing}: {row['stacked_ms_p50']} ms stacked, {row['per_layer_ms_p50']} ms layer by "
                    f"layer, {row['gain_p50']}x ({row['gain_p20']} to {row['gain_p80']})"
                )
    append_rows(args.output, rows)
    return 1 if any(row["gate"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
