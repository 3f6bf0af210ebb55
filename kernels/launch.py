"""Which backend runs an op on a device, and why."""

from __future__ import annotations

import os

import torch

BACKENDS = ("eager", "triton")
BACKEND_VARIABLE = "ROUTINGVL_BACKEND"


def triton_obstacle(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on devices of this type, or None when they can."""
    return f"this version of routingvl has no Triton kernels for {device_type!r} devices"


# Constant while compiled: otherwise torch.compile would trace the reading of the environment.
@torch.compiler.assume_constant_result
def select_backend(device_type: str, backend: str | None = None) -> tuple[str, str]:
    """Choose the backend for tensors on ``device_type`` ("cpu", "cuda", ...).

    ``backend`` ("eager" or "triton") decides when given, else the environment variable ``ROUTINGVL_BACKEND``, else the
    fastest backend that runs there. Returns its name and the reason in words.

    Raises:
        ValueError: the name is not a backend.
        RuntimeError: the backend was asked for by name and cannot run; a default never raises.
    """
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
        return asked, source
    return ("eager", obstacle) if obstacle else ("triton", f"default on {device_type!r} devices")
