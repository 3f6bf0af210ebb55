"""Triton where it is installed, and nothing in its place where it is not: only the eager backend works then."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl

    constexpr = tl.constexpr
    jit = triton.jit
except ImportError:
    triton = tl = None
    constexpr = int

    def jit(function):
        """Leave a device function as it is; nothing will call it."""
        return function


__all__ = ["constexpr", "interpreted", "jit", "tl", "triton"]


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 was set when it was imported."""
    return triton is not None and not isinstance(tl.philox, triton.JITFunction)
