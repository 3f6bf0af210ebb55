"""How the image reaches the routed layers: bound for the length of a forward pass, read inside it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch

T = TypeVar("T")


class VisualContext:
    """Holds the visual features of the running forward pass, one binding per thread.

    A model binds its features around the call of its language model, and every routed layer below reads them::

        with context.bind(features):  # features [B, L, d]
            language_model(...)

    Bindings nest and end with their block, so a forgotten bind is an error and never a stale image. Two threads can run
    one model on different images. A copy of a model gets a context of its own, with nothing bound.
    """

    def __init__(self) -> None:
        self._thread = _Thread()

    def bind(
        self, features: torch.Tensor | None, *, beams: int = 1, decoding: bool = False
    ) -> AbstractContextManager[None]:
        """Make ``features`` readable inside the ``with`` block, in this thread.

        Args:
            features: [B, L, d], one entry per image; None hides what is bound around the block.
            beams: how many consecutive rows of text belong to each image; the text's batch is then B*beams.
            decoding: many calls without gradients will follow, each with a few tokens of the same texts: what a layer
                makes of the image is kept until the block ends, see :meth:`while_decoding`.

        Raises:
            ValueError: features are not a tensor of three dimensions, or ``beams`` is below 1.
        """
        if features is not None and features.dim() != 3:
            raise ValueError(
                f"visual features must be [batch, visual tokens, width], not {list(features.shape)}; "
                "for one pooled vector per image use features[:, None]"
            )
        if beams < 1:
            raise ValueError(f"beams={beams} must be at least 1")
        return _Binding(self._thread, features, beams, {} if decoding else None)

    @property
    def features(self) -> torch.Tensor | None:
        """The features bound in this thread, or None."""
        binding = self._thread.binding
        return None if binding is None else binding.features

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The bound features [B, L, d] for the text ``x`` [B*beams, T, d].

        Raises:
            RuntimeError: nothing is bound.
            ValueError: the batch of ``x`` is not that of the features, times the beams.
        """
        binding = self._thread.binding
        if binding is None or binding.features is None:
            raise RuntimeError(
                "a routed layer ran with no visual features bound: call the model inside "
                "`with context.bind(features):`, or pass pixel_values= or vision_features= to a routingvl model"
            )
        images = binding.features.shape[0]
        if images * binding.beams != x.shape[0]:
            times = f" and {binding.beams} beams each" if binding.beams > 1 else ""
            raise ValueError(
                f"features have batch {images}{times}, text has batch {x.shape[0]}; with beams, bind "
                "context.bind(features, beams=num_beams)"
            )
        return binding.features

    def while_decoding(
        self, layer: Hashable, weights: Sequence[torch.Tensor], compute: Callable[[torch.Tensor], T]
    ) -> T | None:
        """``compute(features)``, computed once for ``layer`` and kept until the decoding binding ends.

        None where there is nothing to keep it for: outside of a decoding binding, and while gradients are recorded.

        Args:
            layer: for whom it is kept.
            weights: what ``compute`` reads besides the features; it is called again when one was replaced or changed.
            compute: a function of the bound features [B, L, d].
        """
        binding = self._thread.binding
        if binding is None or binding.kept is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if any(weight.is_inference() for weight in weights):  # these do not count their changes
            return None
        # The weights themselves are kept too, so that no other tensor can come to stand at their addresses.
        state = [(weight.data_ptr(), weight._version) for weight in weights]
        known = binding.kept.get(layer)
        if known is None or known[0] != state:
            known = binding.kept[layer] = (state, weights, compute(binding.features))
        return known[2]

    def checkpoint_context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """``context_fn`` for non-reentrant ``torch.utils.checkpoint``: the recomputation sees the same features."""
        binding = self._thread.binding
        if binding is None:
            return nullcontext(), self.bind(None)
        return nullcontext(), self.bind(binding.features, beams=binding.beams)

    def __reduce__(self):
        return type(self), ()


class _Thread(threading.local):
    """What is bound in each thread."""

    def __init__(self) -> None:
        self.binding: _Binding | None = None


class _Binding:
    """The ``with`` block of :meth:`VisualContext.bind`; restores what was bound before.

    Attributes:
        kept: what layers keep while decoding: {layer: (state of its weights, the weights, the value)}; None: nothing.
    """

    def __init__(self, thread: _Thread, features: torch.Tensor | None, beams: int, kept: dict | None) -> None:
        self.features, self.beams, self.kept = features, beams, kept
        self._thread, self._previous = thread, None

    def __enter__(self) -> None:
        self._previous, self._thread.binding = self._thread.binding, self

    def __exit__(self, *exc: object) -> None:
        self._thread.binding, self._previous = self._previous, None
        if self.kept is not None:
            self.kept.clear()
