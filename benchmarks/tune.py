"""Time the tiles that fit this GPU, kernel by kernel, and write the fastest correct ones for ``ROUTINGVL_TILES``.

    python -m benchmarks.tune --output tiles.json          # again: goes on where it stopped
    python -m benchmarks.tune --dry-run --arch sm_90       # what would be tried; needs no GPU
    ROUTINGVL_TILES=tiles.json routingvl train ...

A tile is timed only after the results of its kernel passed benchmarks/gate.py. The time is that of the kernel alone, by
torch's profiler, with the cache overwritten before each call. The fastest tile of the grid is then tried with fewer
registers a thread and, but for rank-one kernels, with other numbers of programs that share a block's columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from routingvl.atomic_files import write_json
from routingvl.kernels import ROUTINGS
from routingvl.kernels.triton_common.launch import NoTileFitsError
from routingvl.kernels.triton_common.tile_file import tile_key
from routingvl.kernels.triton_common.tiles import (
    KINDS,
    SHARED_MEMORY,
    UNKNOWN_SHARED_MEMORY,
    Tile,
    arch_of,
    has_decode_tile,
    padded_rank,
    shared_memory,
)

from .each_kernel import CALLS, SIZES, Call, case_of, launches_through, layer_of, missed_by
from .kernel_times import KernelTimesError, events_of_each, total
from .layer_cases import make_tensors
from .timing import COLD_BYTES, Timer

REGISTERS = (0, 168, 128, 96, 64)  # 0: as many as the kernel needs
SPLITS = (0, 1, 2, 3, 4, 6, 8)  # 0: the rule of column_splits
COLD_CALLS = 3  # to warm up
DTYPES = {"half": torch.bfloat16, "ieee": torch.float32}
CHECKED = {"B": 16, "T": 20, "K": 768, "N": 768}  # sizes of the check of the results


def candidates(kind: str, rank: int, precision: str, decode: bool, arch: str) -> list[Tile]:
    """Tiles to try: the grid, without what the device has not enough shared memory for."""
    limit, size = SHARED_MEMORY.get(arch, UNKNOWN_SHARED_MEMORY), 2 if precision == "half" else 4
    heights = (16,) if decode or kind.startswith("rank_one") else (16, 32, 64, 128)
    widths = (64, 128, 256, 512) if kind.startswith("rank_one") else (32, 64, 128)
    grid = itertools.product(heights, widths, (4, 8), (2, 3, 4))
    tiles = [Tile(rows, columns, columns, warps, stages) for rows, columns, warps, stages in grid]
    return [tile for tile in tiles if shared_memory(kind, tile, rank, size, arch) <= limit]


def refinements(kind: str, tile: Tile, arch: str) -> list[Tile]:
    """The tile with every limit of registers (NVIDIA's) and, where programs share columns, every number of them."""
    limits = REGISTERS if arch.startswith("sm_") else (0,)
    splits = (0,) if kind.startswith("rank_one") else SPLITS
    return [replace(tile, maxnreg=most, splits=count) for most in limits for count in splits]


def cells(ranks: Sequence[int], precisions: Sequence[str]) -> Iterator[tuple[str, int, str, bool]]:
    """(kind, padded rank, precision, decode) of everything to tune; the rank plays no part in rank-one kernels."""
    widths = sorted({padded_rank(rank) for rank in ranks})
    for kind, precision in itertools.product(KINDS, precisions):
        for rank in (16,) if kind.startswith("rank_one") else widths:
            for decode in (False, True) if has_decode_tile(kind) else (False,):
                yield kind, rank, precision, decode


def call_of(kind: str, decode: bool) -> Call:
    """The plainest layer that launches this kernel and is not z = t + c u."""
    call = next(
        call
        for call in CALLS
        if kind in call.kernels and not call.relu and not call.dropout and not call.decoding and call.tokens == 1
        if ROUTINGS[call.routing].image_factor is None
    )
    return replace(call, kernels=(kind,), decoding=True) if decode else call


@contextmanager
def forced(kind: str, tile: Tile) -> Iterator[None]:
    """Kernels of this kind are launched with ``tile``; a RuntimeError, and no eager result, where it does not fit."""

    def launch_with(launch: Callable[..., Any], name: str, tiles: tuple[Tile, ...], attempt: Callable[..., Any]) -> Any:
        try:
            return launch(name, (tile,) if name == kind else tiles, attempt)
        except NoTileFitsError as error:
            raise RuntimeError(str(error)) from error

    with launches_through(launch_with):
        yield


@cache
def cold_memory() -> torch.Tensor:
    """What is overwritten so that the GPU's cache holds nothing of before."""
    return torch.zeros(COLD_BYTES, dtype=torch.int8, device="cuda")


def milliseconds(run: Callable[[], Any], device: str, kind: str, repeats: int = 20) -> float:
    """Median time of the kernel of this kind in ``run``; on a CPU, where the interpreter runs it, of the whole call.

    Raises:
        KernelTimesError: the profiler has not seen the kernel.
    """
    calls = [run] * (COLD_CALLS + repeats)
    if device != "cuda":
        times = [one.seconds for one in Timer(torch.device(device), 1, "wall").walls(calls)]
    else:
        times = [total(events, f"{kind}_kernel") for events in events_of_each(calls, cold_memory())]
    if not all(times):
        raise KernelTimesError(f"the profiler has not seen {kind}_kernel")
    return 1000 * statistics.median(times[COLD_CALLS:])


def measure(
    kind: str, tile: Tile, precision: str, decode: bool, sizes: tuple[dict, dict], device: str, repeats: int = 20
) -> float | str:
    """Milliseconds of the kernel with ``tile``, by :func:`milliseconds`, or what is wrong.

    Args:
        sizes: B, T, K, N and R of the check, and of the timing.
    """
    call, dtype = call_of(kind, decode), DTYPES[precision]
    try:
        with forced(kind, tile):
            if missed := missed_by(call, sizes[0], dtype, device):
                return "; ".join(missed)
            case = case_of(call, sizes[1])
            tensors = make_tensors(case, seed=0, dtype=dtype, device=device, rounded_to=dtype)
            layer = layer_of(call, case)
            if kind.endswith("_forward"):
                with torch.no_grad():
                    return milliseconds(lambda: layer(**tensors), device, kind, repeats)
            y = layer(**tensors)
            leaves, dy = [t for t in tensors.values() if t.requires_grad], torch.ones_like(y)
            return milliseconds(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), device, kind, repeats)
    except RuntimeError as error:  # too few resources, or the compiler refuses the tile
        return str(error).partition("\n")[0] or type(error).__name__


def read(path: Path) -> dict[str, dict]:
    """What an earlier run wrote to ``path``, or an empty start."""
    if not path.exists():
        return {"tiles": {}, "measured": {}}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return {"tiles": dict(data["tiles"]), "measured": dict(data["measured"])}
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a file of benchmarks.tune ({error!r}); remove it or name another") from error


def tile_name(tile: Tile) -> str:
    """A tile's numbers, such as 64x64x64x4x3, without zeros at the end."""
    numbers = list(astuple(tile))
    while not numbers[-1]:
        del numbers[-1]
    return "x".join(map(str, numbers))


def tune_cell(path: Path, key: str, tiles: Sequence[Tile], measure_tile: Callable[[Tile], float | str]) -> Tile | None:
    """Measure what ``path`` lacks under ``key``, writing it after each tile; the fastest one, None if none is right."""
    for tile in tiles:
        data = read(path)
        known = data["measured"].setdefault(key, {})
        name = tile_name(tile)
        if name not in known:
            known[name] = measure_tile(tile)
            print(f"{key} {name} {known[name]}", flush=True)
        times = {entry: value for entry, value in known.items() if not isinstance(value, str)}
        if times:
            best = Tile(*map(int, min(times, key=times.get).split("x")))
            data["tiles"][key] = {name: number for name, number in asdict(best).items() if number}
        write_json(path, data)
    found = read(path)["tiles"].get(key)
    return None if found is None else Tile(**found)


def main(argv: Sequence[str] | None = None) -> int:
    """Tune everything asked for; 1 when a kernel had no right tile, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("tiles.json"), help="file to write or go on with")
    parser.add_argument("--rank", type=int, action="append", help="rank to tune for (repeatable; default 128)")
    parser.add_argument("--precision", choices=list(DTYPES), action="append", help="half (default) or ieee; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="list the tiles that would be tried; needs no GPU")
    parser.add_argument("--arch", choices=list(SHARED_MEMORY), help="architecture of a dry run without a GPU (sm_90)")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not gpu and not args.dry_run:
        print("no CUDA device: tiles are timed on a GPU only; --dry-run lists what would be tried", file=sys.stderr)
        return 2
    arch = arch_of(torch.device("cuda")) if gpu and not (args.dry_run and args.arch) else args.arch or "sm_90"
    failed = False
    for kind, rank, precision, decode in cells(args.rank or [128], args.precision or ["half"]):
        key, tiles = tile_key(arch, kind, rank, precision, decode), candidates(kind, rank, precision, decode, arch)
        if args.dry_run:
            print(f"{key}: {len(tiles)} tiles: " + " ".join(map(tile_name, tiles)))
            continue
        width = 128 if kind.startswith("rank_one") else rank
        sizes = (CHECKED | {"R": width}, SIZES["paper"] | {"R": width})
        run = partial(measure, kind, precision=precision, decode=decode, sizes=sizes, device="cuda")
        best = tune_cell(args.output, key, tiles, run)
        if best is not None:
            tune_cell(args.output, key, refinements(kind, replace(best, maxnreg=0, splits=0), arch), run)
        failed |= best is None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
