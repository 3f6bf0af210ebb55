"""Host time of a training step whose kernel launches do nothing: what Python and torch take before a GPU is asked.

    python -m benchmarks.host_time . ../other-checkout --case gpt2/lora/mul

Each checkout runs in a process of its own, in turns, and is compared with the first. Triton compiles for an NVIDIA GPU
that tests/stub_gpu.py stands for; its launches are only written down, so the results mean nothing and the time is the
process's CPU time. Models are small and random, with 12 layers as the base models have.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CASES = [f"{model}/{method}/{routing}" for model in ("gpt2", "roberta") for method in ("lora", "adapter")
         for routing in ("add", "mul", "expand", "vllora")]  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__.partition("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path, help="folders of this repository; the first is the measure")
    parser.add_argument("--case", action="append", help="MODEL/METHOD/ROUTING (repeatable; default: all)")
    parser.add_argument("--repeats", type=int, default=30, help="timed turns of each checkout (default 30)")
    parser.add_argument("--layers", type=int, default=12, help="transformer layers (default 12)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def training_step(case: str, layers: int) -> Callable[[], None]:
    """A forward and a backward pass of the model that ``case`` names, its bottlenecks on the Triton backend."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

    from routingvl import RoutingConfig, VisualContext, inject

    kind, method, routing = case.split("/")
    if kind == "gpt2":
        sizes = {"n_embd": 64, "n_layer": layers, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, **sizes)).eval()
    else:
        sizes = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64}
        model = RobertaModel(RobertaConfig(vocab_size=64, max_position_embeddings=64, **sizes)).eval()
    context = VisualContext()
    inject(model, RoutingConfig(method=method, routing=routing, rank=16), context, backend="triton")
    ids, features = torch.randint(3, 60, (2, 8)), torch.randn(2, 1, 64)

    def step() -> None:
        with context.bind(features):
            output = model(input_ids=ids)[0]
        output.sum().backward()
        model.zero_grad(set_to_none=True)

    return step


def work(layers: int) -> None:
    """Read a case per line; answer with the milliseconds of one step."""
    import stub_gpu
    import torch

    from routingvl.kernels import dispatch

    stub_gpu.install()
    dispatch.triton_obstacle = lambda device: None
    torch.set_num_threads(1)
    known: dict[str, Callable[[], None]] = {}
    for case in map(str.strip, sys.stdin):
        if case not in known:
            known = {case: training_step(case, layers)}
            for _ in range(5):  # compiles, and fills the caches
                known[case]()
        start = time.process_time()
        for _ in range(2):
            known[case]()
        print((time.process_time() - start) * 500, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a line per case; 0."""
    args = build_parser().parse_args(argv)
    if args.worker:
        work(args.layers)
        return 0
    processes = []
    for folder in map(Path.resolve, args.checkouts):
        environment = os.environ | {"PYTHONPATH": f"{folder}:{folder / 'tests'}", "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, __file__, "--worker", "--layers", str(args.layers), str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        processes.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))
    for case in args.case or CASES:
        times: list[list[float]] = [[] for _ in processes]
        for repeat in range(args.repeats + 1):
            for process, found in list(zip(processes, times, strict=True))[:: 1 if repeat % 2 else -1]:
                print(case, file=process.stdin, flush=True)
                found.append(float(process.stdout.readline()))
        for folder, found in zip(args.checkouts, times, strict=True):
            ratio = statistics.median(mine / first for mine, first in zip(found[1:], times[0][1:], strict=True))
            print(f"{case} {folder}: {statistics.median(found[1:]):.2f} ms, {ratio:.3f} of the first", flush=True)
    for process in processes:
        process.stdin.close()
        process.wait()
        process.stdout.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
