"""Safetensors files of any origin: read whole, or refused with one sentence that names the file and the tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def read_tensors(path: str | Path, error: type[ValueError], *, floats: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Args:
        path: of a regular file.
        error: class of what is raised.
        floats: refuse tensors that are not float16, bfloat16, float32 or float64, or hold NaN or infinity.

    Raises:
        error: the file is missing or damaged, its header claims more than there is, or a tensor is refused.
    """
    path = Path(path)
    if not path.is_file():
        raise error(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        tensors = load(path.read_bytes())  # not through a memory map, in which a truncated file is a bus error
    except (SafetensorError, KeyError, ValueError, MemoryError) as problem:
        raise error(f"{path} is damaged or no safetensors file ({problem})") from problem
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem
    if floats:
        check_floats(tensors, str(path), error)
    return tensors


def check_floats(tensors: Mapping[str, Any], source: str, error: type[ValueError]) -> None:
    """Raise ``error`` unless all are dense floating-point tensors that hold no NaN and no infinity."""
    check_kinds(
        {name: getattr(tensor, "dtype", type(tensor).__name__) for name, tensor in tensors.items()}, source, error
    )
    if odd := [name for name, tensor in tensors.items() if tensor.layout != torch.strided or tensor.is_meta]:
        raise error(f"{source}: {listed(odd)} must be dense and hold data")
    if bad := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise error(f"{source}: {listed(bad)} holds NaN or infinity")


def check_kinds(kinds: Mapping[str, Any], source: str, error: type[ValueError]) -> None:
    """Raise ``error`` unless each type, of torch or as safetensors names it, is a plain floating-point one."""
    if wrong := [name for name, kind in kinds.items() if kind not in FLOATS and kind not in FLOATS.values()]:
        raise error(f"{source}: {listed(wrong)} is of type {kinds[wrong[0]]}; weights must be floating-point numbers")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` holds neither NaN nor infinity, found in one pass without a copy of it."""
    return tensor.numel() == 0 or all(math.isfinite(end) for end in torch.aminmax(tensor.detach()))


def tensor_kinds(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Type, as the file names it (F32, I64), and shape of each tensor of a safetensors file, from its header."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (found.get_dtype(), found.get_shape()) for name, found in slices.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def listed(names: Iterable[str], shown: int = 4) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
