"""PTX types as numpy's, and the arithmetic that numpy has no type for: bfloat16, tf32, constants."""

from __future__ import annotations

import numpy as np

from .parser import Fault

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOATING = {16: np.float16, 32: np.float32, 64: np.float64}
DTYPES = {
    "pred": np.bool_,
    **{f"{letter}{width}": UNSIGNED[width] for letter in "bu" for width in (8, 16, 32, 64)},
    **{f"s{width}": dtype for width, dtype in SIGNED.items()},
    **{f"f{width}": dtype for width, dtype in FLOATING.items()},
}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
# Types whose values are computed with as float32, rows of one or two: name -> values per register.
WIDENED = {"bf16": 1, "f16": 1, "bf16x2": 2, "f16x2": 2}
TF32_MASK = np.uint32(0xFFFFE000)


def bits_of(kind: str) -> int:
    """Bits of a value of this type in memory or in a register."""
    if kind == "pred":
        return 1
    if kind.endswith("x2"):
        return 2 * bits_of(kind[:-2])
    return int(kind.lstrip("bfus"))


def is_signed(kind: str) -> bool:
    """Whether a type is of integers with a sign."""
    return kind.startswith("s")


def is_floating(kind: str) -> bool:
    """Whether a type is of floating-point numbers."""
    return kind.startswith(("f", "bf"))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits in uint16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits, as uint16, of float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_tf32(bits: np.ndarray) -> np.ndarray:
    """Bits of float32 rounded to the nearest tf32, ties away from zero."""
    return (bits + np.uint32(0x1000)) & TF32_MASK


def widened(bits: np.ndarray, kind: str) -> np.ndarray:
    """float32 values of packed register bits along a new last dimension; of 32 bits: bf16 and f16 two, tf32 one."""
    bits = np.ascontiguousarray(bits)
    if kind == "tf32":
        return (bits & TF32_MASK).view(np.float32)[..., None]
    halves = bits.view(np.uint16).reshape(*bits.shape, -1)
    return from_bfloat16(halves) if kind == "bf16" else halves.view(np.float16).astype(np.float32)


def narrowed(values: np.ndarray, kind: str) -> np.ndarray:
    """The reverse of :func:`widened` for bf16 and f16: the last dimension is packed into uint16 or uint32."""
    with np.errstate(over="ignore"):
        halves = to_bfloat16(values) if kind == "bf16" else values.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(halves).view(UNSIGNED[16 * values.shape[-1]])[..., 0]


def constant(text: str, width: int) -> np.ndarray:
    """Bits of a constant as an unsigned number of this width, 0-dimensional.

    Raises:
        Fault: it is no constant.
    """
    try:
        if text[:2] in ("0f", "0F") or text[:2] in ("0d", "0D"):
            value = int(text[2:], 16)
        else:
            value = int(text.rstrip("U"), 0)
    except ValueError:
        raise Fault(f"neither a register nor a constant: {text}") from None
    return np.array(value & ((1 << width) - 1), UNSIGNED[width])
