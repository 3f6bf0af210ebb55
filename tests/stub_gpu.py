"""A driver that stands for an NVIDIA GPU: the real Triton compiles for it, and its launches are only written down.

For programs of their own, because a process has one driver, and Triton must not be its interpreter there.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_MEMORY = 232448  # bytes that a block of sm_90 can have
launches: list[list[Any]] = []  # kernel, number of its machine code as loaded, grid, arguments (tensors as addresses)


class _Launcher:
    def __init__(self, src, metadata):
        self.name = metadata.name

    def __call__(self, x, y, z, stream, function, packed, metadata, on_enter, on_exit, *arguments):
        told = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        launches.append([self.name, function, [x, y, z], told])


class _Utils:
    loaded = 0

    def load_binary(self, name, kernel, shared, device):
        _Utils.loaded += 1
        return object(), _Utils.loaded, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132}

    def unload_module(self, module):
        pass


class _Driver:
    launcher_cls, utils = _Launcher, _Utils()
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def _forget(*_: Any) -> None:
    """A launch that leaves nothing behind."""


def install(keep: bool = True) -> list[list[Any]]:
    """Make it the driver of this process; returns the list to which launches are appended if ``keep``."""
    if not keep:
        _Driver.launcher_cls = staticmethod(lambda src, metadata: _forget)
    driver.set_active(_Driver())
    return launches
