"""Which backend runs a call, and why: what was asked for, device, dtype, width, routing, and what fits the device."""

from __future__ import annotations

import os

import torch

from .choice import torch_wins
from .float32_precision import tf32_allowed
from .optional_triton import interpreted, triton
from .routing import Routing, find_routing
from .triton_common.launch import interpreter_lock, unfit_kernels, unfit_message
from .triton_common.products import bfloat16_dot_error
from .triton_common.tiles import MAX_RANK, arch_of, before_ampere

BACKENDS = ("eager", "triton")
BACKEND_VARIABLE = "ROUTINGVL_BACKEND"
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GPU_TYPES = ("cuda", "xpu")  # ROCm calls itself cuda
SHAPES_ONLY = "meta"  # no kernel runs there, the ops' fakes do


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
    with interpreter_lock:
        return bfloat16_dot_error() == 0


def call_obstacle(dtype: torch.dtype | None, width: int | None) -> str | None:
    """Why the Triton kernels cannot run at this dtype and width (groups times rank), or None when they can."""
    if dtype is not None and dtype not in FUSED_DTYPES:
        return f"the Triton kernels do not compute in {dtype}"
    if dtype == torch.bfloat16 and interpreted() and not interpreter_multiplies_bfloat16():
        return "Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16 there"
    if width is not None and width > MAX_RANK:
        return f"the Triton kernels take groups times rank up to {MAX_RANK}, this is {width}"
    return None


def select_backend(
    device_type: str,
    backend: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    width: int | None = None,
    routing: Routing | str | None = None,
    visual_tokens: int | None = None,
    relu: bool = False,
    placement: str = "bottleneck",
    products: bool = False,
    rows: int | None = None,
    grouped: bool = False,
    dropout: bool = False,
) -> tuple[str, str]:
    """Choose the backend for tensors on ``device_type`` ("cpu", "cuda", ...).

    ``backend`` ("eager" or "triton") decides when given, else the environment variable ``ROUTINGVL_BACKEND``, else the
    fastest backend that runs there. What the kernels do not cover goes to "eager" whatever was asked for, and the
    reason says so.

    Args:
        device_type: as in ``torch.device.type``.
        backend: "eager", "triton" or None.
        dtype: of the call; None: one that the kernels compute in.
        width: groups times rank of the call; None: one that fits.
        routing: function, or its name; None: one that has kernels.
        visual_tokens: L of the call; None: not known yet, which the reason then speaks of where it matters.
        relu, placement: as in :func:`routingvl.kernels.routed_lora`.
        products: whether the call multiplies matrices inside the bottleneck (it does not where it is rank one in each
            image). Such products of float32 are torch's unless the kernels are asked for by name, because without
            tensor cores cuBLAS is faster.
        rows, grouped, dropout: of a LoRA with such products, how many rows of text there are, and whether several
            projections share it and its inputs are dropped: the table of :mod:`.choice` knows which of these are
            faster in torch. None: not known, and not looked up.

    Returns:
        The backend's name and the reason in words.

    Raises:
        ValueError: the name is not a backend, or not a routing function.
        RuntimeError: the backend was asked for by name and cannot run on the device; a default never raises.
    """
    name, reason = _device_backend(device_type, backend)
    if name != "triton":
        return name, reason
    row = None if routing is None else find_routing(routing)
    obstacle = call_obstacle(dtype, width)
    if obstacle is None and products and dtype == torch.float32 and _left_to_torch(device_type, backend):
        obstacle = "exact products of float32 are faster in torch on a GPU; backend='triton' overrides this"
    measured = products and rows is not None and (visual_tokens or 0) <= 1
    if obstacle is None and measured and device_type == "cuda" and not _asked(backend):
        plain = row is not None and not row.uses_image
        obstacle = torch_wins(_current_arch(), dtype, rows, plain=plain, grouped=grouped, dropout=dropout)
    if obstacle is None and row is not None:
        obstacle = row.kernel_obstacle(visual_tokens, relu, placement)
    if obstacle:
        return "eager", obstacle
    if row is not None and visual_tokens is None and row.max_visual_tokens != 0:
        several = row.kernel_obstacle(row.max_visual_tokens or 2, relu, placement)
        reason += f"; eager with several visual tokens: {several}" if several else ""
    return name, reason


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
    if device_type == "cuda" and torch.cuda.is_available() and before_ampere(arch := _current_arch()):
        return "eager", f"the Triton kernels have no matrix instructions on {arch}; backend='triton' overrides this"
    untested = device_type == "xpu" or torch.version.hip is not None
    return "triton", f"default on {device_type!r} devices" + (", untested there" if untested else "") + _unfit_note()


@torch.compiler.assume_constant_result
def _left_to_torch(device_type: str, backend: str | None) -> bool:
    """Whether exact products of float32 are torch's: on a GPU, where nobody asked for a backend or allowed tf32."""
    return not _asked(backend) and device_type in GPU_TYPES and not tf32_allowed()


@torch.compiler.assume_constant_result
def _asked(backend: str | None) -> bool:
    """Whether somebody asked for a backend by name."""
    return bool(backend or os.environ.get(BACKEND_VARIABLE))


@torch.compiler.assume_constant_result
def _current_arch() -> str:
    """Architecture of the current GPU; "default" where there is none."""
    if not torch.cuda.is_available():
        return "default"
    return arch_of(torch.device("cuda", torch.cuda.current_device()))


def _unfit_note() -> str:
    return "".join(f"; {unfit_message(kind)}" for kind in unfit_kernels())
