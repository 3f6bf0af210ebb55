"""Host time of one layer whose kernel launches do nothing: the published chain, our eager and our Triton backend.

    python -m benchmarks.layer_host_time
    python -m benchmarks.layer_host_time --case c_attn/mul --json

Runs on a CPU, from a checkout. All sides take turns in one process, on one thread, and the time is the process's CPU
time. Triton compiles for an NVIDIA GPU that tests/stub_gpu.py stands for, and its launches do nothing. torch's own
operations do compute, on tensors so small (8 rows of 32 columns) that their time is that of reaching them: on a GPU a
launch stands in the place of the arithmetic, and the published chain has two to three times as many of them.

A training case is a forward pass and a backward pass that gives the gradients of x and of the bottleneck's weights; W
and the image get none, as in training. A decoding case is a forward pass with one token for each of three beams of two
images, where the published chain projects repeated features anew and ours reads what it made of the image at the first
step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .environment import describe_environment

SIDES = ("reference", "eager", "triton")  # the first: the published chain
IMAGES, TOKENS, BEAMS, WIDTH, RANK = 2, 4, 3, 32, 4
CALLS = 20  # timed at a time


@dataclass(frozen=True)
class HostCase:
    """What is timed: GPT-2's joined projection, a linear layer or an Adapter, its routing, and how it is called."""

    layer: str
    routing: str
    dropout: float = 0.0
    decoding: bool = False
    autocast: bool = False

    @property
    def name(self) -> str:
        """As it is asked for and reported."""
        marks = {"dropout": self.dropout > 0, "decode": self.decoding, "autocast": self.autocast}
        return "/".join([self.layer, self.routing, *(mark for mark, there in marks.items() if there)])


CASES = (
    HostCase("linear", "mul"),
    HostCase("linear", "vllora"),
    HostCase("linear", "mul", autocast=True),
    HostCase("c_attn", "mul"),
    HostCase("c_attn", "vllora"),
    HostCase("c_attn", "mul", dropout=0.1),
    HostCase("adapter", "mul"),
    HostCase("adapter", "vllora"),
    HostCase("linear", "mul", decoding=True),
    HostCase("c_attn", "mul", decoding=True),
    HostCase("c_attn", "vllora", decoding=True),
)


def sides(case: HostCase) -> dict[str, Callable[[], None]]:
    """A call of the case's layer by each side, with its backward pass in training."""
    torch.manual_seed(0)
    calls, leaves = (_adapter if case.layer == "adapter" else _lora)(case)
    leaves = () if case.decoding else tuple(tensor.requires_grad_() for tensor in leaves)
    with torch.no_grad():
        dy = torch.randn_like(calls["reference"]())

    def train(call: Callable[[], torch.Tensor]) -> None:
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast("cpu", torch.bfloat16) if case.autocast else nullcontext():
            y = call()
        y.backward(dy.to(y.dtype))

    def decode(call: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad():
            call()

    return {name: partial(decode if case.decoding else train, call) for name, call in calls.items()}


def _lora(case: HostCase) -> tuple[dict[str, Callable[[], torch.Tensor]], tuple[torch.Tensor, ...]]:
    """The call of each side, and what gets a gradient in training."""
    from routingvl.kernels import project_lora_image, routed_lora_linear

    from .published_layers import published_lora_linear, published_merged_linear

    joined = case.layer == "c_attn"
    groups, outputs = (2, 3 * WIDTH) if joined else (1, WIDTH)
    rows, tokens = (IMAGES * BEAMS, 1) if case.decoding else (IMAGES, TOKENS)
    x, v = torch.randn(rows, tokens, WIDTH), torch.randn(IMAGES, 1, WIDTH)
    weight = torch.randn(WIDTH, outputs) if joined else torch.randn(outputs, WIDTH)
    bias, a, b = torch.randn(outputs), torch.randn(groups * RANK, WIDTH), torch.randn(groups * WIDTH, RANK)
    columns = (0, 2 * WIDTH) if joined else None
    # A scaling of its own costs the published chain nothing more and us nothing less than 1 would.
    chain = {"routing": case.routing, "scaling": 2.0, "dropout": case.dropout}
    ours = chain | {"groups": groups, "columns": columns, "weight_layout": "kn" if joined else "nk"}
    image, repeated = None, v
    if case.decoding:
        image = project_lora_image(v, a, b, routing=case.routing, scaling=2.0, groups=groups, decoding=True)
        repeated = v.repeat_interleave(BEAMS, 0)
    published = partial(published_merged_linear, groups=groups, columns=columns) if joined else published_lora_linear
    calls = {
        "reference": partial(published, x, repeated, weight, bias, a, b, **chain),
        "eager": partial(routed_lora_linear, x, v, weight, bias, a, b, image=image, backend="eager", **ours),
        "triton": partial(routed_lora_linear, x, v, weight, bias, a, b, image=image, backend="triton", **ours),
    }
    return calls, (x, a, b)


def _adapter(case: HostCase) -> tuple[dict[str, Callable[[], torch.Tensor]], tuple[torch.Tensor, ...]]:
    """The same of an Adapter with gelu and its residual."""
    from routingvl.kernels import routed_adapter

    from .published_layers import published_adapter

    x, v = torch.randn(IMAGES, TOKENS, WIDTH), torch.randn(IMAGES, 1, WIDTH)
    weights = torch.randn(RANK, WIDTH), torch.randn(RANK), torch.randn(WIDTH, RANK), torch.randn(WIDTH)
    same = {"routing": case.routing, "activation": "gelu", "residual": True}
    calls = {"reference": partial(published_adapter, x, v, *weights, **same)}
    calls |= {name: partial(routed_adapter, x, v, *weights, backend=name, **same) for name in SIDES[1:]}
    return calls, (x, *weights)


def measure(case: HostCase, repeats: int, wanted: Sequence[str] = SIDES) -> dict[str, list[float]]:
    """Microseconds of CPU time for a call by each side, ``repeats`` times in turns."""
    return timed({name: call for name, call in sides(case).items() if name in wanted}, repeats, CALLS)


def timed(found: Mapping[str, Callable[[], None]], repeats: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of CPU time for a call of each, ``repeats`` times in turns, of ``calls`` calls each."""
    times: dict[str, list[float]] = {name: [] for name in found}
    for call in found.values():
        for _ in range(max(calls, 4)):  # compiles, and fills the caches
            call()
    for repeat in range(repeats):
        for name in list(found)[:: 1 if repeat % 2 else -1]:
            start = time.process_time()
            for _ in range(calls):
                found[name]()
            times[name].append((time.process_time() - start) * 1e6 / calls)
    return times


def ratios(times: dict[str, list[float]]) -> dict[str, float]:
    """Each side's time over the published chain's, the median of the turns."""
    first = times[SIDES[0]]
    return {
        name: statistics.median(mine / theirs for mine, theirs in zip(found, first, strict=True))
        for name, found in times.items()
    }


def rows(case: HostCase, times: dict[str, list[float]]) -> list[dict[str, object]]:
    """Results of a case, one row per side."""
    mode = "fwd" if case.decoding else "fwdbwd"
    label = {"case": case.name, "routing": case.routing, "mode": mode}
    return [
        {**label, "provider": name, "us": [round(value, 2) for value in found], "ratio": round(ratios(times)[name], 3)}
        for name, found in times.items()
    ]


def stand_for_a_gpu() -> None:
    """Let the Triton backend run on CPU tensors of this process with launches that do nothing.

    Raises:
        RuntimeError: kernels were asked for in Triton's interpreter, or there is no checkout with its tests.
    """
    folder = Path(__file__).resolve().parent.parent / "tests"
    if not (folder / "stub_gpu.py").exists():
        raise RuntimeError("launches that do nothing come from tests/stub_gpu.py: run this from a checkout")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 runs kernels in the interpreter: unset it to time the host")
    sys.path.insert(0, str(folder))
    import stub_gpu

    from routingvl.kernels import dispatch

    stub_gpu.install(keep=False)
    dispatch.triton_obstacle = lambda device: None
    torch.set_num_threads(1)
    # What the launches leave is memory as it was found; arithmetic on denormal numbers there would be timed.
    torch.set_flush_denormal(True)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer_host_time", description=__doc__.partition("\n")[0]
    )
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="repeatable (default: all)")
    parser.add_argument("--repeats", type=int, default=40, help="timed turns of each side (default 40)")
    parser.add_argument("--json", action="store_true", help="a JSON object per case and side")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a line per case; 0."""
    args = build_parser().parse_args(argv)
    stand_for_a_gpu()
    environment = describe_environment(torch.device("cpu"), torch.get_num_threads())
    for case in CASES:
        if args.case and case.name not in args.case:
            continue
        times = measure(case, args.repeats)
        if args.json:
            for row in rows(case, times):
                print(json.dumps({**row, **environment}), flush=True)
            continue
        told = (
            f"{name} {statistics.median(times[name]):.0f} us ({ratio:.2f})" for name, ratio in ratios(times).items()
        )
        print(f"{case.name}: {', '.join(told)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
