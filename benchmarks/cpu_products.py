"""torch's own library against oneDNN for the float32 products of a layer on a CPU, in turns.

    python -m benchmarks.cpu_products --output rows.jsonl
    ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 python -m benchmarks.cpu_products

The second line hides AVX-512 from both libraries (MKL heeds the variable on Intel CPUs only). A row is one product of a
768-wide LoRA layer of rank 128, or "layer", all of them added up, as a forward and backward pass has them; ``ratio`` is
torch's time over oneDNN's, above 1 where oneDNN is faster. The table of kernels/cpu_library.py rests on such rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from routingvl.kernels.cpu_library import onednn_product

from .environment import describe_environment
from .timing import Timer, append_rows, cpu_threads, quantiles

WIDTH, RANK = 768, 128
# Left and right operand by the letters of docs/notation.md. The frozen projection of the forward pass is left out,
# because it stays with torch to keep its bits.
PRODUCTS = ("dy W", "x A'", "z B'", "dy B", "dt A", "dy' z", "dt' x")


def operands(name: str, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of a product of PRODUCTS, for M ``rows``; x and dy, and likewise t, z and dt, may be one."""
    draws = torch.Generator().manual_seed(0)
    sizes = {"W": (WIDTH, WIDTH), "A": (RANK, WIDTH), "B": (WIDTH, RANK), "x": (rows, WIDTH), "dy": (rows, WIDTH)}
    drawn = [torch.randn(sizes.get(letter.rstrip("'"), (rows, RANK)), generator=draws) for letter in name.split()]
    left, right = (x.t() if letter.endswith("'") else x for x, letter in zip(drawn, name.split(), strict=True))
    return left, right


def measure(rows: int, repeats: int, threads: int) -> list[dict]:
    """A row for each product and for the layer."""
    timer = Timer(torch.device("cpu"), threads)
    ways = {"torch": torch.mm, "onednn": onednn_product}
    found = {}
    for name in PRODUCTS:
        left, right = operands(name, rows)
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(repeats + 2):  # two to warm up
            for way in sorted(ways, reverse=turn % 2 == 0):
                spent, _ = timer(lambda way=way, left=left, right=right: ways[way](left, right))
                seconds[way] += [spent] if turn >= 2 else []
        found[name] = seconds
    found["layer"] = {
        way: [sum(times) for times in zip(*(found[p][way] for p in PRODUCTS), strict=True)] for way in ways
    }
    shared = {"M": rows, "K": WIDTH, "R": RANK, "dtype": "float32", "clock": timer.clock, "repeats": repeats}
    shared |= {"isa": torch.backends.cpu.get_cpu_capability(), **describe_environment(timer.device, threads)}
    rows_of_result = []
    for name, seconds in found.items():
        ratios = [mine / other for mine, other in zip(seconds["torch"], seconds["onednn"], strict=True)]
        times = {f"{way}_{key}": value for way in ways for key, value in quantiles(seconds[way]).items()}
        rows_of_result.append({"product": name, **times, **quantiles(ratios, "ratio", 1.0), **shared})
    return rows_of_result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and append to --output."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_products", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[320, 2040], metavar="M", help="default: 320 2040")
    parser.add_argument("--repeats", type=int, default=30, help="timed turns of each product (default 30)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    args = parser.parse_args(argv)
    with cpu_threads(args.threads):
        for rows in args.rows:
            found = measure(rows, args.repeats, args.threads)
            append_rows(args.output, found)
            for row in found:
                print(f"{row['isa']}  M {rows:5d}  {row['product']:6s}  torch {row['torch_ms_p50']:8.3f} ms"
                      f"  onednn {row['onednn_ms_p50']:8.3f} ms  ratio {row['ratio_p50']:.2f}"
                      f" ({row['ratio_p20']:.2f} to {row['ratio_p80']:.2f})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
