"""Mixed precision: the frozen weights held in the type that autocast would cast them to at every use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import Accelerator

from routingvl.bottlenecks.frozen_weights import lower_frozen_weights
from routingvl.config.schema import MIXED_PRECISION
from routingvl.models import RoutedVLModel


@contextmanager
def frozen_weights_lowered(model: RoutedVLModel, accelerator: Accelerator, keep: bool) -> Iterator[None]:
    """With mixed precision, the language model's frozen weights in that precision; ``keep`` puts float32 back after."""
    with ExitStack() as undo:
        if (name := MIXED_PRECISION[accelerator.mixed_precision]) is not None:
            # On its device first: a cast copy of a shared weight is no parameter and would not move with the model.
            model.to(accelerator.device)
            undo.callback(lower_frozen_weights(model.language_model, getattr(torch, name), keep=keep))
        yield
