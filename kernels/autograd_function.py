"""What the hand-written autograd functions share: how their forward is bound and how their backward starts and ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from .inputs import transformed, without_autocast

F = TypeVar("F", bound=Callable)
Gradients = Callable[[Any, Tensor], Sequence[Tensor | None]]


def applied(function: type[Function], *inputs: Any) -> tuple[Any, ...]:
    """``function.apply(*inputs)`` on the shortest way there is.

    What torch's own ``apply`` does first, binding defaults and unwrapping what torch.func left, costs as much as the
    rest of it. Where nothing is to be differentiated the forward alone is called.
    """
    if transformed() or forward_ad._current_level >= 0:
        return function.apply(*inputs)
    if torch.is_grad_enabled():
        for given in inputs:
            if isinstance(given, Tensor) and given.requires_grad:
                return super(Function, function).apply(*inputs)
    return function.forward(*inputs)


def saving(ctx: Any, *tensors: Tensor | None, extra: Sequence[Tensor | None] = ()) -> None:
    """Save ``tensors`` for the backward pass, and tell torch that the outputs ``extra`` exist to be saved only."""
    ctx.set_materialize_grads(False)  # no zeros in place of their gradients
    ctx.mark_non_differentiable(*(output for output in extra if output is not None))
    ctx.save_for_backward(*tensors)


def backward_of(gradients: Gradients) -> Callable[..., tuple[Tensor | None, ...]]:
    """The ``backward`` of an autograd function from ``gradients(ctx, dy)``, which gives those of its first inputs.

    dy is the contiguous gradient of the first output. The inputs after those that ``gradients`` answers for get None.
    Autocast is off inside, so that operations keep the dtypes of the forward pass.
    """

    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad)
        if dy is None:
            return (None,) * count
        with without_autocast(dy.device.type):
            found = gradients(ctx, dy.contiguous())
        return *found, *(None,) * (count - len(found))

    return backward


class _AllPositional(inspect.Signature):
    """A signature that binds a call with all arguments by position, without looking at each of them."""

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        if kwargs or len(args) != len(self.parameters):
            return super().bind(*args, **kwargs)
        return _Bound(args)


class _Bound:
    """The part of inspect.BoundArguments that torch reads."""

    kwargs: ClassVar[dict[str, Any]] = {}

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        """Nothing is left to fill in."""


def with_signature(function: F) -> F:
    """Keep the function's signature on it, in a form that takes no time to bind.

    For the forward of an autograd.Function with setup_context: torch makes and binds it on every call, which is a good
    part of a small layer's time.
    """
    function.__signature__ = _AllPositional.from_callable(function)
    return function
