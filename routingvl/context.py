"""How the image reaches the routed layers: bound for the length of a forward pass, read inside it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class ThreadSlot:
    """A place for one value a thread; a copy starts empty, because a thread's values cannot be copied or pickled."""

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self) -> Any:
        """What this thread put here, or None."""
        return getattr(self._local, "value", None)

    def set(self, value: Any) -> None:
        """Put ``value`` here for this thread."""
        self._local.value = value

    def __reduce__(self):
        return ThreadSlot, ()


class Reader(Protocol):
    """A layer that can be told beforehand what the image comes to in it.

    Attributes:
        prepared: where the binding leaves a pair (the binding, what the layer made of the image).
    """

    prepared: ThreadSlot

    def prepare(self, readers: Sequence[Reader], features: torch.Tensor, decoding: bool) -> list[Any]:
        """What each of ``readers``, this one's kind, makes of the features; None for one that will do it by itself."""


class VisualContext:
    """Holds the visual features of the running forward pass, one slot a thread.

    A model binds its features around the call of its language model, and every routed layer below reads them::

        with context.bind(features):  # features [B, L, d]
            language_model(...)

    Binding is strictly nested and cleared on exit, so a forgotten bind is an error and never a stale image. The slot
    is thread-local: two threads can run one model on different images. Copies of a model get a context of their own.

    The features are the same at every layer, so the layers that were registered (``inject`` registers its own) have
    them projected together when they are bound, by one product instead of one a layer; in generation that happens once
    for all steps. A layer does it by itself where that cannot be: while dropout draws a mask for each layer, and where
    the parameters are sharded layer by layer (FSDP2). What a backward pass has gone through is not used again.

    Args:
        stacked: project for all layers together; False: every layer for itself, in each call.
    """

    def __init__(self, stacked: bool = True) -> None:
        self.stacked = stacked
        self.readers: list[Reader] = []
        self._slot = ThreadSlot()

    def register(self, reader: Reader) -> None:
        """Project for this layer too when features are bound."""
        if not any(reader is known for known in self.readers):
            self.readers.append(reader)

    def forget(self, reader: Reader) -> None:
        """Undo :meth:`register`; nothing happens when it never was."""
        self.readers = [known for known in self.readers if known is not reader]

    def bind(
        self, features: torch.Tensor | None, *, beams: int = 1, decoding: bool = False
    ) -> AbstractContextManager[None]:
        """Make ``features`` [B, L, d] readable inside the ``with`` block, in this thread.

        ``features`` may be None, which is how a recomputation repeats a forward pass that had nothing bound.

        Args:
            features: one entry an image.
            beams: how many consecutive rows of text belong to each image; the text's batch is then B*beams.
            decoding: many calls with few rows of text each will follow, so that preparing more for them pays.

        Raises:
            ValueError: features are not a tensor of three dimensions, or ``beams`` is below 1.
        """
        if features is not None and features.dim() != 3:
            raise ValueError(
                f"visual features must be [batch, visual tokens, width], not {list(features.shape)}; "
                "for one pooled vector an image use features[:, None]"
            )
        if beams < 1:
            raise ValueError(f"beams={beams} must be at least 1")
        return _Binding(self, features, beams, decoding)

    @property
    def features(self) -> torch.Tensor | None:
        """The features bound in this thread, or None."""
        bound = self._slot.get()
        return None if bound is None else bound.features

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The bound features [B, L, d] for the text ``x`` [B*beams, T, d].

        Raises:
            RuntimeError: nothing is bound.
            ValueError: the batch of ``x`` is not that of the features, times the beams.
        """
        bound = self._slot.get()
        if bound is None or bound.features is None:
            raise RuntimeError(
                "a routed layer ran with no visual features bound: call the model inside "
                "`with context.bind(features):`, or pass pixel_values= or vision_features= to a routingvl model"
            )
        images = bound.features.shape[0]
        if images * bound.beams != x.shape[0]:
            times = f" and {bound.beams} beams each" if bound.beams > 1 else ""
            raise ValueError(
                f"features have batch {images}{times}, text has batch {x.shape[0]}; with beams, bind "
                "context.bind(features, beams=num_beams)"
            )
        return bound.features

    def checkpoint_context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """``context_fn`` for non-reentrant ``torch.utils.checkpoint``: the recomputation sees the same features."""
        bound = self._slot.get()
        return nullcontext(), _Binding(self, None) if bound is None else bound.again()

    def __reduce__(self):
        # A copied model must not share its original's binding; its layers register with its own context.
        return type(self), (self.stacked,)


class _Binding:
    """The ``with`` block of :meth:`VisualContext.bind`; restores what was bound before.

    Attributes:
        spent: a backward pass has gone through what was prepared, so its graph is gone and the weights may change.
    """

    def __init__(
        self,
        context: VisualContext,
        features: torch.Tensor | None,
        beams: int = 1,
        decoding: bool = False,
        prepared: list[tuple[Reader, Any]] | None = None,
    ) -> None:
        self.context, self.features, self.beams, self.decoding = context, features, beams, decoding
        self.prepared = prepared
        self.previous: _Binding | None = None
        self.spent = False

    def again(self) -> _Binding:
        """A binding of the same features with the same preparations, to be entered at another time."""
        return _Binding(self.context, self.features, self.beams, self.decoding, self.prepared)

    def __enter__(self) -> None:
        self.previous = self.context._slot.get()
        if self.prepared is None:
            self.prepared = self._prepare()
        self.context._slot.set(self)
        self._hand_out()

    def __exit__(self, *exc: object) -> None:
        self.context._slot.set(self.previous)
        for reader, _ in self.prepared:
            reader.prepared.set(None)
        if self.previous is not None:
            self.previous._hand_out()
        self.previous = None

    def _hand_out(self) -> None:
        for reader, prepared in self.prepared:
            reader.prepared.set((self, prepared))

    def _prepare(self) -> list[tuple[Reader, Any]]:
        """What every registered layer makes of the features, the layers of one kind together."""
        if self.features is None or not self.context.stacked:
            return []
        kinds: dict[type, list[Reader]] = {}
        for reader in self.context.readers:
            kinds.setdefault(type(reader), []).append(reader)
        pairs = []
        for readers in kinds.values():
            made = readers[0].prepare(readers, self.features, self.decoding)
            pairs += [pair for pair in zip(readers, made, strict=True) if pair[1] is not None]
        if not torch.compiler.is_compiling():
            # The product for all layers, of which each one's code is a part; everything prepared comes from it.
            products = [prepared.u if prepared.u._base is None else prepared.u._base for _, prepared in pairs]
            # Weakly: the hook is part of the graph, which this binding holds by what was prepared, and no garbage
            # collector looks for such a circle.
            binding = weakref.ref(self)
            for product in {id(product): product for product in products}.values():
                if product.requires_grad:
                    product.register_hook(lambda _: _spend(binding()))
        return pairs


def _spend(binding: _Binding | None) -> None:
    if binding is not None:
        binding.spent = True
