"""Tiles measured on a GPU: the JSON file that ``ROUTINGVL_TILES`` names, as benchmarks/tune.py writes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

TILES_VARIABLE = "ROUTINGVL_TILES"
PRECISIONS = ("half", "tf32", "ieee")
ROWS = ("decode", "many")
LIMITS = {  # smallest and largest value of each number of a tile, all powers of two but num_stages
    "block_m": (16, 256),
    "block_n": (16, 512),
    "block_k": (16, 512),
    "num_warps": (1, 32),
    "num_stages": (1, 8),
}
OPTIONAL = {  # likewise, of numbers that a file may leave out; 0 is what that means
    "maxnreg": (24, 255),
    "splits": (1, 64),
}


class TilesFileError(ValueError):
    """The file of ``ROUTINGVL_TILES`` cannot be used; the message names file and key."""


def tile_key(arch: str, kind: str, rank: int, precision: str, decode: bool) -> str:
    """Name of an entry, such as ``sm_90/lora_forward/128/half/many``; ``rank`` is the padded one."""
    return f"{arch}/{kind}/{rank}/{precision}/{ROWS[0] if decode else ROWS[1]}"


def measured_tile(key: str, kinds: tuple[str, ...]) -> dict[str, int] | None:
    """The numbers of the tile under ``key``, None where there is no file or it lacks the entry.

    Raises:
        TilesFileError: the file is missing or no JSON, or an entry, this or another, is impossible.
    """
    path = os.environ.get(TILES_VARIABLE)
    return _read(path, kinds).get(key) if path else None


@cache
def _read(path: str, kinds: tuple[str, ...]) -> Mapping[str, dict[str, int]]:
    place = f"{TILES_VARIABLE}={path}"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TilesFileError(f"{place} cannot be read ({error}); make it with python -m benchmarks.tune") from error
    tiles = data.get("tiles") if isinstance(data, dict) else None
    if not isinstance(tiles, dict):
        raise TilesFileError(f"{place} holds no mapping 'tiles'; make it with python -m benchmarks.tune")
    for key, tile in tiles.items():
        if fault := _key_fault(key, kinds) or _tile_fault(tile) or _maxnreg_fault(key, tile):
            raise TilesFileError(f"{place}: {key!r}: {fault}")
    return tiles


def _key_fault(key: str, kinds: tuple[str, ...]) -> str | None:
    parts = key.split("/")
    if len(parts) != 5:
        return "a key is architecture/kernel/padded rank/precision/rows, such as sm_90/lora_forward/128/half/many"
    ranks = ("16", "32", "64", "128", "256")
    known = {"kernel": kinds, "padded rank": ranks, "precision": PRECISIONS, "rows": ROWS}
    for (name, values), value in zip(known.items(), parts[1:], strict=True):
        if value not in values:
            return f"{name} {value!r} is not one of {', '.join(values)}"
    return None


def _tile_fault(tile: Any) -> str | None:
    if not isinstance(tile, dict) or not set(LIMITS) <= set(tile) <= {*LIMITS, *OPTIONAL}:
        return f"a tile has the keys {', '.join(LIMITS)}, may have {' and '.join(OPTIONAL)}, and no others"
    for name, value in tile.items():
        low, high = LIMITS.get(name) or OPTIONAL[name]
        any_number, none = name in OPTIONAL or name == "num_stages", name in OPTIONAL and value == 0
        right = type(value) is int and (none or low <= value <= high) and (any_number or not value & (value - 1))
        if not right:
            also = "0, or " if name in OPTIONAL else "" if any_number else "a power of two "
            return f"{name}={value!r} must be {also}from {low} to {high}"
    return None


def _maxnreg_fault(key: str, tile: dict[str, int]) -> str | None:
    if tile.get("maxnreg") and not key.startswith("sm_"):
        return f"maxnreg={tile['maxnreg']} is for NVIDIA's GPUs: leave it out"
    return None
