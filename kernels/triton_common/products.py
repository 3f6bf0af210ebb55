"""Products of tiles on the tensor cores."""

from __future__ import annotations

from ..optional_triton import jit, tl


@jit
def nearest_tf32(x, PRECISION: tl.constexpr):
    """float32 rounded to the nearest tf32 where products are in tf32: the tensor cores cut off the lower bits, and such
    errors all have one sign. Other types stay as they are.
    """
    if PRECISION == "tf32" and x.dtype == tl.float32:
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN has no bits to carry into
    return x


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; acc may be None."""
    return tl.dot(nearest_tf32(a, PRECISION), nearest_tf32(b, PRECISION), acc, input_precision=PRECISION)
