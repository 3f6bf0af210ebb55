"""Run every Triton kernel once, in each of its forms, and check the results: for compute-sanitizer and ncu.

    compute-sanitizer --tool memcheck python -m benchmarks.each_kernel
    ncu --kernel-name lora_forward_kernel python -m benchmarks.each_kernel --sizes paper --only lora-mul
    TRITON_INTERPRET=1 python -m benchmarks.each_kernel --device cpu       # without a GPU, slowly

The exit status is 1 when a result misses the tolerance of benchmarks/gate.py or a kernel of the list never ran.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from routingvl.kernels import ROUTINGS
from routingvl.kernels.triton_common import launch as launch_module

from .gate import failures
from .layer_cases import DTYPES, Case, Layer, definition, make_tensors
from .layer_providers import ours


@dataclass(frozen=True)
class Call:
    """One layer, forward and backward.

    Attributes:
        name: what ``--only`` takes.
        op, routing, tokens, relu, activation: of the layer; ``tokens`` is L.
        dropout: of a LoRA's inputs; its results are checked for being finite only.
        decoding: one row of text per image instead of many, and no backward pass.
        kernels: what has to be launched.
    """

    name: str
    op: str
    routing: str
    kernels: tuple[str, ...]
    tokens: int = 1
    relu: bool = False
    activation: str = "gelu"
    dropout: float = 0.0
    decoding: bool = False


LORA = ("lora_forward", "lora_backward")
RANK_ONE = ("rank_one_forward", "rank_one_backward")
ADAPTER = ("adapter_forward", "adapter_backward")


def _calls() -> Iterator[Call]:
    """A layer of every kind for every routing function that the kernels compute."""
    for row in ROUTINGS.values():
        name, tokens = row.name, int(row.uses_image)
        if row.kernel_obstacle(tokens, False, "bottleneck") is None:
            way, kernels = ("rank-one", RANK_ONE) if row.is_rank_one(tokens) else ("lora", LORA)
            masked = kernels if row.is_rank_one(tokens) else (*kernels, "dropped_gradient")
            yield Call(f"{way}-{name}", "lora", name, kernels)
            yield Call(f"{way}-{name}-dropout", "merged_lora", name, masked, dropout=0.1)
            yield Call(f"{way}-{name}-decode", "merged_lora", name, kernels[:1], decoding=True)
            yield Call(f"adapter-{name}", "adapter", name, ADAPTER, activation="gelu_new")
        if row.supports_relu and row.kernel_obstacle(tokens, True, "bottleneck") is None:
            yield Call(f"lora-{name}-relu", "merged_lora", name, LORA, relu=True)
        if row.inner_product:
            yield Call(f"lora-{name}-tokens", "lora", name, LORA, tokens=9)
            yield Call(f"adapter-{name}-tokens", "adapter", name, ADAPTER, tokens=9, activation="silu")


CALLS = tuple(_calls())
KERNELS = sorted({kernel for call in CALLS for kernel in call.kernels})
SIZES = {
    "small": {"B": 5, "T": 13, "K": 72, "N": 72, "R": 12},
    "paper": {"B": 512, "T": 20, "K": 768, "N": 768, "R": 128},
}


def case_of(call: Call, sizes: dict[str, int]) -> Case:
    """The layer of ``call``; GPT-2's joined projection is three times as wide."""
    case = Case(call.name, call.op, L=call.tokens, activation=call.activation, **sizes)
    case = replace(case, N=3 * case.N) if call.op == "merged_lora" else case
    return replace(case, B=40, T=1) if call.decoding else case


def layer_of(call: Call, case: Case) -> Layer:
    """The layer on the Triton backend."""
    return ours(case, call.routing, call.dropout, "triton", call.relu)


@contextmanager
def launches_through(replacement: Callable[..., Any]) -> Iterator[None]:
    """Kernels are launched by ``replacement(launch, kind, tiles, attempt)`` inside the block."""
    original = launch_module.launch
    launch_module.launch = partial(replacement, original)
    try:
        yield
    finally:
        launch_module.launch = original


@contextmanager
def launched_kernels() -> Iterator[list[str]]:
    """The kernels launched inside the block, by name, in order."""
    seen: list[str] = []

    def counted(launch: Callable[..., Any], kind: str, *rest: Any) -> Any:
        seen.append(kind)
        return launch(kind, *rest)

    with launches_through(counted):
        yield seen


def results(layer: Callable[..., Tensor], tensors: dict[str, Tensor], dtype: torch.dtype, backward: bool) -> dict:
    """Output y and the gradients d<name> of <y, dy> for a fixed dy, with the tensors in ``dtype``."""
    leaves = {
        name: tensor.detach().to(dtype).requires_grad_(tensor.requires_grad and backward)
        for name, tensor in tensors.items()
    }
    y = layer(**leaves)
    found = {"y": y.detach()}
    if backward:
        generator = torch.Generator().manual_seed(1)
        dy = torch.randn(y.shape, generator=generator).to(next(iter(tensors.values())).device)
        wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
        # Rounded to bfloat16, which float16 holds as exactly as float64 does.
        grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy.bfloat16().to(y.dtype))
        found |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return found


def missed_by(call: Call, sizes: dict[str, int], dtype: torch.dtype, device: str) -> list[str]:
    """Run ``call``; what missed the tolerance, or was not launched, in words."""
    case = case_of(call, sizes)
    tensors = make_tensors(case, seed=0, dtype=torch.float64, device=device, rounded_to=dtype)
    with launched_kernels() as launched:
        got = results(layer_of(call, case), tensors, dtype, not call.decoding)
    missed = [f"{kernel} was not launched" for kernel in call.kernels if kernel not in launched]
    if call.dropout > 0:
        return missed + [f"{name} is not finite" for name, tensor in got.items() if not tensor.isfinite().all()]
    plain = definition(case, call.routing, call.relu)
    oracle, same = (results(plain, tensors, kind, not call.decoding) for kind in (torch.float64, dtype))
    return missed + [f"{name} {what}" for name, what in failures(got, same, oracle, dtype).items()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calls; 0 when all are right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.each_kernel", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu in Triton's interpreter")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--sizes", choices=list(SIZES), default="small", help="small (default), or the paper's")
    parser.add_argument("--only", action="append", choices=[call.name for call in CALLS], help="this call (repeatable)")
    args = parser.parse_args(argv)
    wrong = 0
    for call in CALLS:
        if args.only and call.name not in args.only:
            continue
        missed = missed_by(call, SIZES[args.sizes], DTYPES[args.dtype], args.device)
        wrong += bool(missed)
        print(f"{call.name:<24} {'; '.join(missed) or 'ok'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
