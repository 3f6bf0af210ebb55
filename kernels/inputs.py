"""Checks and casts of the tensors that the public functions are given."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from .routing import Routing
from .tracing import transformed

PLAIN = (Tensor, Parameter)  # these types themselves: subclasses stand for something else
_AS_IT_IS = nullcontext()


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int | str, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor`` is None or fits ``shape``, whose letters stand for any size."""
    fits = tensor is None or (
        tensor.ndim == len(shape)
        and all(isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True))
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_text_and_image(x: Tensor, v: Tensor | None, routing: Routing, relu: bool, width: int | None = None) -> None:
    """Raise ``ValueError`` unless x [B, T, K], or [B*beams, T, K], and v [B, L, K] suit each other and the routing.

    ``width`` is that of v where it is not K.
    """
    check_shape("x", x, ("B", "T", "K"))
    if routing.uses_image and v is not None:
        check_shape("v", v, ("B", "L", width or x.shape[2]))
        if x.shape[0] != v.shape[0] and not (v.shape[0] and x.shape[0] % v.shape[0] == 0):
            needed = "one row of v for each row of x or group of beams is needed"
            raise ValueError(f"v has batch {v.shape[0]}, x has batch {x.shape[0]}: {needed}")
        if routing.mixes_text and x.shape[0] != v.shape[0]:
            raise ValueError(f"routing {routing.name!r} takes each text whole, and beams of one image are not one text")
    routing.check(v.shape[1] if routing.uses_image and v is not None else None, relu)


def fold_beams(x: Tensor | None, v: Tensor | None) -> Tensor | None:
    """x [B*beams, T, K] as the rows [B, beams*T, K] of the B images of v; as it is when there is one beam or no image.

    Every row of an image is routed alike, so beams need no copies of the image's features.
    """
    if x is None or v is None or x.shape[0] == v.shape[0]:
        return x
    return x.reshape(v.shape[0], x.shape[0] // v.shape[0] * x.shape[1], x.shape[2])


def dtype_of_call(tensor: Tensor) -> torch.dtype:
    """The dtype that :func:`cast_for_autocast` gives a tensor."""
    device = tensor.device.type
    known = torch.amp.is_autocast_available(device)  # not of the meta device
    if tensor.dtype == torch.float64 or not known or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` when the given tensors differ in dtype in the call, naming the first two that do."""
    present = [(name, dtype_of_call(tensor)) for name, tensor in tensors.items() if tensor is not None]
    first, expected = present[0]
    for name, dtype in present[1:]:
        if dtype != expected:
            raise ValueError(f"{first} is {expected} and {name} is {dtype}: cast one, or run under torch.autocast")


def check_devices(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` when the given tensors are on several devices: a kernel would read foreign addresses."""
    present = [(name, tensor.device) for name, tensor in tensors.items() if tensor is not None]
    first, expected = present[0]
    for name, device in present[1:]:
        if device != expected:
            raise ValueError(f"{first} is on {expected} and {name} on {device}: move one")


def cast_for_autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the dtype that autocast runs matrix products in; as they are when it is off or they are
    float64.
    """
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Context in which operations keep the dtypes they are given."""
    if not torch.is_autocast_enabled(device_type):
        return _AS_IT_IS
    if transformed():
        return torch.autocast(device_type, enabled=False)
    return _AutocastOff(device_type)


class _AutocastOff:
    """What ``torch.autocast(device_type, enabled=False)`` does inside an outer autocast, in a tenth of the time."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)
