"""Measure what the device can do at most: copying, products of matrices, and the product that LoRA ends with.

    python -m benchmarks.ceilings                       # on the GPU where there is one
    python -m benchmarks.ceilings --device cpu --output ceilings.jsonl

Rows (JSON lines) are "copy" (GB/s, bytes read plus bytes written), "matmul" (TFLOP/s of a square product) and "addmm"
(y += t bᵀ with an inner dimension of 128, in place: GB/s and TFLOP/s), the last two for each dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .environment import describe_environment
from .layer_cases import DTYPES
from .timing import Timer, append_rows, cpu_threads, default_clock, quantiles

# By type of device: bytes copied, side of the square product, rows and columns of the addmm.
SIZES = {"cpu": (2**28, 1024, 1280, 768), "cuda": (2**30, 8192, 10240, 768)}
INNER = 128


def _median_row(name: str, dtype: str, call: Callable[[], Tensor], work: tuple[int, int], timer: Timer) -> dict:
    """Ten timed calls after one to warm up, at most about two seconds of them."""
    flops, moved = work
    timer(call)
    seconds = [timer(call)[0]]
    while len(seconds) < 10 and sum(seconds) < 2.0:
        seconds.append(timer(call)[0])
    found = quantiles(seconds)
    middle = found["ms_p50"] / 1e3
    rates = {"gb_s": _rounded(moved / middle / 1e9), "tflop_s": _rounded(flops / middle / 1e12) if flops else None}
    return {"ceiling": name, "dtype": dtype, **found, "repeats": len(seconds), "clock": timer.clock, **rates}


def _rounded(rate: float) -> float:
    """To five significant digits, so that a low rate, by which times are divided, is not 0."""
    return float(f"{rate:.5g}")


def measure_ceilings(timer: Timer, dtypes: Sequence[str], sizes: tuple[int, int, int, int] | None = None) -> list[dict]:
    """Rows of copy, and for each of ``dtypes`` of matmul and addmm; ``sizes`` as in SIZES, whose row is the default."""
    return list(_ceilings(timer, dtypes, sizes or SIZES["cuda" if timer.device.type == "cuda" else "cpu"]))


def _ceilings(timer: Timer, dtypes: Sequence[str], sizes: tuple[int, int, int, int]) -> Iterator[dict]:
    size, side, rows, columns = sizes
    source = torch.ones(size // 4, device=timer.device)
    target = torch.empty_like(source)
    yield _median_row("copy", "float32", lambda: target.copy_(source), (0, 2 * source.nbytes), timer)
    for name in dtypes:
        dtype = DTYPES[name]
        a, b = (torch.randn(side, side, device=timer.device).to(dtype) for _ in range(2))
        work = (2 * side**3, 3 * a.nbytes)
        yield _median_row("matmul", name, lambda a=a, b=b: a @ b, work, timer)
        y = torch.zeros(rows, columns, device=timer.device, dtype=dtype)
        t, up = (torch.randn(n, INNER, device=timer.device).to(dtype) for n in (rows, columns))
        work = (2 * rows * columns * INNER, 2 * y.nbytes + t.nbytes + up.nbytes)
        yield _median_row("addmm", name, lambda y=y, t=t, up=up: y.addmm_(t, up.T), work, timer)


class Limits:
    """The least time that a case can take on a device with these ceilings."""

    def __init__(self, rows: Sequence[dict]) -> None:
        self.copy = next(row["gb_s"] for row in rows if row["ceiling"] == "copy") * 1e9
        self.matmul = {row["dtype"]: row["tflop_s"] * 1e12 for row in rows if row["ceiling"] == "matmul"}

    def seconds(self, flops: int, moved: int, dtype: str) -> tuple[float, str]:
        """Seconds at the full rate of products or of memory, whichever takes longer, and its name."""
        return max((flops / self.matmul[dtype], "matmul"), (moved / self.copy, "copy"))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ceilings of a device, and write them as JSON lines where asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceilings", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1, whose CPU time is measured)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this (repeatable; default: all)")
    parser.add_argument("--output", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    with cpu_threads(args.threads):
        clock = "gpu" if device.type == "cuda" else default_clock(device, args.threads)
        found = measure_ceilings(Timer(device, args.threads, clock), args.dtype or list(DTYPES))
        environment = describe_environment(device, args.threads)
    for row in found:
        rate = "" if row["tflop_s"] is None else f", {row['tflop_s']:.4g} TFLOP/s"
        print(f"{row['ceiling']:<7} {row['dtype']:<9} {row['gb_s']:9.2f} GB/s{rate}")
    print(f"{environment['device']}, {args.threads} thread(s), torch {environment['torch']}, clock {clock}")
    append_rows(args.output, [{**row, **environment} for row in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
