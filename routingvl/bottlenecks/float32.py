"""Parameters that train in float32 inside a module that computes in half precision.

In bfloat16 a weight of 1 has its neighbours 0.004 to 0.008 away, so that the steps of a usual learning rate are
rounded away. A module held here keeps its parameters in float32 under their own names, and sees them in its
own type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


def hold_in_float32(module: nn.Module, seen: dict[str, torch.dtype]) -> None:
    """Make those of ``module``'s own parameters float32; its forward reads them in the types given.

    The class becomes a subclass of its own that differs in nothing else. ``model.to(dtype)`` changes both types. A
    module can be held again, for further parameters.
    """
    if isinstance(module, Held):
        seen = {**module.held_dtypes, **seen}
    for name, parameter in module.named_parameters(recurse=False):
        if name in seen:
            parameter.data = parameter.data.float()
    module.held_dtypes = dict(seen)
    module.__class__ = _holding(getattr(module, "held_class", type(module)), tuple(sorted(seen)))


def release(module: nn.Module) -> None:
    """Undo :func:`hold_in_float32`; the values are rounded to the type that they had."""
    if not isinstance(module, Held):
        return
    for name, dtype in module.held_dtypes.items():
        parameter = module._parameters[name]
        parameter.data = parameter.data.to(dtype)
    module.__class__ = module.held_class
    del module.held_dtypes


class Held:
    """What the classes made here share.

    Attributes:
        held_class: the module's own class.
        held_dtypes: {parameter: the type in which forward sees it}.
    """

    held_class: type[nn.Module]
    held_dtypes: dict[str, torch.dtype]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.held_dtypes = {name: fn(torch.empty(0, dtype=dtype)).dtype for name, dtype in self.held_dtypes.items()}
        return self

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _blank, (self.held_class, tuple(sorted(self.held_dtypes))), self.__dict__


@functools.cache
def _holding(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``cls`` in which the parameters of these names read as their casts."""
    return type(cls.__name__, (Held, cls), {"held_class": cls, **{name: property(_reader(name)) for name in names}})


def _reader(name: str) -> Callable[[Any], torch.Tensor]:
    return lambda self: self._parameters[name].to(self.held_dtypes[name])


def _blank(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An instance without contents, which a copy fills."""
    holding = _holding(cls, names)
    return holding.__new__(holding)
