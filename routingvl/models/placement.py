"""In which type and on which device the parts of a model are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from routingvl.config import ConfigError

PARTS = ("vision", "text")


def backbone_dtypes(dtype: str | torch.dtype | Mapping[str, Any] | None) -> dict[str, torch.dtype | None]:
    """The type of each backbone, None for as it is; ConfigError where ``dtype`` names none."""
    return {part: _dtype(value) for part, value in _by_part("dtype", dtype).items()}


def place(model: nn.Module, device_map: str | int | torch.device | Mapping[str, Any] | None) -> Any:
    """``model``, its vision tower and all else of it moved to where ``device_map`` says.

    Args:
        model: one of ``routingvl.models``.
        device_map: a device for all of it, "auto" for the accelerator where there is one, a device each for "vision"
            and "text", or None.

    Raises:
        ConfigError: ``device_map`` names no device, or one that is not there.
    """
    if device_map is None:
        return model
    devices = {part: _device(value) for part, value in _by_part("device_map", device_map).items()}
    vision = model.vit
    try:
        if devices["text"] is not None:
            for module in model.children():
                if module is not vision:
                    module.to(devices["text"])
        if vision is not None and devices["vision"] is not None:
            vision.to(devices["vision"])
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device_map={device_map!r}: {str(error).splitlines()[0]}") from error
    if vision is not None and len({devices["vision"], devices["text"]}) > 1:
        # Read by Trainer and accelerate, which then leave the parts where they are.
        model.hf_device_map = {
            name: devices["vision" if module is vision else "text"] for name, module in model.named_children()
        }
    return model


def _by_part(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(PARTS, value)
    if unknown := sorted(str(part) for part in value if part not in PARTS):
        raise ConfigError(
            f"{key}: unknown part {unknown[0]!r} (known: {', '.join(PARTS)}); a language model that is to be spread "
            "over several devices is loaded by transformers and given as an object"
        )
    return {part: value.get(part) for part in PARTS}


def _dtype(value: Any) -> torch.dtype | None:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if dtype is None and value is None:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ConfigError(f"dtype={value!r} must be float32, bfloat16, float16 or float64")
    return dtype


def _device(value: Any) -> torch.device | None:
    if value is None:
        return None
    if value == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device_map={value!r} must be a device, as 'cuda:0' or 'cpu', or 'auto'") from error
    if device.type == "meta":
        raise ConfigError("device_map='meta': there are no weights on that device")
    return device
