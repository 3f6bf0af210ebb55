"""Which backend runs an op on a device, and why; registration and launch of the Triton backend's ops."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .device import interpreted, triton
from .tiles import MAX_RANK, Tile

BACKENDS = ("eager", "triton")
BACKEND_VARIABLE = "ROUTINGVL_BACKEND"
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GPU_TYPES = ("cuda", "xpu")  # ROCm calls itself cuda
SHAPES_ONLY = "meta"  # no kernel runs there, the ops' fakes do

_logger = logging.getLogger(__name__)
_library = torch.library.Library("routingvl", "FRAGMENT")
_interpreter_lock = threading.RLock()  # Triton's interpreter patches its language's module while a kernel runs
_first_fit: dict[tuple[str, tuple[Tile, ...]], int] = {}  # by kernel and tiles: the first that the device could launch
_said: set[str] = set()

Result = TypeVar("Result")


class NoTileFitsError(RuntimeError):
    """Not even the smallest tile of a kernel fits the device; nothing was launched or written."""


def triton_obstacle(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on devices of this type, or None when they can."""
    if triton is None:
        return "triton is not installed"
    if device_type == "cpu" and not interpreted():
        return "on 'cpu' devices the Triton kernels run in Triton's interpreter only (TRITON_INTERPRET=1)"
    if device_type not in ("cpu", SHAPES_ONLY, *GPU_TYPES):
        return f"there are no Triton kernels for {device_type!r} devices"
    return None


@torch.compiler.assume_constant_result
def interpreter_multiplies_bfloat16() -> bool:
    """Whether ``tl.dot`` of bfloat16 is right in Triton's interpreter, found by one small product.

    Up to Triton 3.9 it multiplies the bit patterns as integers.
    """
    from .selfcheck import bfloat16_dot_error  # here, because it needs triton

    with _interpreter_lock:
        return bfloat16_dot_error() == 0


def call_obstacle(dtype: torch.dtype | None, width: int | None) -> str | None:
    """Why the Triton kernels cannot run on tensors of this dtype with a code of this width, or None when they can."""
    if dtype is not None and dtype not in FUSED_DTYPES:
        return f"the Triton kernels do not compute in {dtype}"
    if dtype == torch.bfloat16 and interpreted() and not interpreter_multiplies_bfloat16():
        return "Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16 there"
    if width is not None and width > MAX_RANK:
        return f"the Triton kernels take codes up to {MAX_RANK} wide, this one is {width} (groups times rank)"
    return None


def select_backend(
    device_type: str,
    backend: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    dense: bool = False,
) -> tuple[str, str]:
    """Choose the backend for tensors on ``device_type`` ("cpu", "cuda", ...).

    ``backend`` ("eager" or "triton") decides when given, else the environment variable ``ROUTINGVL_BACKEND``, else the
    fastest backend that runs there. Returns its name and the reason in words. With ``dtype`` and ``width`` (groups
    times rank) of a call, what the kernels do not cover goes to "eager" whatever was asked for, and the reason says so.
    ``dense`` says that the call has products of the code, rather than being rank one in each image: such products of
    float32 are torch's unless the kernels are asked for by name, because without tensor cores cuBLAS is faster.

    Raises:
        ValueError: the name is not a backend.
        RuntimeError: the backend was asked for by name and cannot run on the device; a default never raises.
    """
    name, reason = _device_backend(device_type, backend)
    obstacle = call_obstacle(dtype, width) if name == "triton" else None
    if name == "triton" and dense and dtype == torch.float32 and _left_to_torch(device_type, backend):
        obstacle = obstacle or "exact products of float32 are faster in torch on a GPU; backend='triton' overrides this"
    return ("eager", obstacle) if obstacle else (name, reason)


# Constant while compiled: otherwise torch.compile would trace the reading of the environment.
@torch.compiler.assume_constant_result
def _device_backend(device_type: str, backend: str | None) -> tuple[str, str]:
    asked, source = backend, f"backend={backend!r}"
    if asked is None:
        asked = os.environ.get(BACKEND_VARIABLE) or None
        source = f"{BACKEND_VARIABLE}={asked}"
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"{source}: unknown backend; known are {', '.join(map(repr, BACKENDS))}")
    obstacle = triton_obstacle(device_type)
    if asked == "triton" and obstacle:
        raise RuntimeError(f"{source} cannot run: {obstacle}; use 'eager'")
    if asked is not None:
        place = ", in Triton's interpreter" if asked == "triton" and device_type == "cpu" else ""
        return asked, source + place + (_unfit_note() if asked == "triton" else "")
    if obstacle or device_type not in GPU_TYPES:
        return "eager", obstacle or f"default on {device_type!r} devices"
    untested = device_type == "xpu" or torch.version.hip is not None
    return "triton", f"default on {device_type!r} devices" + (", untested there" if untested else "") + _unfit_note()


@torch.compiler.assume_constant_result
def _left_to_torch(device_type: str, backend: str | None) -> bool:
    """Whether exact products of float32 are torch's: on a GPU, where nobody asked for a backend or allowed tf32."""
    asked = backend or os.environ.get(BACKEND_VARIABLE)
    return not asked and device_type in GPU_TYPES and not torch.backends.cuda.matmul.allow_tf32


def unfit_kernels() -> tuple[str, ...]:
    """Kernels of which a launch in this process found that no tile fits the device, in alphabetical order."""
    return tuple(sorted({kind for (kind, tiles), first in _first_fit.items() if first == len(tiles)}))


def _unfit_note() -> str:
    return "".join(f"; {_unfit(kind)}" for kind in unfit_kernels())


def _unfit(kind: str) -> str:
    """What it means that no tile of this kernel fits, and what to do."""
    found = f"no tile of {kind} fits this device"
    if kind.endswith("_forward"):
        return f"{found}: set {BACKEND_VARIABLE}=eager"
    return (
        f"{found}, so there are no gradients: set {BACKEND_VARIABLE}=eager or pass backend='eager' (model.backend of a "
        "run), or take a smaller rank, and run again"
    )


def define_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an op ``routingvl::name`` that launches kernels, and return it.

    Registered ops are what torch.compile, autocast, activation checkpointing and the interpreter agree on. They stand
    below autograd: only an autograd function may call them on tensors that need gradients.

    Args:
        schema: name, arguments and results in torch's notation; what is written in place is marked ``Tensor(a!)``.
        run: the implementation.
        fake: shapes and dtypes of the results, for tracing.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA", "XPU"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"routingvl::{name}", fake, lib=_library)
    return getattr(torch.ops.routingvl, name).default


def launch(kind: str, tiles: tuple[Tile, ...], attempt: Callable[[Tile], Result]) -> Result:
    """``attempt(tile)`` with the first tile whose resources the device has; it must launch its kernel first of all.

    Raises:
        NoTileFitsError: none of them; in later calls without another attempt. :func:`unfit_kernels` remembers it, and
            the reason that :func:`select_backend` gives says so from then on.
    """
    if interpreted():
        with _interpreter_lock:
            return attempt(tiles[0])
    start = _first_fit.get((kind, tiles), 0)
    for index in range(start, len(tiles)):
        try:
            result = attempt(tiles[index])
        except triton.OutOfResources as error:
            _logger.warning("%s does not fit this device with %s (%s): trying less", kind, tiles[index], error)
            continue
        _first_fit[kind, tiles] = index
        return result
    _first_fit[kind, tiles] = len(tiles)
    raise NoTileFitsError(_unfit(kind))


def eager_instead(error: NoTileFitsError) -> None:
    """Say, once for each kernel, that a forward pass is computed eagerly after all."""
    if str(error) not in _said:
        _said.add(str(error))
        _logger.warning("%s; computed eagerly until then", error)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context in which kernels are launched on the tensor's own GPU, whichever is the current one."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu":
        return torch.xpu.device(tensor.device)
    return nullcontext()


def contiguous_rows(x: Tensor) -> Tensor:
    """x [..., K] as rows [M, K] with K contiguous: a view wherever strides allow, else one copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
