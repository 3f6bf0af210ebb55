"""Tile configurations of the Triton kernels, as data: by kernel, rank, precision and architecture family.

No autotuning while a model runs: a table says how many rows, columns, warps and pipeline stages a program gets, and
what the table proposes is shrunk until it fits the device's shared memory. ``docs/kernels.md`` says what the entries
rest on: what compiles without spilling registers (``python -m benchmarks.codegen``), not measurements on a GPU.
Measured ones come from a file, see :mod:`routingvl.kernels.triton_common.tile_file`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType

import torch

from ..float32_precision import tf32_allowed
from .tile_file import measured_tile, tile_key

DECODE_ROWS = 64  # up to so many rows a forward pass is bound by latency and takes the decode tile
MIN_RANK, MAX_RANK = 16, 256  # tl.dot takes no smaller side; above, a low-rank activation no longer fits the registers
_KIB = 1024

# Shared memory one program may have, in bytes, by architecture; the vendors' documents give these figures.
_SHARED_KIB = {
    64: "sm_75 gfx90a gfx942",
    99: "sm_86 sm_89 sm_120 sm_121",
    160: "gfx950",
    163: "sm_80 sm_87",
    227: "sm_90 sm_100 sm_103",
}
SHARED_MEMORY: Mapping[str, int] = MappingProxyType(
    {arch: kib * _KIB for kib, archs in _SHARED_KIB.items() for arch in archs.split()}
)
UNKNOWN_SHARED_MEMORY = 48 * _KIB  # what every GPU has had for a decade


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        block_m: rows of text a program owns (at a time).
        block_n: columns of y (in the backward pass: of dy) taken in one step.
        block_k: columns of x (in the backward pass: of dx) taken in one step.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        maxnreg: registers a thread may have, so that more programs share a processor; 0: as many as it needs. What does
            not fit is spilled. NVIDIA's only.
        splits: programs that share the columns of y of one block of rows; 0: as many as :func:`column_splits` says.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int = 0
    splits: int = 0


# Largest padded rank a row serves -> tile, for the three precisions of the products: "half" (bfloat16, float16), "tf32"
# (float32 on the tensor cores) and "ieee" (float32 exactly, without tensor cores on NVIDIA).
_Rows = Mapping[int, Tile]
_FORWARD: Mapping[str, _Rows] = {
    "half": {128: Tile(64, 64, 64, 4, 3), 256: Tile(64, 64, 64, 8, 3)},
    "tf32": {128: Tile(64, 32, 32, 8, 3), 256: Tile(32, 32, 32, 8, 2)},
    "ieee": {128: Tile(32, 32, 32, 8, 2), 256: Tile(16, 32, 32, 8, 2)},
}
_LORA_BACKWARD: Mapping[str, _Rows] = {
    "half": {32: Tile(64, 64, 64, 4, 3), 128: Tile(64, 64, 64, 8, 3), 256: Tile(32, 32, 32, 8, 3)},
    "tf32": {128: Tile(32, 32, 32, 8, 2), 256: Tile(16, 32, 32, 4, 2)},
    "ieee": {128: Tile(32, 32, 32, 8, 2), 256: Tile(16, 32, 32, 8, 2)},
}
_ADAPTER_BACKWARD: Mapping[str, _Rows] = {
    **_LORA_BACKWARD,
    "half": {**_LORA_BACKWARD["half"], 256: Tile(32, 64, 64, 8, 2)},
}
_DECODE: Mapping[str, _Rows] = {
    "half": {256: Tile(16, 64, 64, 4, 3)},
    "tf32": {256: Tile(16, 32, 32, 4, 2)},
    "ieee": {256: Tile(16, 32, 32, 4, 2)},
}
# No matrix instructions here: long rows for wide loads. The rank plays no part.
_RANK_ONE: Mapping[str, _Rows] = {
    "half": {256: Tile(16, 256, 256, 4, 2)},
    "tf32": {256: Tile(16, 128, 128, 4, 2)},
    "ieee": {256: Tile(16, 128, 128, 4, 2)},
}
# Every kind of kernel the table serves.
_KINDS: Mapping[str, Mapping[str, _Rows]] = {
    "lora_forward": _FORWARD,
    "lora_backward": _LORA_BACKWARD,
    "adapter_forward": _FORWARD,
    "adapter_backward": _ADAPTER_BACKWARD,
    "rank_one_forward": _RANK_ONE,
    "rank_one_backward": _RANK_ONE,
}
KINDS = tuple(_KINDS)
# What an architecture or its family needs otherwise: (either, kind, precision) -> rows. On CDNA a thread has twice as
# many registers with at most four waves as with eight, and half of the shared memory is there for them.
_CDNA_HALF: _Rows = {64: Tile(64, 64, 64, 4, 2), 128: Tile(32, 64, 64, 4, 2), 256: Tile(32, 32, 32, 4, 2)}
_CDNA_IEEE: _Rows = {128: Tile(32, 32, 32, 4, 2), 256: Tile(16, 16, 16, 4, 2)}
_OVERRIDES: Mapping[tuple[str, str, str], _Rows] = {
    ("sm_90", "adapter_backward", "tf32"): {128: Tile(16, 32, 32, 8, 2), 256: Tile(16, 32, 32, 4, 2)},
    # Measured for GPT-2's joined projection: 37 us instead of 47.
    ("sm_90", "lora_backward", "half"): {**_LORA_BACKWARD["half"], 256: Tile(32, 64, 64, 8, 3)},
    # One warp, because then no sum over the rows of a program crosses warps: a quarter of the time on an H100.
    ("sm_90", "rank_one_backward", "half"): {256: Tile(16, 128, 128, 1, 2)},
    ("sm_90", "adapter_backward", "ieee"): {128: Tile(32, 16, 16, 8, 2), 256: Tile(16, 32, 32, 8, 2)},
    # What fits there of the usual tile, 64 x 16 x 16, spills.
    ("sm_86", "lora_forward", "half"): {**_FORWARD["half"], 256: Tile(32, 32, 32, 8, 2)},
    ("sm_86", "lora_backward", "ieee"): {256: Tile(16, 32, 32, 8, 2)},
    # There ptxas gives a program of eight warps 128 registers, whatever else it spills.
    **{
        (arch, "adapter_backward", "ieee"): {128: Tile(16, 32, 32, 8, 2), 256: Tile(16, 16, 16, 16, 2)}
        for arch in ("sm_120", "sm_121")
    },
    **{("gfx942", kind, "half"): _CDNA_HALF for kind in KINDS if not kind.startswith("rank_one")},
    **{("gfx942", kind, "ieee"): _CDNA_IEEE for kind in ("lora_backward", "adapter_backward")},
}


def family_of(arch: str) -> str:
    """The family whose tiles ``arch`` takes: "sm_80", "sm_90", "sm_100", "gfx942" or "default"."""
    if arch.startswith("gfx9"):
        return "gfx942"
    if not arch.startswith("sm_"):
        return "default"
    capability = int(arch.removeprefix("sm_").rstrip("af"))
    if capability >= 120 or capability < 90:  # consumer Blackwell has neither wgmma nor tcgen05
        return "sm_80"
    return "sm_100" if capability >= 100 else "sm_90"


@cache
def arch_of(device: torch.device) -> str:
    """Architecture of a device: "sm_90", "gfx942", ...; "default" for what is neither NVIDIA's nor AMD's."""
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def has_tf32(arch: str) -> bool:
    """Whether an architecture multiplies float32 rounded to tf32: NVIDIA's from sm_80 on, gfx942."""
    return arch == "gfx942" or (arch.startswith("sm_") and not before_ampere(arch))


def before_ampere(arch: str) -> bool:
    """Whether an architecture is NVIDIA's, and older than sm_80: Triton has no matrix instructions for it."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_").rstrip("af")) < 80


def precision_of(dtype: torch.dtype, arch: str) -> str:
    """Precision of the products: "half", "tf32" or "ieee"; the middle one where torch.backends allows it."""
    if dtype != torch.float32:
        return "half"
    rounded = arch.startswith("sm_") and has_tf32(arch)
    return "tf32" if rounded and tf32_allowed() else "ieee"


def padded_rank(rank: int) -> int:
    """The power of two that a low-rank activation of this rank occupies in a kernel; ``ValueError`` above 256."""
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"the Triton kernels take ranks 1 to {MAX_RANK}, got {rank}")
    return max(MIN_RANK, 1 << (rank - 1).bit_length())


def shared_memory(kind: str, tile: Tile, rank: int, element_size: int, arch: str) -> int:
    """Upper estimate of a program's shared memory in bytes; tests/benchmarks/test_codegen.py has the truth."""
    if kind.startswith("rank_one"):
        return 4 * _KIB
    width = padded_rank(rank)
    # Loops that load a tile which is no operand of a product ask for a depth of their own.
    down_stages = 3 if kind.endswith("_backward") else tile.num_stages
    up_stages = {"lora_forward": 4, "adapter_forward": 3}.get(kind, tile.num_stages)
    spare = 1 if family_of(arch) == "gfx942" else 0  # one step of the pipeline stays in registers there
    down = (down_stages - spare) * tile.block_k * (tile.block_m + width)
    up = (up_stages - spare) * tile.block_n * (tile.block_m + width)
    return (max(down, up) + tile.block_m * width) * element_size + 4 * _KIB  # with t, and room for sums


def shrunken(tile: Tile) -> Iterator[Tile]:
    """Ever smaller tiles after ``tile``: a shallower pipeline first, then narrower steps, then fewer rows."""
    while tile.num_stages > 2:
        tile = replace(tile, num_stages=tile.num_stages - 1)
        yield tile
    while max(tile.block_n, tile.block_k) > 16:
        tile = replace(tile, block_n=max(tile.block_n // 2, 16), block_k=max(tile.block_k // 2, 16))
        yield tile
    while tile.block_m > 16:
        tile = replace(tile, block_m=tile.block_m // 2)
        yield tile
    yield replace(tile, num_stages=1)


def has_decode_tile(kind: str) -> bool:
    """Whether few rows take a tile of their own in this kind of kernel."""
    return kind.endswith("_forward") and not kind.startswith("rank_one")


def _measured(kind: str, rank: int, precision: str, decode: bool, arch: str) -> Mapping[str, int] | None:
    return measured_tile(tile_key(arch, kind, padded_rank(rank), precision, decode and has_decode_tile(kind)), KINDS)


@cache
def tiles_for(kind: str, rank: int, precision: str, decode: bool, arch: str) -> tuple[Tile, ...]:
    """Every tile of a kernel that fits the device, best first.

    The first is the one of the file that ``ROUTINGVL_TILES`` names, where it has an entry, else the table's.

    Args:
        kind: which kernel, one of ``KINDS``.
        rank: width of the low-rank activation, groups times rank, 1 to 256.
        precision: as :func:`precision_of` gives it.
        decode: there are at most DECODE_ROWS rows of text.
        arch: as :func:`arch_of` gives it; unknown ones get a small, safe tile.

    Raises:
        KeyError: no such kind.
        ValueError: the rank is out of range.
        TilesFileError: that file cannot be used.
    """
    served = "decode" if decode and has_decode_tile(kind) else kind
    kinds = {**_KINDS, "decode": _DECODE}
    overrides = (_OVERRIDES.get((name, served, precision)) for name in (arch, family_of(arch)))
    table = next(filter(None, overrides), kinds[served][precision])
    width = padded_rank(rank)
    measured = _measured(kind, rank, precision, decode, arch)
    first = next(tile for limit, tile in sorted(table.items()) if width <= limit) if not measured else Tile(**measured)
    element_size = 2 if precision == "half" else 4
    limit = SHARED_MEMORY.get(arch, UNKNOWN_SHARED_MEMORY)
    every = (first, *shrunken(first))
    fitting = tuple(tile for tile in every if shared_memory(kind, tile, rank, element_size, arch) <= limit)
    return fitting or every[-1:]  # the estimate errs on the high side, so the smallest is worth a try


@cache
def tiles_for_call(
    kind: str,
    rank: int,
    precision: str,
    decode: bool,
    arch: str,
    *,
    few: bool = False,
    one_wave: bool = False,
    dropout: bool = False,
    relu: bool = False,
    two_parts: bool = False,
    apart: bool = False,
) -> tuple[Tile, ...]:
    """:func:`tiles_for`, changed by what the call is like.

    On Hopper GPUs by what was measured to pay on an H100 (benchmarks/NOTES.md); on NVIDIA's all, a rank-one program
    takes both halves of an image, because its parts would have to be added up by another kernel.

    Args:
        kind, rank, precision, decode, arch: as there.
        few: there are fewer blocks of 64 rows than processors.
        one_wave: there are no more blocks of 16 rows than processors.
        dropout: the kernel draws a mask.
        relu: it applies ReLU, or an Adapter's gelu_new, which take registers.
        two_parts: of a rank-one kernel whose tile has half as many rows as an image or little more.
        apart: each group of projections has programs of its own.
    """
    tiles = tiles_for(kind, rank, precision, decode, arch)
    if not arch.startswith("sm_") or decode or _measured(kind, rank, precision, decode, arch):
        return tiles
    if kind == "rank_one_backward" and two_parts:
        tiles = tuple(replace(tile, block_m=2 * tile.block_m, num_warps=2 * tile.num_warps) for tile in tiles)
    if family_of(arch) != "sm_90" or precision != "half":
        return tiles
    width = padded_rank(rank)
    return tuple(dict.fromkeys(_on_hopper(kind, tile, width, few, one_wave, dropout, relu, apart) for tile in tiles))


def _on_hopper(
    kind: str, tile: Tile, rank: int, few: bool, one_wave: bool, dropout: bool, relu: bool, apart: bool
) -> Tile:
    if kind == "rank_one_backward" and few:
        wide = {"block_n": 4 * tile.block_n, "block_k": 4 * tile.block_k}
        tile = replace(tile, **wide, num_warps=4 * tile.num_warps)
    elif kind in ("lora_backward", "adapter_backward") and rank > 32 and tile.block_m >= 64:
        tile = replace(tile, num_warps=8 if few or dropout or relu else 4)
        if kind == "lora_backward" and dropout and not few:  # two programs on a processor, at the cost of few spills
            tile = replace(tile, maxnreg=128)
    elif kind == "lora_forward" and dropout and tile.block_m > 16:
        # Programs that share the columns of y would all draw the mask.
        tile = replace(tile, block_m=32 if apart else 16) if few else replace(tile, num_warps=8)
    elif kind == "adapter_forward" and one_wave and rank == 128 and tile.block_k >= 64:
        tile = replace(tile, block_m=16, block_n=128, block_k=128)
    return tile


def column_splits(tile: Tile, rows: int, columns: int, processors: int) -> int:
    """How many programs split the columns of one block of rows, so that few rows still fill the GPU.

    Each of them repeats the down-projection, whose operands the L2 cache holds by then; more than six would spend more
    on that than they gain, and so would programs that have to wait for a processor.
    """
    if tile.splits:
        return max(1, min(tile.splits, -(-columns // tile.block_n)))
    row_blocks = -(-rows // tile.block_m)
    wanted = processors // row_blocks
    limit = 6 if tile.block_m > 16 else 32
    return max(1, min(wanted, limit, -(-columns // tile.block_n)))
