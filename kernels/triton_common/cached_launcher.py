"""Launching a compiled kernel again without Triton's own search for it, which costs more than a small kernel runs.

Triton looks at every argument of every launch to find the machine code made for such arguments. Here the code found at
the first launch is kept under a key that is at least as fine as Triton's: dtype and alignment of each tensor, for each
integer whether it is 1, a multiple of 16, and in 32 bits, and all constants by value. Anything out of the ordinary goes
Triton's way: its interpreter, other GPUs than NVIDIA's, tensors that are no plain ones, hooks and profilers, debugging.

And its :class:`Plan`, for equal ones: an op that is called again with tensors of the same sizes launches the same
machine code on the same grid with the same numbers. Only the addresses are new, so nothing else is put together again.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import attrgetter, itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..inputs import PLAIN
from ..optional_triton import triton

LAUNCH_VARIABLE = "ROUTINGVL_LAUNCH"
LAUNCHERS = ("3.4.", "3.5.", "3.6.", "3.7.", "3.8.", "3.9.")  # versions of Triton whose launchers take the same
NOTHING: Mapping[str, Any] = MappingProxyType({})


def specialization(argument: Any) -> Hashable | None:
    """What the machine code may depend on in an argument; None for one that must go Triton's way.

    Two arguments for which Triton would compile differently never have the same value here.
    """
    kind = type(argument)
    if kind is int:
        if not -(2**31) <= argument < 2**31:
            return None
        return 1 if argument == 1 else 16 if argument % 16 == 0 else 0
    if kind in PLAIN:
        return argument.dtype, argument.data_ptr() % 16 == 0
    return float if kind is float else None


def launch_key(arguments: Sequence[Any], constants: Sequence[Any]) -> Hashable | None:
    """Key of a launch: equal keys run the same machine code. None when the launch must go Triton's way."""
    found = tuple(map(specialization, arguments))
    if None in found or type(arguments[0]) not in PLAIN:
        return None
    return arguments[0].device, found, constants, tuple(map(type, constants))


class Plan(NamedTuple):
    """A launch that only lacks its tensors.

    Attributes:
        run: starts the machine code on the grid.
        rest: its arguments after the tensors.
        parts: shapes and dtypes of the tensors that the launch needed besides those of the op, by name.
    """

    run: Callable[..., None]
    rest: tuple[Any, ...]
    parts: Mapping[str, Any]


def _supported(kernel: Any) -> bool:
    """Whether this Triton has what the shortcut uses, and the kernel is one that it compiles for NVIDIA's GPUs."""
    if triton is None or not isinstance(kernel, triton.JITFunction) or torch.version.hip is not None:
        return False
    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    has_hooks = all(hasattr(runtime, name) for name in ("launch_enter_hook", "launch_exit_hook", "debug"))
    has_code = hasattr(kernel, "params") and hasattr(triton.compiler.CompiledKernel, "__getitem__")
    return has_hooks and has_code and hasattr(kernel, "pre_run_hooks")


def _settings_of_compilation() -> Callable[[Any], tuple[Any, ...]]:
    """What reads from Triton's knobs those that ask for another way of compiling where they are set."""
    names = ["runtime.debug", "runtime.add_stages_inspection_hook"]
    names += ["compilation.instrumentation_mode", "compilation.fpsan_homomorphic_casts"]
    known = []
    for name in names:
        room, _, knob = name.partition(".")
        if hasattr(getattr(triton.knobs, room, None), knob):
            known.append(name)
    return attrgetter("runtime.debug", *known)  # twice: of one name it would be the value itself


def _starter(compiled: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    """``compiled[grid]`` where nobody watches: without making up, for every launch, what hooks would be told of it.

    That is what ``CompiledKernel.__getitem__`` does in every Triton of ``LAUNCHERS``; of others it is called itself.
    """
    if not getattr(triton, "__version__", "").startswith(LAUNCHERS):
        return compiled[grid]
    driver, run = triton.runtime.driver, compiled.run
    first, last = grid, (compiled.function, compiled.packed_metadata, None, None, None)

    def start(*arguments: Any) -> None:
        active = driver.active
        run(*first, active.get_current_stream(active.get_current_device()), *last, *arguments)

    return start


class CachedKernel:
    """A ``triton.jit`` function that is launched from a mapping of names, and remembers its machine code.

    ``kernel(grid, arguments)``: each parameter of the function takes the value of its name in lower case, num_warps,
    num_stages and, where it is there and not 0, maxnreg are the launch's own; what else is in the mapping is left
    alone. Pointers, p_..., come first, and constants, which are the parameters in upper case, last.
    ROUTINGVL_LAUNCH=triton, read when the kernels are imported, turns the shortcut off.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        names = list(inspect.signature(kernel.fn).parameters)
        self._constants = [name for name in names if name.isupper()]
        count = len(names) - len(self._constants)
        self._select = itemgetter(*names[:count])
        self._tensors = sum(name.startswith("p_") for name in names)
        self._select_tensors = itemgetter(*names[: self._tensors])
        self._select_constants = itemgetter(*map(str.lower, self._constants), "num_warps", "num_stages")
        self._direct = os.environ.get(LAUNCH_VARIABLE) != "triton" and _supported(kernel)
        self._compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}
        if self._direct:
            self._runtime, self._settings = triton.knobs.runtime, _settings_of_compilation()

    def _watched(self) -> bool:
        """Whether somebody looks at launches or has asked for another way of compiling."""
        enter, leave = self._runtime.launch_enter_hook, self._runtime.launch_exit_hook
        # Each is a list of hooks, or one or None in older versions.
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or self._kernel.pre_run_hooks:
            return True
        return any(self._settings(triton.knobs))

    def follow(self, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Launch on the current device and stream with other tensors; False, and nothing, while somebody watches."""
        if self._watched():
            return False
        plan.run(*self._select_tensors(tensors), *plan.rest)
        return True

    def __call__(
        self, grid: tuple[int, ...], arguments: Mapping[str, Any], parts: Mapping[str, Any] = NOTHING
    ) -> Plan | None:
        """Launch on the current device and stream; raises what Triton raises, KeyError for a name that is missing.

        Returns:
            The plan for another such launch, with ``parts``, from the second launch of this machine code on.
        """
        values, constants = self._select(arguments), self._select_constants(arguments)
        maxnreg = arguments.get("maxnreg", 0)
        if maxnreg:
            constants = (*constants, maxnreg)
        key = None
        if self._direct and not self._watched():
            key = launch_key(values, constants)
        found = None if key is None else self._compiled.get(key)
        if found is not None:
            compiled, rest = found
            run = _starter(compiled, (*grid, 1, 1)[:3])
            run(*values, *rest)
            return Plan(run, (*values[self._tensors :], *rest), parts)
        rest, (warps, stages) = constants[: len(self._constants)], constants[len(self._constants) :][:2]
        named = dict(zip(self._constants, rest, strict=True))
        if maxnreg:
            named["maxnreg"] = maxnreg
        compiled = self._kernel[grid](*values, **named, num_warps=warps, num_stages=stages)
        if key is not None and isinstance(compiled, triton.compiler.CompiledKernel):
            self._compiled[key] = compiled, rest
        return None
