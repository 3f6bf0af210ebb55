"""How the image reaches the routed layers: bound for the length of a forward pass, read inside it."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch


class VisualContext:
    """Holds the visual features of the running forward pass, one slot a thread.

    A model binds its features around the call of its language model, and every routed layer below reads them::

        with context.bind(features):  # features [B, L, d]
            language_model(...)

    Binding is strictly nested and cleared on exit, so a forgotten bind is an error and never a stale image. The slot
    is thread-local: two threads can run one model on different images. Copies of a model get a context of their own.
    """

    def __init__(self) -> None:
        self._slot = threading.local()

    def bind(self, features: torch.Tensor | None) -> AbstractContextManager[None]:
        """Make ``features`` [B, L, d] readable inside the ``with`` block, in this thread.

        ``features`` may be None, which is how a recomputation repeats a forward pass that had nothing bound.

        Raises:
            ValueError: features are not a tensor of three dimensions.
        """
        if features is not None and features.dim() != 3:
            raise ValueError(
                f"visual features must be [batch, visual tokens, width], not {list(features.shape)}; "
                "for one pooled vector an image use features[:, None]"
            )
        return _Binding(self, features)

    @property
    def features(self) -> torch.Tensor | None:
        """The features bound in this thread, or None."""
        return getattr(self._slot, "features", None)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The bound features for the text ``x`` [B, T, d].

        Raises:
            RuntimeError: nothing is bound.
            ValueError: the batch of the features is not the batch of ``x``.
        """
        features = self.features
        if features is None:
            raise RuntimeError(
                "a routed layer ran with no visual features bound: call the model inside "
                "`with context.bind(features):`, or pass pixel_values= or vision_features= to a routingvl model"
            )
        if features.shape[0] != x.shape[0]:
            raise ValueError(
                f"features have batch {features.shape[0]}, text has batch {x.shape[0]}; with beams, bind "
                "features.repeat_interleave(num_beams, dim=0)"
            )
        return features

    def checkpoint_context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """``context_fn`` for non-reentrant ``torch.utils.checkpoint``: the recomputation sees the same features."""
        return nullcontext(), self.bind(self.features)

    def __reduce__(self):
        # A thread's slot cannot be copied or pickled, and a copied model must not share its original's binding.
        return VisualContext, ()


class _Binding:
    """The ``with`` block of :meth:`VisualContext.bind`; restores what was bound before."""

    def __init__(self, context: VisualContext, features: torch.Tensor | None) -> None:
        self.context = context
        self.bound = features
        self.previous: torch.Tensor | None = None

    def __enter__(self) -> None:
        self.previous = self.context.features
        self.context._slot.features = self.bound

    def __exit__(self, *exc: object) -> None:
        self.context._slot.features = self.previous
        self.previous = None
