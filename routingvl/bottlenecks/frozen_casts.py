"""Frozen float32 weights under autocast: the cast of each is made once and kept, not at every use.

Autocast keeps the casts of parameters that train, for one step. A frozen weight it casts at every use, and the graph
holds each cast until the backward pass, so that a training step has a copy of every frozen weight in half precision
anyway. The copies are kept here from step to step. The parameters stay what and where they are: so do state dicts,
saved files and what other code reads outside of autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from routingvl.bottlenecks.float32 import Held
from routingvl.bottlenecks.layers import RoutedLoRALinear, is_conv1d

NAMES = ("weight", "bias")


class Cast(NamedTuple):
    """A kept cast, and what it was made of.

    Attributes:
        copy: the weight in autocast's type.
        source: an alias of the weight, which keeps its address from being given to another.
        version: how often the weight had been changed in place.
    """

    copy: torch.Tensor
    source: torch.Tensor
    version: int


def keep_frozen_casts(model: nn.Module) -> Callable[[], None]:
    """Keep what autocast makes of the frozen float32 weights of ``model``'s projections, until they change::

        inject(model, config)                       # or get_peft_model(model, RoutedLoraConfig(...))
        routingvl.keep_frozen_casts(model)
        Trainer(model, TrainingArguments(bf16=True, ...)).train()

    Under autocast the weights and biases of nn.Linear, transformers' Conv1D and routed layers read as kept casts, half
    as large as the weights; results are the same to the bit. Outside of autocast, in compiled code, and for parameters
    that train, nothing differs. A weight that is changed in place, loaded, replaced or moved is cast anew, and one that
    a routed PEFT layer merges. Other code's changes in place through ``weight.data`` leave no trace: call this function
    again after them, which drops all casts.

    Args:
        model: any module; call ``inject`` or ``get_peft_model`` first. Sharded, quantised and half-precision weights
            are left alone.

    Returns:
        A function that undoes it.
    """
    modules = [module for module in model.modules() if _is_product(module) and not isinstance(module, Held)]
    for module in modules:
        if isinstance(module, KeepsCasts):
            module.drop_casts()
            continue
        module.kept_casts = {}
        module.__class__ = _keeping(type(module), tuple(name for name in NAMES if name in module._parameters))

    def undo() -> None:
        for module in modules:
            if isinstance(module, KeepsCasts):
                del module.kept_casts
                module.__class__ = module.own_class

    return undo


class KeepsCasts:
    """What the classes made here share.

    Attributes:
        own_class: the module's own class.
        kept_casts: {parameter's name: its cast}.
    """

    own_class: type[nn.Module]
    kept_casts: dict[str, Cast]

    def drop_casts(self) -> None:
        """Have every weight cast anew at its next use."""
        self.kept_casts.clear()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        self.drop_casts()
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        names = tuple(name for name in NAMES if isinstance(vars(type(self)).get(name), _Reading))
        return _blank, (self.own_class, names), {**self.__dict__, "kept_casts": {}}


class _Reading:
    """A module's parameter as its forward is to see it: under autocast the kept cast, if it is frozen and float32."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, module: Any, owner: type) -> Any:
        if module is None:
            return self
        weight = module._parameters.get(self.name, module.__dict__.get(self.name))
        if weight is None and self.name not in module._parameters:
            raise AttributeError(f"{type(module).__name__} has no {self.name}")
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != torch.float32:
            return weight
        device = weight.device.type
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device) or weight.is_inference():
            return weight
        dtype, kept = torch.get_autocast_dtype(device), module.kept_casts.get(self.name)
        if kept is None or not _is_of(kept, weight, dtype):
            with torch.inference_mode(False), torch.no_grad():
                kept = Cast(weight.to(dtype), weight.detach(), weight._version)
            module.kept_casts[self.name] = kept
        return kept.copy

    def __set__(self, module: Any, value: Any) -> None:  # what is no parameter: nn.Module registers those
        module.__dict__[self.name] = value

    def __delete__(self, module: Any) -> None:
        del module.__dict__[self.name]


def _is_of(kept: Cast, weight: torch.Tensor, dtype: torch.dtype) -> bool:
    same = kept.source.data_ptr() == weight.data_ptr() and kept.source.device == weight.device
    return same and kept.version == weight._version and kept.copy.dtype == dtype and kept.copy.shape == weight.shape


def _is_product(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, RoutedLoRALinear)) or is_conv1d(module)


@functools.cache
def _keeping(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of ``cls`` whose parameters of these names read as their casts under autocast."""
    reading = {name: _Reading(name) for name in names}
    return type(cls.__name__, (KeepsCasts, cls), {"own_class": cls, "__module__": cls.__module__, **reading})


def _blank(cls: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An instance without contents, which a copy fills."""
    keeping = _keeping(cls, names)
    return keeping.__new__(keeping)
