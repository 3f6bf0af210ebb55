"""Measure the targets of benchmarks/NOTES.md on a GPU: after the gate, with the sides of each in turns.

    python -m benchmarks.targets --output targets.jsonl
    python -m benchmarks.targets --only T1 --only T5

Tensors have the dtype itself, without autocast; the projection's bias trains, as in the published recipe. A row (JSON
lines) is one side of a target, with four times of its forward pass, of its backward pass and of both: "kernels", their
durations added up (torch's profiler), so without launches and gaps; "graph", replayed from a CUDA graph; "wall", from
an idle device until it is idle again; "host", until the call returns. The device's cache is overwritten before each.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from routingvl.kernels import ImageCode, project_adapter_image, project_lora_image

from .cuda_graphs import free_generators
from .environment import describe_environment
from .gate import exact_convolutions, failures, relative_rms
from .kernel_times import COLD, between, device_events
from .layer_cases import CASES, DTYPES, Case, Layer, definition, make_tensors
from .layer_providers import ours, providers
from .memory import saved_mib
from .passes import attempt, in_words, turns
from .timing import COLD_BYTES, append_rows, cpu_threads, quantiles

BEAMS = 5
TOP = 12  # kernels named in a row


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        name: of the table; several lines may share it.
        case: name of a case of benchmarks/layer_cases.py.
        routing, dtype, dropout: of the layer.
        prepared: also measure our kernels with the image projected beforehand.
        compiled: also measure the published chain under torch.compile.
        stock: also measure our kernels through Triton's own launcher.
        decoding: forward passes only, the beams of one image share its features.
    """

    name: str
    case: str
    routing: str
    dtype: str = "bfloat16"
    dropout: float = 0.0
    prepared: bool = False
    compiled: bool = False
    stock: bool = False
    decoding: bool = False


TARGETS = (
    Target("T1", "roberta_lora_m10240", "mul", compiled=True, prepared=True),
    Target("T2", "roberta_lora_m10240", "vllora", compiled=True, prepared=True),
    Target("T5", "gpt2_lora_m2040", "mul", dropout=0.1, compiled=True, stock=True),
    Target("T5", "gpt2_lora_m2040", "vllora", dropout=0.1, compiled=True, stock=True),
    Target("T3", "roberta_lora_m10240", "expand", compiled=True, prepared=True),
    Target("T9", "adapter_m10240", "mul", compiled=True, prepared=True),
    Target("T11", "gpt2_lora_decode_m40", "mul", compiled=True, prepared=True, stock=True, decoding=True),
    Target("T11", "gpt2_lora_decode_m40", "vllora", prepared=True, stock=True, decoding=True),
    Target("T7", "linear_lora_m2040", "mul", prepared=True, stock=True),
    Target("T7", "linear_lora_m2040", "vllora", prepared=True, stock=True),
    Target("T10", "gpt2_adapter_m2040", "mul", compiled=True, prepared=True),
    Target("T13", "roberta_lora_m10240_l197", "vllora", prepared=True),
    Target("T8", "roberta_lora_m10240", "vllora", dtype="float32", prepared=True),
    Target("T8", "roberta_lora_m10240", "expand", dtype="float32", prepared=True),
    Target("T8", "roberta_lora_m10240", "mul", dtype="float32", prepared=True),
    Target("T8", "adapter_m10240", "mul", dtype="float32"),
    Target("T8", "adapter_m10240", "vllora", dtype="float32"),
    Target("T9", "adapter_m10240", "vllora", prepared=True),
    Target("T10", "gpt2_adapter_m2040", "vllora", prepared=True),
    Target("T1", "roberta_lora_m10240", "add", prepared=True),
    Target("T1", "roberta_lora_m10240", "none"),
)


@dataclass
class Side:
    """A layer to time.

    Attributes:
        layer: function of the case's tensors.
        tensors: what it is called with.
        dy: gradient of its result; None for a forward pass only.
        extra: further tensors that gradients are taken to.
        capture: whether it can be captured in a CUDA graph.
        around: context of every pass.
    """

    layer: Layer
    tensors: dict[str, Tensor]
    dy: Tensor | None
    extra: Sequence[Tensor] = ()
    capture: bool = True
    around: Callable[[], AbstractContextManager] = nullcontext

    def forward(self) -> Tensor:
        with self.around(), torch.set_grad_enabled(self.dy is not None):
            return self.layer(**self.tensors)

    def backward(self, y: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [tensor for tensor in self.tensors.values() if tensor.requires_grad]
        with self.around():
            return torch.autograd.grad(y, [*leaves, *self.extra], self.dy, allow_unused=True)

    def both(self) -> None:
        y = self.forward()
        if self.dy is not None:
            self.backward(y)


def prepare(case: Case, routing: str, tensors: Mapping[str, Tensor], decoding: bool = False) -> ImageCode | None:
    """The image as one layer takes it; None where the routing reads no image."""
    options = {"routing": routing, "decoding": decoding}
    if case.op == "adapter":
        return project_adapter_image(tensors["v"], tensors["down_weight"], tensors["down_bias"], **options)
    options |= {"groups": case.groups, "backend": "triton"}
    return project_lora_image(tensors["v"], tensors["a"], tensors["b"], **options)


def detached(code: ImageCode, needs_gradient: bool) -> tuple[ImageCode, list[Tensor]]:
    """The code as leaves of a graph of their own, and those leaves."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().requires_grad_(needs_gradient)

    factors = None if code.factors is None else tuple(map(leaf, code.factors))
    made = ImageCode(leaf(code.u), factors, code.gram)
    return made, [made.u, *(factors or ())] if needs_gradient else []


def prepared_layer(case: Case, routing: str, dropout: float) -> Layer:
    """Our layer with the image projected in a call of its own, for the gate."""
    layer = ours(case, routing, dropout, "triton")
    return lambda **tensors: layer(**tensors, image=prepare(case, routing, tensors))


@exact_convolutions()
def gate(case: Case, target: Target, layers: Mapping[str, Layer], device: str) -> dict[str, dict]:
    """By side: errors against float64, what misses the tolerance, and whether a second run gives the same bits."""
    dtype = DTYPES[target.dtype]
    exact = make_tensors(case, seed=0, dtype=torch.float64, device=device, rounded_to=dtype)
    dy = torch.randn(case.B, case.T, case.N, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def run(layer: Layer, kind: torch.dtype) -> dict[str, Tensor]:
        leaves = {k: tensor.detach().to(kind).requires_grad_(tensor.requires_grad) for k, tensor in exact.items()}
        y = layer(**leaves)
        wanted = [name for name, leaf in leaves.items() if leaf.requires_grad and not target.decoding]
        grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy.to(kind)) if wanted else ()
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}}

    plain = definition(case, target.routing)
    oracle, same = run(plain, torch.float64), run(plain, dtype)
    found = {}
    for name, layer in layers.items():
        got, checked = attempt(lambda layer=layer: run(layer, dtype), torch.device(device))
        if got is None:
            found[name] = {"gate": "failed", "gate_missed": checked.missed}
            continue
        missed = [f"{key} {what}" for key, what in failures(got, same, oracle, dtype).items()]
        again = run(layer, dtype)
        found[name] = {
            "gate": "failed" if missed else "passed",
            **({"gate_missed": missed} if missed else {}),
            "errors": {key: float(f"{relative_rms(got[key], oracle[key]):.3g}") for key in oracle},
            "same_bits": all(torch.equal(got[key], again[key]) for key in got),
            "first_call_s": checked.first_call_s,
        }
    return found


def sides_of(case: Case, target: Target, device: str) -> tuple[dict[str, Side], dict[str, dict]]:
    """What to time, and what the gate found of each; a side that missed it is only in the latter."""
    wanted = ("reference", "eager", "triton", *(("compile",) if target.compiled else ()))
    plain = providers(case, target.routing, 0.0, device, wanted)[0]
    layers = plain if target.dropout == 0 else providers(case, target.routing, target.dropout, device, wanted)[0]
    judged = {name: layer for name, layer in plain.items() if name != "base"}
    usable = target.prepared and target.dropout == 0 and target.routing != "none"
    if usable:
        judged["prepared"] = prepared_layer(case, target.routing, 0.0)
    found = gate(case, target, judged, device)
    tensors = make_tensors(case, seed=0, dtype=DTYPES[target.dtype], device=device)
    dy = None if target.decoding else torch.randn(case.B, case.T, case.N, device=device, dtype=DTYPES[target.dtype])
    few = tensors | {"v": tensors["v"][: max(1, case.B // BEAMS)]} if target.decoding else tensors
    # The published scatter reads its mask on the host, which a capture does not allow.
    sides = {
        name: Side(layer, tensors if name in ("reference", "compile") else few, dy,
                   capture=not (name == "reference" and case.op == "merged_lora"))
        for name, layer in layers.items()
    }  # fmt: skip
    if usable:
        with torch.set_grad_enabled(not target.decoding):
            code, leaves = detached(prepare(case, target.routing, few, target.decoding), not target.decoding)
        for name, backend in (("prepared", "triton"), *((("eager_prepared", "eager"),) if target.decoding else ())):
            layer = partial(ours(case, target.routing, 0.0, backend), image=code)
            sides[name] = Side(layer, few, dy, leaves)
        if target.decoding:
            found["eager_prepared"] = found["eager"]
    if target.stock:
        name = "prepared" if usable else "triton"
        sides[f"{name}_stock"] = replace(sides[name], around=stock_launcher, capture=False)
        found[f"{name}_stock"] = found[name]
    return {name: side for name, side in sides.items() if found.get(name, {}).get("gate") != "failed"}, found


@contextmanager
def stock_launcher() -> Iterator[None]:
    """Triton's own way of launching inside the block."""
    from routingvl.kernels.adapter import ops as adapter_ops
    from routingvl.kernels.lora import ops as lora_ops
    from routingvl.kernels.triton_common.cached_launcher import CachedKernel

    kernels = [value for module in (lora_ops, adapter_ops) for value in vars(module).values()]
    kernels = [kernel for kernel in kernels if isinstance(kernel, CachedKernel) and kernel._direct]
    for kernel in kernels:
        kernel._direct = False
    try:
        yield
    finally:
        for kernel in kernels:
            kernel._direct = True


class Clocks:
    """The four times of a side, in microseconds."""

    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self._cold = torch.zeros(COLD_BYTES, dtype=torch.int8, device=device)

    def cool(self) -> None:
        """Overwrite the cache."""
        self._cold.bitwise_not_()

    def walls(self, sides: Mapping[str, Side]) -> dict[str, dict[str, list[float]]]:
        """By side: wall_fwd, wall_bwd, host_fwd, host_bwd of every repetition."""
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sides}

        def timed(name: str, part: str, counts: bool, call: Callable[[], Tensor | None]) -> Tensor | None:
            self.cool()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            result = call()
            returned = time.perf_counter()
            torch.cuda.synchronize()
            end = time.perf_counter()
            if counts:
                found[name][f"host_{part}"].append(1e6 * (returned - begin))
                found[name][f"wall_{part}"].append(1e6 * (end - begin))
            return result

        for name, counts in turns(sides, self.repeats):
            side = sides[name]
            y = timed(name, "fwd", counts, side.forward)
            if side.dy is not None:
                timed(name, "bwd", counts, lambda side=side, y=y: side.backward(y))
        return found

    def kernels(self, sides: Mapping[str, Side]) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict]]:
        """By side: kernels_fwd and kernels_bwd of every repetition; and the means of its longest kernels."""
        order = list(turns(sides, self.repeats))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for name, _ in order:
                side = sides[name]
                self.cool()
                y = side.forward()
                self.cool()
                if side.dy is not None:
                    side.backward(y)
            torch.cuda.synchronize()
        pieces = between(device_events(profile), COLD)
        if len(pieces) != 2 * len(order):
            raise RuntimeError(f"the profiler saw {len(pieces)} of {2 * len(order)} passes")
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sides}
        single: dict[str, dict] = {name: {"fwd": defaultdict(float), "bwd": defaultdict(float)} for name in sides}
        for number, (name, counts) in enumerate(order):
            if not counts:
                continue
            for part, piece in zip(("fwd", "bwd"), pieces[2 * number : 2 * number + 2], strict=True):
                if part == "fwd" or sides[name].dy is not None:
                    found[name][f"kernels_{part}"].append(sum(length for _, _, length in piece))
                for kernel, _, length in piece:
                    single[name][part][kernel[:90]] += length / self.repeats
        tops = {
            name: {
                part: {
                    kernel: round(mean, 2) for kernel, mean in sorted(means.items(), key=lambda pair: -pair[1])[:TOP]
                }
                for part, means in parts.items()
            }
            for name, parts in single.items()
        }
        return found, tops

    def graphs(self, sides: Mapping[str, Side]) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
        """By side: graph_fwd and graph_fwdbwd of every repetition; and why another was not captured."""
        captured, refused = {}, {}
        for name, side in sides.items():
            if not side.capture:
                continue
            parts = {"fwd": side.forward} | ({} if side.dy is None else {"fwdbwd": side.both})
            for part, run in parts.items():
                graph, checked = attempt(lambda run=run: capture(run), torch.device(self.device))
                if graph is None:
                    refused[name] = checked.missed[0]
                    break
                captured[name, part] = graph
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in sides}
        for (name, part), counts in turns(captured, self.repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.cool()
            start.record()
            captured[name, part].replay()
            end.record()
            torch.cuda.synchronize()
            if counts:
                found[name][f"graph_{part}"].append(1e3 * start.elapsed_time(end))
        return found, refused


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``run``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception as error:
        free_generators()
        raise (error.__context__ or error) from None  # leaving a block that failed fails again and hides why
    return graph


def rows_of(target: Target, clocks: Clocks) -> list[dict]:
    """A row a side."""
    case = next(case for case in CASES if case.name == target.case)
    torch.compiler.reset()
    sides, found = sides_of(case, target, clocks.device)
    label = {"target": target.name, "case": case.name, "routing": target.routing, "dtype": target.dtype}
    label |= {"dropout": target.dropout, **case.sizes()}
    if found["reference"]["gate"] == "failed":
        return [{**label, "side": name, **checked} for name, checked in found.items()]
    times = clocks.walls(sides)
    try:
        kernels, tops = clocks.kernels(sides)
    except RuntimeError as error:  # no profiler here: the other clocks still tell
        print(f"no kernel times: {error}", file=sys.stderr)
        kernels, tops = {}, {}
    graphs, refused = clocks.graphs(sides)
    rows = []
    for name in dict.fromkeys([*sides, *found]):
        row = {**label, "side": name, **found.get(name, {})}
        if name in sides:
            values = {**times[name], **kernels.get(name, {}), **graphs[name]}
            for clock in ("wall", "host", "kernels"):
                if f"{clock}_bwd" in values:
                    pairs = zip(values[f"{clock}_fwd"], values[f"{clock}_bwd"], strict=True)
                    values[f"{clock}_fwdbwd"] = [sum(pair) for pair in pairs]
            row["us"] = {key: list(quantiles(each, "us", 1.0).values()) for key, each in values.items() if each}
            row["kernels"] = tops.get(name)
            row |= {"graph_refused": refused[name]} if name in refused else {}
            side = sides[name]
            if side.dy is not None:
                row["saved_mib"] = saved_mib(side.forward, [*side.tensors.values(), *side.extra])
        rows.append(row)
    return rows


def table(rows: Sequence[dict]) -> str:
    """Times in microseconds, and in parentheses the reference's over them."""
    keys = ("kernels_fwd", "kernels_fwdbwd", "graph_fwd", "graph_fwdbwd", "wall_fwd", "wall_fwdbwd", "host_fwdbwd")
    lines = ["target routing dtype side | " + " | ".join(keys)]
    for row in rows:
        name = f"{row['target']} {row['routing']} {row['dtype']} {row['side']}"
        if "us" not in row:
            lines.append(f"{name} | {row.get('gate_missed') or row.get('skipped')}")
            continue
        base = next(r for r in rows if r["side"] == "reference" and all(r[k] == row[k] for k in ("target", "case",
                    "routing", "dtype")))  # fmt: skip
        cells = []
        for key in keys:
            value, other = (r["us"].get(key, [None] * 3)[1] for r in (row, base))
            cells.append("-" if value is None else f"{value:.1f}" + (f" ({other / value:.2f})" if other else ""))
        lines.append(f"{name} | " + " | ".join(cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 when one of our sides missed the gate, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__.partition("\n")[0])
    names = list(dict.fromkeys(target.name for target in TARGETS))
    parser.add_argument("--only", action="append", choices=names, help="this target (repeatable; default: all)")
    parser.add_argument("--repeats", type=int, default=20, help="repetitions of each measurement (default 20)")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled reference")
    parser.add_argument("--time-limit", type=float, metavar="S", help="begin nothing new after S seconds")
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: the targets are a GPU's", file=sys.stderr)
        return 2
    begun, rows = time.monotonic(), []
    environment = describe_environment(torch.device("cuda"), 1)
    with cpu_threads(1):
        clocks = Clocks("cuda", args.repeats)
        for target in TARGETS:
            if args.only and target.name not in args.only:
                continue
            if args.time_limit and time.monotonic() - begun > args.time_limit:
                print(f"left out: {target}")
                continue
            target = replace(target, compiled=target.compiled and not args.no_compile)
            try:
                made = rows_of(target, clocks)
            except Exception as error:  # the other targets are still measured
                traceback.print_exc()
                made = [{"target": target.name, "case": target.case, "routing": target.routing, "dtype": target.dtype,
                         "side": "all", "gate": "failed", "gate_missed": [in_words(error)]}]  # fmt: skip
            append_rows(args.output, [{**row, "repeats": args.repeats, **environment} for row in made])
            print(table(made), f"{time.monotonic() - begun:.0f} s", sep="\n", flush=True)
            rows += made
    return int(any(row.get("gate") == "failed" for row in rows if row["side"] not in ("reference", "compile")))


if __name__ == "__main__":
    sys.exit(main())
