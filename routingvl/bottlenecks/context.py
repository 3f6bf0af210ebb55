"""How the image reaches the routed layers: bound for the length of a forward pass, read inside it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from routingvl.bottlenecks.sharding import is_sharded
from routingvl.kernels import ImageCode

Weights = tuple[torch.Tensor, torch.Tensor]


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
        # Modules of routingvl.bottlenecks.layers, which imports this file; in the order of add().
        self._readers: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()
        self._sharded = False

    def add(self, layer: nn.Module) -> None:
        """Count ``layer``, which reads the image here, among those that have it projected together."""
        self._readers[layer] = None

    def bind(
        self, features: torch.Tensor | None, *, beams: int = 1, decoding: bool = False
    ) -> AbstractContextManager[None]:
        """Make ``features`` readable inside the ``with`` block, in this thread.

        Args:
            features: [B, L, d], one entry per image; None hides what is bound around the block.
            beams: how many consecutive rows of text belong to each image; the text's batch is then B*beams.
            decoding: many calls without gradients will follow, each with a few tokens of the same texts: what a layer
                makes of the image is kept until the block ends, see :meth:`image_code`.

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
        return self._bound(_Binding(features, beams, decoding))

    @contextlib.contextmanager
    def _bound(self, binding: _Binding) -> Iterator[None]:
        previous, self._thread.binding = self._thread.binding, binding
        try:
            yield
        finally:
            self._thread.binding = previous
            binding.kept = {}  # a new one: recomputations may still read the old
            self._thread.hidden |= binding.hidden

    @property
    def features(self) -> torch.Tensor | None:
        """The features bound in this thread, or None."""
        binding = self._thread.binding
        return None if binding is None else binding.features

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The bound features [B, L, d] for the text ``x`` [B*beams, T, d].

        Raises:
            RuntimeError: nothing is bound, or a backward pass recomputes the layer and may do so with another image.
            ValueError: the batch of ``x`` is not that of the features, times the beams.
        """
        binding = self._current()
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

    def _current(self) -> _Binding | None:
        """The binding to read: this thread's, but in a backward pass that of the forward pass being recomputed."""
        binding = self._thread.binding
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return binding
        if binding is not None and binding.recomputes:
            return binding
        if (found := self._of_graph()) is not None:
            return found
        if binding is None or binding.features is None or self._thread.hidden:
            raise RuntimeError(
                "a backward pass recomputes a routed layer, and it is not known with which image: switch checkpointing "
                "on with gradient_checkpointing_enable({'use_reentrant': False, 'context_fn': "
                "context.checkpoint_context_fn}), or by a routingvl model's own gradient_checkpointing_enable()"
            )
        binding.hidden = False  # this is its reentrant checkpoint
        return binding

    def _of_graph(self) -> _Binding | None:
        """What the forward pass read whose graph the running backward pass is in: :meth:`watch` left it there."""
        nodes, seen = [torch._C._current_autograd_node()], set()
        for node in nodes:  # grows: the nearest come first
            if node is None or node in seen:
                continue
            if (found := node.metadata.get(self)) is not None:
                return found
            seen.add(node)
            nodes += [after for after, _ in node.next_functions]
        return None

    def watch(self, y: torch.Tensor) -> None:
        """Leave in the graph of ``y``, the output of a routed layer that trains, what the layer read.

        A checkpoint that knows nothing of the context then recomputes the layer with it. The graph of a reentrant one
        cannot be seen; that there may be one is remembered.
        """
        binding = self._thread.binding
        if binding is None or binding.recomputes or torch.compiler.is_compiling():
            return
        if y.grad_fn is not None:
            y.grad_fn.metadata[self] = binding.again()
        elif not torch.is_grad_enabled():
            binding.hidden = True

    def image_code(self, layer: nn.Module, weights: Weights) -> ImageCode | None:
        """What the bound features come to in ``layer`` of these weights, made once and kept until the binding ends.

        While gradients are recorded, the first layer to ask has it made by one call for all that are like it. In a
        decoding binding without gradients, each layer makes its own. None where the layer is to make it in its call:
        anywhere else, and in compiled regions. A change of weights or features is seen, and the code made again.
        """
        binding, recording = self._current(), torch.is_grad_enabled()
        if torch.compiler.is_compiling() or not (recording or binding.decoding):
            return None
        if torch._C._are_functorch_transforms_active():  # torch.func: its tensors have no address
            return None
        features = binding.features
        options = layer.joint_options(features) if recording else None
        if recording and (options is None or features.is_inference()):
            return None
        if weights[0].is_inference() or weights[1].is_inference():  # these do not count their changes
            return None
        known = binding.kept.get(layer)
        if known is None or known[0] != _state(recording, features, weights):
            together = self._like(layer, weights, features, options) if recording else {layer: weights}
            codes = [None]  # one that is trained and has none like it makes its code in its call
            if not recording:
                codes = [layer.project(features)]
            elif len(together) > 1:
                codes = layer.project_jointly(features, *zip(*together.values(), strict=True), **options)
            for (reader, own), code in zip(together.items(), codes, strict=True):
                binding.kept[reader] = _state(recording, features, own), own, code
        return binding.kept[layer][2]

    def _like(
        self, layer: nn.Module, weights: Weights, features: torch.Tensor, options: dict[str, Any]
    ) -> dict[nn.Module, Weights]:
        """The weights of ``layer`` and of all layers whose image one call can project with its own."""
        if layer not in self._readers or not layer.takes(features):
            return {layer: weights}
        readers = {reader: weights if reader is layer else reader.projection for reader in list(self._readers)}
        # FSDP2 reduces a layer's gradients as soon as it has those of its input: too early for joint ones.
        self._sharded = self._sharded or any(is_sharded(a) for a, _ in readers.values())
        if self._sharded:
            return {layer: weights}
        alike = layer.kind, *map(_traits, weights)
        return {
            reader: own
            for reader, own in readers.items()
            if (reader.kind, *map(_traits, own)) == alike and reader.joint_options(features) == options
        }

    def checkpoint_context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """``context_fn`` for non-reentrant ``torch.utils.checkpoint``: the recomputation sees the same features."""
        binding = self._thread.binding or _Binding(None)
        return contextlib.nullcontext(), self._bound(binding.again())

    def __reduce__(self):
        return type(self), ()


class _Thread(threading.local):
    """What is bound in each thread."""

    def __init__(self) -> None:
        self.binding: _Binding | None = None
        self.hidden = False  # whether a binding ended whose layers may be recomputed by a reentrant checkpoint


@dataclass(eq=False)
class _Binding:
    """What :meth:`VisualContext.bind` was given, and what became of it.

    Attributes:
        kept: {layer: (state that its code was made in, its weights, its code or None)}. The weights are there so that
            no other tensor can come to stand at their addresses.
        recomputes: whether it is that of a recomputation.
        hidden: whether layers ran in it that a reentrant checkpoint may recompute.
    """

    features: torch.Tensor | None
    beams: int = 1
    decoding: bool = False
    kept: dict[nn.Module, tuple[tuple, Weights, ImageCode | None]] = field(default_factory=dict)
    recomputes: bool = False
    hidden: bool = False

    def again(self) -> _Binding:
        """The same for a recomputation, which also sees what was made of the features."""
        return _Binding(self.features, self.beams, self.decoding, self.kept, recomputes=True)


def _state(recording: bool, features: torch.Tensor, weights: Weights) -> tuple:
    """What a code depends on besides the layer's options: whether gradients are recorded, and the tensors' contents."""
    (a, b), version = weights, None if features.is_inference() else features._version
    v = (features.data_ptr(), version, features.requires_grad)
    return recording, v, a.data_ptr(), a._version, a.requires_grad, b.data_ptr(), b._version, b.requires_grad


def _traits(weight: torch.Tensor) -> tuple:
    return weight.shape, weight.dtype, weight.device, weight.requires_grad
