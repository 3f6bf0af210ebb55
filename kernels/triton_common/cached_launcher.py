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
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from ..inputs import PLAIN
from ..optional_triton import triton

LAUNCH_VARIABLE = "ROUTINGVL_LAUNCH"
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
    return has_hooks and hasattr(kernel, "params") and hasattr(triton.compiler.CompiledKernel, "__getitem__")


def _watched(kernel: Any) -> bool:
    """Whether somebody looks at launches or has asked for another way of compiling."""
    runtime, compilation = triton.knobs.runtime, getattr(triton.knobs, "compilation", None)
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return bool(
        any(getattr(hook, "calls", hook) for hook in hooks)  # a list of them, or one or None in older versions
        or getattr(kernel, "pre_run_hooks", None)
        or getattr(runtime, "add_stages_inspection_hook", None)
        or runtime.debug
        or getattr(compilation, "instrumentation_mode", None)
        or getattr(compilation, "fpsan_homomorphic_casts", None)
    )


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

    def follow(self, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Launch on the current device and stream with other tensors; False, and nothing, while somebody watches."""
        if _watched(self._kernel):
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
        if self._direct and not _watched(self._kernel):
            key = launch_key(values, constants)
        found = None if key is None else self._compiled.get(key)
        if found is not None:
            compiled, rest = found
            run = compiled[(*grid, 1, 1)[:3]]
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
