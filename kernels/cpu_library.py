"""Which library multiplies float32 on this CPU: torch's own, MKL, or oneDNN, which torch brings along for bfloat16.

Torch has an operation for its compiler that takes float32 to oneDNN; without it everything stays with torch. The two
differ in the order of their sums only. That is reason enough not to let a clock decide where measurements are at hand:
for the CPUs in ``MEASURED`` the answer is the same in every process. Elsewhere a probe decides, once per number of
threads, and only a clear difference counts; under ``torch.use_deterministic_algorithms`` it is not asked.
"""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

CPU_LIST = Path("/proc/cpuinfo")
MAKERS = ("GenuineIntel", "AuthenticAMD")

# Whether oneDNN is faster, by maker and instruction set (benchmarks/results/cpu_products.jsonl, cpu_layers_amd.jsonl).
# On Intel the products of a layer take as long or longer through it, those with a transposed left side up to twice as
# long; MKL leaves the AVX-512 of AMD's CPUs unused.
MEASURED = {("GenuineIntel", "AVX512"): False, ("GenuineIntel", "AVX2"): False, ("AuthenticAMD", "AVX512"): True}

CLEARLY_FASTER = 1.15
PROBE_ROUNDS = 3


def onednn_is_faster() -> bool:
    """Whether float32 products run faster through oneDNN than as torch computes them, on this CPU and these threads.

    False where torch's products are not MKL's, as on ARM, or where torch has no oneDNN operation for them.
    """
    known = measured()
    if known is not None:
        return known
    return not torch.are_deterministic_algorithms_enabled() and _probed(torch.get_num_threads())


def in_words() -> str:
    """Which library multiplies float32 here, and why, for reports; probes where that decides."""
    if not torch.backends.mkl.is_available():
        return "torch's own"
    why = "by a probe of this CPU" if measured() is None else "as measured on such CPUs"
    return f"{'oneDNN' if onednn_is_faster() else 'MKL'}, {why}"


@functools.cache
def measured() -> bool | None:
    """The answer where it takes no probe; None: this CPU is not in the table."""
    if not (torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    described = CPU_LIST.read_text() if CPU_LIST.exists() else platform.processor()
    maker = next((name for name in MAKERS if name in described), "another")
    return MEASURED.get((maker, torch.backends.cpu.get_cpu_capability()))


@functools.cache
def _probed(threads: int) -> bool:
    return probe(threads) >= CLEARLY_FASTER


def probe(threads: int) -> float:
    """How many times as fast oneDNN is as torch in the products of a small LoRA layer; takes some tens of ms."""
    draws = torch.Generator().manual_seed(0)  # torch's own stays as it is
    kind = {"generator": draws, "dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are
    (x, w), (a, other) = torch.randn(2, 384, 384, **kind), torch.randn(2, 96, 384, **kind)
    t = other.t().contiguous()
    # dx, t, what t adds to y or dx, and the gradient of a weight: twice each but the first, as a step has them.
    pairs = [(x, w), *[(x, a.t()), (t, a), (t.t(), x)] * 2]
    clock = time.thread_time if threads == 1 else time.perf_counter
    ways = (torch.mm, onednn_product)
    with torch.autocast("cpu", enabled=False):
        best = [_seconds(way, pairs, clock) * float("inf") for way in ways]  # this round makes code, and is not timed
        for _ in range(PROBE_ROUNDS):
            best = [min(least, _seconds(way, pairs, clock)) for least, way in zip(best, ways, strict=True)]
    return best[0] / best[1]


def _seconds(way: Callable[[Tensor, Tensor], Tensor], pairs: list, clock: Callable[[], float]) -> float:
    start = clock()
    for left, right in pairs:
        way(left, right)
    return clock() - start


def onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """left right through oneDNN: [M, K] and [K, N], in any layout, give [M, N]."""
    return onednn_linear(left, right.t(), None)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, plus: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias + plus: x [M, K], weight [N, K] in any layout, plus [M, N] -> [M, N] in new memory."""
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # for columns of a larger matrix oneDNN has slow code only
    multiply = torch.ops.mkldnn._linear_pointwise
    if plus is None:
        return multiply(x, weight, bias, "none", [], "")
    return multiply.binary(x, plus, weight, bias, "add")
