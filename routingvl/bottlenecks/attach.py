"""The image bound for a whole model: by hand with :func:`bind_image`, or by its own hooks with :func:`attach`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from routingvl.bottlenecks.context import VisualContext


class BindingError(ValueError):
    """The image cannot be brought to the routed layers; the message says what was given and what is needed."""


def contexts_of(model: nn.Module) -> list[VisualContext]:
    """The contexts from which routed layers of ``model`` read, each once: the attribute ``context`` of its modules."""
    found = (getattr(module, "context", None) for module in model.modules())
    return list({id(context): context for context in found if isinstance(context, VisualContext)}.values())


@contextlib.contextmanager
def bind_image(
    model: nn.Module,
    features: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    beams: int | None = None,
    text_only: str | None = None,
    decoding: bool = False,
) -> Iterator[None]:
    """Make ``features`` the image of every routed layer of ``model`` inside the ``with`` block::

        with routingvl.bind_image(model, features):  # features [B, L, d]
            model(**batch)

    Args:
        model: any model with routed layers: after ``inject``, after ``get_peft_model``, or a routingvl model.
        features, mask, text_only, decoding: see :meth:`VisualContext.bind`; decoding=True is for ``generate``.
        beams: how many rows of text each entry of the features serves; None finds it in each layer.

    Raises:
        BindingError: the model has no routed layers.
        ValueError: as :meth:`VisualContext.bind`.
    """
    if not (contexts := contexts_of(model)):
        raise BindingError(
            f"{type(model).__name__} has no routed layers to bind an image for: call inject(model, config) or "
            "peft.get_peft_model(model, RoutedLoraConfig(...)) first"
        )
    with contextlib.ExitStack() as stack:
        for context in contexts:
            context.follow(model)
            bound = context.bind(features, mask=mask, beams=beams, decoding=decoding, text_only=text_only)
            stack.enter_context(bound)
        yield
