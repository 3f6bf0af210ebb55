"""Measure the routed layers: first the correctness gate, then time, with every provider's turn taken in each
repetition.

    python -m benchmarks.run --quick
    routingvl benchmark --case gpt2_lora_m2040 --repeats 30 --output results.jsonl

A row of the output (JSON lines) is one provider in one mode. Nothing is timed, and no speed-up printed, for a case in
which a provider's output or any gradient misses the tolerance of benchmarks/gate.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from routingvl.kernels import ROUTINGS

from .cases import CASES, Case, Layer, definition, make_tensors, providers
from .environment import describe_environment
from .gate import failures, relative_rms
from .report import summarise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUICK_REPEATS = 5


def build_parser() -> argparse.ArgumentParser:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="routingvl benchmark",
        description="Compare the routed layers with the published chain of operations: correctness first, then time.",
        epilog="example: routingvl benchmark --quick --routing mul",
    )
    names = [case.name for case in CASES]
    parser.add_argument("--quick", action="store_true", help=f"the small cases only, {QUICK_REPEATS} repetitions")
    parser.add_argument("--case", action="append", choices=names, help="measure this case (repeatable; default: all)")
    parser.add_argument("--routing", action="append", choices=list(ROUTINGS), help="only this routing (repeatable)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="half types run under autocast")
    parser.add_argument(
        "--repeats", type=int, help=f"repetitions of each measurement (default 20, {QUICK_REPEATS} if quick)"
    )
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda:0")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1, whose CPU time is measured)")
    parser.add_argument("--compile", action="store_true", help="also the published chain under torch.compile")
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    return parser


class Timer:
    """Seconds of a call: CPU time of one thread, wall time of several threads or of a GPU (synchronised)."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        self.clock = "cpu" if device.type == "cpu" and threads == 1 else "wall"
        # Other processes on the machine do not count in CPU time.
        self._read = time.thread_time if self.clock == "cpu" else time.perf_counter

    def __call__(self, call: Callable[[], Tensor | None]) -> tuple[float, Tensor | None]:
        self._synchronise()
        start = self._read()
        result = call()
        self._synchronise()
        return self._read() - start, result

    def _synchronise(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def run_layer(layer: Layer, tensors: dict[str, Tensor], autocast: torch.dtype | None) -> Tensor:
    """One forward pass, under autocast where a half type is measured."""
    device = tensors["x"].device.type
    with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
        return layer(**tensors)


def values_and_gradients(
    layer: Layer, tensors: dict[str, Tensor], dy: Tensor, autocast: torch.dtype | None
) -> dict[str, Tensor]:
    """Output y and the gradient d<name> of every tensor that needs one."""
    y = run_layer(layer, tensors, autocast)
    leaves = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    grads = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def check(case: Case, routing: str, layers: dict[str, Layer], dtype: torch.dtype, device: str) -> dict[str, dict]:
    """The gate: each provider's worst relative RMS error over output and gradients, and what missed the tolerance."""
    autocast = None if dtype == torch.float32 else dtype
    exact = make_tensors(case, seed=0, dtype=torch.float64, device=device, rounded_to=dtype)
    tensors = {name: tensor.detach().float().requires_grad_(tensor.requires_grad) for name, tensor in exact.items()}
    dy = torch.randn(case.B, case.T, case.N, generator=torch.Generator().manual_seed(1)).to(device=device, dtype=dtype)
    plain_layer = definition(case, routing)
    oracle = values_and_gradients(plain_layer, exact, dy.double(), None)
    plain = values_and_gradients(plain_layer, tensors, dy, autocast)
    found = {}
    for name, layer in layers.items():
        got = values_and_gradients(layer, tensors, dy, autocast)
        worst = max(relative_rms(got[key], oracle[key]) for key in oracle)
        found[name] = {"worst_error": worst, "missed": failures(got, plain, oracle, dtype)}
    return found


def measure(
    case: Case, layers: dict[str, Layer], dtype: torch.dtype, timer: Timer, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every repetition, by provider and mode; each repetition starts with another provider."""
    autocast = None if dtype == torch.float32 else dtype
    tensors = make_tensors(case, seed=0, dtype=torch.float32, device=str(timer.device))
    dy = torch.randn(case.B, case.T, case.N, device=timer.device)
    seconds = {name: {"fwd": [], "bwd": [], "fwdbwd": []} for name in layers}
    order = list(layers)
    for repeat in range(-2, repeats):  # two rounds to warm up
        turn = repeat % len(order)
        for name in order[turn:] + order[:turn]:
            for tensor in tensors.values():
                tensor.grad = None
            forward, y = timer(lambda name=name: run_layer(layers[name], tensors, autocast))
            grad = dy.to(y.dtype)
            backward, _ = timer(lambda y=y, grad=grad: y.backward(grad))
            if repeat >= 0:
                for mode, value in (("fwd", forward), ("bwd", backward), ("fwdbwd", forward + backward)):
                    seconds[name][mode].append(value)
    return seconds


def memory(case: Case, layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, float | None]:
    """MiB that autograd keeps for the backward pass beyond the layer's own inputs, and the peak (GPU only)."""
    autocast = None if dtype == torch.float32 else dtype
    tensors = make_tensors(case, seed=0, dtype=torch.float32, device=str(device))
    inputs = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    peak = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run_layer(layer, tensors, autocast)
    y.backward(torch.ones_like(y))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    return {"saved_mib": round(sum(kept.values()) / 2**20, 3), "peak_mib": peak}


def rows_of(case: Case, routing: str, args: argparse.Namespace, timer: Timer, environment: dict) -> Iterator[dict]:
    """Gate and measure one case: a row for each provider and mode, or one row without times if the gate is shut."""
    dtype = DTYPES[args.dtype]
    layers = providers(case, routing)
    if args.compile:
        layers["compile"] = torch.compile(layers["reference"])
    gated = {name: layer for name, layer in layers.items() if name != "base"}
    gate = check(case, routing, gated, dtype, args.device)
    missed = [f"{name}: {key} {what}" for name, found in gate.items() for key, what in found["missed"].items()]
    shared = {"case": case.name, "op": case.op, "routing": routing, "dtype": args.dtype, **case.sizes()}
    if missed:
        yield {**shared, "gate": "failed", "gate_missed": missed, **environment}
        return
    seconds = measure(case, layers, dtype, timer, args.repeats)
    for provider, modes in seconds.items():
        kept = memory(case, layers[provider], dtype, timer.device)
        for mode, values in modes.items():
            low, middle, high = (torch.tensor(values).quantile(q).item() for q in (0.2, 0.5, 0.8))
            flops, moved = case.work(mode, dtype.itemsize, bottleneck=provider != "base")
            yield {
                **shared,
                "provider": provider,
                "mode": mode,
                "ms_p20": round(low * 1e3, 4),
                "ms_p50": round(middle * 1e3, 4),
                "ms_p80": round(high * 1e3, 4),
                "repeats": args.repeats,
                "clock": timer.clock,
                **kept,
                "flops": flops,
                "tflop_s": round(flops / middle / 1e12, 4),
                "bytes_moved": moved,
                "gb_s": round(moved / middle / 1e9, 3),
                "gate": "passed",
                "gate_worst_error": gate[provider]["worst_error"] if provider in gate else None,
                **environment,
            }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when every gate was passed, 1 when one was not."""
    args = build_parser().parse_args(argv)
    args.repeats = args.repeats or (QUICK_REPEATS if args.quick else 20)
    chosen = [case for case in CASES if (case.name in args.case if args.case else case.quick or not args.quick)]
    device = torch.device(args.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    rows: list[dict] = []
    try:
        timer = Timer(device, args.threads)
        environment = describe_environment(device, args.threads)
        for case in chosen:
            for routing in case.routings:
                if not args.routing or routing in args.routing:
                    print(f"{case.name} {routing} ...", file=sys.stderr, flush=True)
                    rows += rows_of(case, routing, args, timer, environment)
    finally:
        torch.set_num_threads(threads)
    if args.output:
        # One write for each run: a run that is stopped leaves the file as it was.
        with args.output.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
    print(summarise(rows))
    return 1 if any(row["gate"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
