"""A driver for Triton whose GPU is the emulator: what a launch compiles runs on tensors of the CPU.

For a process of its own, because Triton must not be its interpreter there. :func:`emulated` takes everything back.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .block import Schedule, launch
from .memory import GlobalMemory
from .parser import Program, parse

SHARED_MEMORY = {80: 166912, 90: 232448}  # bytes that a block can have
PROCESSORS = 3  # few, so that 192 rows, which a CPU can compute, are many to a launch


@dataclass
class Launches:
    """What ran, and how it is to run.

    Attributes:
        schedule: of the launches from now on.
        made: name, grid and instructions of each.
        same: see :func:`.block.launch`.
        alter: changes a program before it runs, for tests of the emulator itself.
        span_change: bytes by which every tensor seems longer, likewise.
    """

    schedule: Schedule = field(default_factory=Schedule)
    made: list[tuple[str, tuple[int, int, int], int]] = field(default_factory=list)
    same: Counter[str] = field(default_factory=Counter)
    alter: Callable[[Program], Program] | None = None
    span_change: int = 0

    def run(self, program: Program, grid: tuple[int, int, int], values: list[Any], shared: int) -> None:
        """One launch; ``values`` are tensors and numbers."""
        tensors = [value for value in values if isinstance(value, torch.Tensor) and value.numel()]
        spans = [(tensor.data_ptr(), _span(tensor) + self.span_change) for tensor in tensors]
        arguments = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
        memory = GlobalMemory(spans)
        program = self.alter(program) if self.alter else program
        steps, same = launch(program, grid, arguments, memory, shared, self.schedule)
        memory.write_back()
        self.made.append((program.name, grid, steps))
        self.same += same


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last, not those of what it is a view of."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _everywhere(function: Callable, replacement: Callable, stack: ExitStack) -> None:
    """Put ``replacement`` in the place of ``function`` in every module of the library that has it."""
    name = function.__name__
    for module in [module for path, module in sys.modules.items() if path.startswith("routingvl.")]:
        if getattr(module, name, None) is function:
            stack.enter_context(mock.patch.object(module, name, replacement))


class _Launcher:
    """What Triton calls to launch, made once for each compiled kernel and kept longer than the driver."""

    current: ClassVar[Launches | None] = None

    def __init__(self, source: Any, metadata: Any) -> None:
        self._kinds, self._shared = source.signature, metadata.shared

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        if _Launcher.current is None:
            raise RuntimeError("a kernel that was compiled for the emulator is launched outside of it")
        named = zip(self._kinds.values(), arguments, strict=True)
        values = [value for kind, value in named if kind != "constexpr"]
        _Launcher.current.run(function, (x, y, z), values, self._shared)


def _driver(arch: int, text_of: Mapping[bytes, str]) -> Any:
    """The driver of sm_``arch``; ``text_of`` has the PTX of machine code."""

    class Utils:
        def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
            return object(), parse(text_of[kernel]), 64, 0, 1024  # module, function, registers, spills, threads

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY[arch], "multiprocessor_count": PROCESSORS}

        def unload_module(self, module: Any) -> None:
            pass

    class Driver:
        launcher_cls, utils = _Launcher, Utils()
        get_current_target = staticmethod(lambda: GPUTarget("cuda", arch, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    return Driver()


@contextmanager
def emulated(arch: int) -> Iterator[Launches]:
    """Inside, the library's kernels run in the emulator of sm_``arch`` on tensors of the CPU.

    One at a time, and one ``arch`` a process: Triton and the library keep what they compiled.
    """
    from routingvl.kernels import dispatch
    from routingvl.kernels.triton_common import launch as launching
    from routingvl.kernels.triton_common import tiles

    text_of: dict[bytes, str] = {}
    make = CompiledKernel.__init__

    def remember(self: CompiledKernel, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        text_of[self.kernel] = self.asm["ptx"]

    launches = Launches()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(CompiledKernel, "__init__", remember))
        stack.enter_context(mock.patch.object(_Launcher, "current", launches))
        _everywhere(dispatch.triton_obstacle, lambda device_type: None, stack)
        _everywhere(tiles.arch_of, lambda device: f"sm_{arch}", stack)
        _everywhere(launching.processors, lambda device: PROCESSORS, stack)
        stack.callback(vars(driver).update, vars(driver).copy())
        driver.set_active(_driver(arch, text_of))
        yield launches
