"""What the hand-written autograd functions share: how they are applied, and how their backward starts and ends.

Each has a forward that returns what was computed for the backward pass beside its result, and a setup_context:
torch.func and compilers need that form. Plain calls go through its :func:`_twin`, whose only output is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.autograd.function import once_differentiable

from .inputs import without_autocast
from .tracing import transformed

Gradients = Callable[[Any, Tensor], Sequence[Tensor | None]]
Keeping = Callable[[Any, tuple[Any, ...], tuple[Any, ...]], None]


def applied(
    function: type[Function],
    *inputs: Any,
    recording: bool | None = None,
    dtype: torch.dtype | None = None,
    plain: bool = False,
) -> Tensor:
    """The first output of ``function.apply(*inputs)``, on the shortest way there is.

    What torch's own ``apply`` does first, binding defaults and unwrapping what torch.func left, costs as much as the
    rest of it. Where nothing is to be differentiated the forward alone is called.

    Args:
        recording: whether gradients are recorded and any of the tensors needs one; None: not known yet.
        dtype: of the call, to which its first inputs, ``function.cast`` of them, are cast inside the function, so that
            autograd does not record it; torch casts the gradients back. None: they have it.
        plain: it is known that nothing traces or transforms the call.
    """
    if (not plain and transformed()) or forward_ad._current_level >= 0:
        return function.apply(*_cast(function, inputs, dtype))[0]
    if torch.is_grad_enabled() if recording is None else recording:
        return _twin(function)(*inputs, dtype)
    return function.forward(*(inputs if dtype is None else _cast(function, inputs, dtype)))[0]


def need_gradients(*tensors: Tensor | None) -> bool:
    """Whether gradients are recorded and any of these needs one."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _cast(function: type[Function], inputs: tuple[Any, ...], dtype: torch.dtype | None) -> Sequence[Any]:
    if dtype is None:
        return inputs
    first = [x if x is None or x.dtype == dtype else x.to(dtype) for x in inputs[: function.cast]]
    return *first, *inputs[function.cast :]


@cache
def _twin(function: type[Function]) -> Callable[..., Tensor]:
    """``apply`` of the same function in torch's older form, which is given its context at once: it saves what it likes.

    In the newer form everything that is saved must be an output, which torch then wraps and counts as one. It takes a
    dtype, as :func:`applied` does, after the inputs.
    """
    keep, differentiate = function.setup_context.__wrapped__, function.backward

    def forward(ctx: Any, *given: Any) -> Tensor:
        inputs = _cast(function, given[:-1], given[-1])
        outputs = function.forward(*inputs)
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, outputs)
        return outputs[0]

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    twin = type(function.__name__, (Function,), methods)
    return super(Function, twin).apply


def keeping(keep: Keeping) -> Keeping:
    """The ``setup_context`` of an autograd function from ``keep(ctx, inputs, outputs)``, which saves what is needed.

    The outputs after the first exist to be saved only; torch is told so, and no zeros are made for missing gradients.
    """

    @wraps(keep)
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(*(tensor for tensor in output[1:] if tensor is not None))
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, output)

    return setup_context


def backward_of(gradients: Gradients) -> Callable[..., tuple[Tensor | None, ...]]:
    """The ``backward`` of an autograd function from ``gradients(ctx, dy)``, which gives those of its first inputs.

    dy is the contiguous gradient of the first output. The inputs after those that ``gradients`` answers for get None.
    Autocast is off inside, so that operations keep the dtypes of the forward pass.
    """

    def all_gradients(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(ctx.needs_input_grad)
        if dy is None:
            return (None,) * count
        if torch.is_autocast_enabled(dy.device.type):
            with without_autocast(dy.device.type):
                found = gradients(ctx, dy.contiguous())
        else:
            found = gradients(ctx, dy.contiguous())
        return *found, *(None,) * (count - len(found))

    refusing = once_differentiable(all_gradients)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Without create_graph nothing is recorded here, and there is nothing to refuse.
        return (refusing if torch.is_grad_enabled() else all_gradients)(ctx, *grads)

    return backward
