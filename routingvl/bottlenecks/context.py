"""How the image reaches the routed layers: bound for the length of a forward pass, read inside it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from routingvl.bottlenecks.binding import Binding, Reading, Weights
from routingvl.bottlenecks.image_index import ImageIndex
from routingvl.bottlenecks.recompute import carry_along
from routingvl.bottlenecks.rows import Tokens
from routingvl.bottlenecks.sharding import is_sharded
from routingvl.kernels import ImageCode

TEXT_ONLY = (None, "skip", "zero")


class VisualContext:
    """Holds the visual features of the running forward pass, one binding per thread.

    A model binds its features around the call of its language model, and every routed layer below reads them::

        with context.bind(features):  # features [B, L, d]
            language_model(...)

    Bindings nest and end with their block, so a forgotten bind is an error and never a stale image. Two threads can run
    one model on different images. A copy of a model gets a context of its own, with nothing bound.

    Attributes:
        source: what is bound here: "image", or what :mod:`~routingvl.bottlenecks.sources` binds in its place, "text"
            (which positions are no padding) or "encoder" (its states).
    """

    def __init__(self, source: str = "image") -> None:
        self.source = source
        self._thread = _Thread()
        # Modules of routingvl.bottlenecks.layers, which imports this file; in the order of add().
        self._readers: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()
        self._sharded = False
        self._recomputed: weakref.WeakKeyDictionary[nn.Module, None] = weakref.WeakKeyDictionary()

    def add(self, layer: nn.Module) -> None:
        """Count ``layer``, which reads the image here, among those that have it projected together."""
        self._readers[layer] = None

    def follow(self, model: nn.Module) -> None:
        """Have the layers of ``model`` recomputed with the image of their own forward pass.

        This holds for modules with transformers' switch ``gradient_checkpointing``, whenever it is set, reentrant or
        not: the function that checkpoints them is wrapped in one that carries the binding along.
        """
        for module in model.modules():
            if hasattr(type(module), "gradient_checkpointing") or "gradient_checkpointing" in vars(module):
                self._recomputed[module] = None

    def bind(
        self,
        features: torch.Tensor | None,
        *,
        mask: torch.Tensor | None = None,
        beams: int | None = 1,
        decoding: bool = False,
        text_only: str | None = None,
        image_index: torch.Tensor | None = None,
    ) -> AbstractContextManager[None]:
        """Make ``features`` readable inside the ``with`` block, in this thread.

        A routing function of one visual token reads the mean of each image's own tokens.

        Args:
            features: [B, L, d], one entry per image (or per text, with the tokens of all its images); None hides what
                is bound around the block or, with ``text_only``, says that no text has an image.
            mask: bool [B, L], False where the tokens are padding; a row of False alone belongs to a text without image.
            beams: how many consecutive rows of text belong to each entry; the text's batch is then B*beams. None: each
                layer finds it by itself, as encoder and decoder may differ; it must be a whole number.
            decoding: many calls without gradients will follow, each with a few tokens of the same texts: what a layer
                makes of the image is kept until the block ends, see :meth:`image_code`.
            text_only: what becomes of a text without an image. None: it is an error. "skip": the bottlenecks add
                nothing to it. "zero": its image is zero in every layer (v = 0).
            image_index: int64 [rows of text, T], the entry of ``features`` that each token of the text reads, -1 for
                none (``text_only`` says what becomes of it): for texts packed into one row, and texts that read several
                images. Layers read the mean of an entry's tokens. While ``decoding``, a call with fewer tokens is a
                later step, which reads what the row's last token does; one with as many or more is the text again.
                None: in order, which is faster.

        Raises:
            ValueError: features are not a tensor of three dimensions, mask or index do not fit them, a text has no
                image and ``text_only`` is None, or ``beams`` is below 1.
        """
        if features is not None and features.dim() != 3:
            raise ValueError(
                f"visual features must be [batch, visual tokens, width], not {list(features.shape)}; "
                "for one pooled vector per image use features[:, None]"
            )
        if beams is not None and beams < 1:
            raise ValueError(f"beams={beams} must be at least 1, or None to find it in each layer")
        if text_only not in TEXT_ONLY:
            raise ValueError(f"text_only={text_only!r} is not one of {', '.join(map(repr, TEXT_ONLY))}")
        binding = Binding(features, features, beams, decoding, text_only, traced=torch.compiler.is_compiling())
        if features is None:
            if mask is not None or image_index is not None:
                name = "mask" if image_index is None else "image_index"
                raise ValueError(f"{name}= belongs to features, and features is None")
        elif image_index is not None:
            binding.index = found = ImageIndex.of(features, mask, image_index, text_only)
            binding.pooled, binding.mask = found.pooled, found.real
        elif mask is not None:
            binding.apply(mask)
        else:
            binding.pooled = Tokens(features, None).mean().features
        return self.bind_made(binding)

    def bind_made(self, binding: Binding) -> AbstractContextManager[None]:
        """:meth:`bind` what was put together already."""
        if self._recomputed and not torch.compiler.is_compiling():
            for module in self._recomputed:
                carry_along(self, module)
        return self._bound(binding)

    @contextlib.contextmanager
    def _bound(self, binding: Binding) -> Iterator[None]:
        previous, self._thread.binding = self._thread.binding, binding
        hidden = self._thread.hidden
        if previous is not None:
            self._thread.hidden |= previous.hidden  # its layers are not to be recomputed with this binding
        try:
            yield
        finally:
            self._thread.binding = previous
            binding.kept = {}  # a new one: recomputations may still read the old
            self._thread.hidden = hidden or binding.hidden

    def rows(self, index: torch.Tensor, of: int) -> AbstractContextManager[None]:
        """Bind, for a call with some rows of the text, what is bound for all of them.

        Args:
            index: long [n], the rows that the call has.
            of: how many rows the whole text has.
        """
        binding = self._current()
        if binding is not None and self.source == "text" and binding.mask is not None:
            return self._bound(replace(binding, mask=binding.mask[index.to(binding.mask.device)]))
        if binding is None or binding.features is None:
            return contextlib.nullcontext()
        images = index // max(1, of // binding.batch)
        if binding.index is not None:
            kept = binding.index.of_rows(images)
            return self._bound(replace(binding, index=kept, beams=1, kept={}, hidden=False))
        at = {name: getattr(binding, name) for name in ("features", "pooled", "mask", "counted", "present")}
        at = {name: None if value is None else value[images.to(value.device)] for name, value in at.items()}
        return self._bound(replace(binding, **at, beams=1, kept={}, hidden=False))

    @property
    def features(self) -> torch.Tensor | None:
        """The features bound in this thread, or None."""
        binding = self._thread.binding
        return None if binding is None else binding.features

    @property
    def is_bound(self) -> bool:
        """Whether layers can be called here: there is an image, or it is said that there is none."""
        binding = self._thread.binding
        return binding is not None and (binding.features is not None or binding.text_only is not None)

    @property
    def read_without_image(self) -> bool:
        """Whether a layer ran in this binding, and there is no image in it."""
        binding = self._thread.binding
        return binding is not None and binding.read

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The bound features [B, L, d] for the text ``x`` [B*beams, T, d].

        Raises:
            RuntimeError: nothing is bound, or a backward pass recomputes the layer and may do so with another image.
            ValueError: the batch of ``x`` is not that of the features, times the beams.
        """
        return self._checked(x).features

    def reading(self, x: torch.Tensor, *, pooled: bool, width: int, image_width: int) -> Reading:
        """What a layer reads for the text ``x``, see :meth:`read`.

        Args:
            pooled: the mean of each image's tokens.
            width: K, for the zeros that stand for the image in a batch without one.
            image_width: d, how wide the features have to be; else ValueError.
        """
        binding = self._thread.binding
        if binding is not None and binding.features is None and binding.text_only is not None:
            binding.read = True
            keep = None if binding.text_only == "zero" else x.new_zeros(1, 1, 1, dtype=torch.bool)
            return Reading(x.new_zeros(1, 1, width), None, keep)
        binding = self._checked(x)
        if (have := binding.features.shape[2]) != image_width:
            if self.source == "encoder":
                raise ValueError(
                    f"the encoder's states are {have} wide, and a bottleneck that is routed by them reads {width}: "
                    "call its decoder with states of that width"
                )
            raise ValueError(
                f"the image's features are {have} wide, and the routed layers read {image_width}: give features "
                f"[B, L, {image_width}] (image_from=, bind_image), or build the bottlenecks with "
                f"image_projection='linear' and image_width={have}"
            )
        if (found := binding.index) is not None:
            index, keep = found.for_text(x, pooled, binding.decoding)
            return Reading(binding.pooled, None, keep, None, index)
        v = binding.pooled if pooled else binding.features
        if binding.mask is None:
            return Reading(v)
        keep = binding.present
        if keep is not None:
            beams = x.shape[0] // v.shape[0]
            keep = (keep if beams == 1 else keep.repeat_interleave(beams)).view(-1, 1, 1)
        return Reading(v, None, keep, None if v.shape[1] == 1 else binding.counted)

    def blank(self, v: torch.Tensor) -> torch.Tensor:
        """``v`` [B, L, K], made of what :meth:`reading` gave, with zeros where that is padding."""
        binding = self._current()
        if binding is None or binding.mask is None:
            return v
        mask = binding.mask if v.shape[1] == binding.mask.shape[1] else binding.mask.any(1, keepdim=True)
        return v.masked_fill(~mask.unsqueeze(2), 0)

    def own_text(self, x: torch.Tensor, *, pooled: bool) -> Reading:
        """What a layer reads that is routed by its own input ``x`` [B, T, K]: their mean, or all that are no padding.

        Raises:
            RuntimeError: the stack that the layer is in does not run, so that its padding is not known.
            ValueError: the mask of that stack is not of these positions.
        """
        binding = self._current()
        if binding is None:
            raise RuntimeError(
                "a bottleneck that is routed by its own text ran outside of the model whose attention_mask says what "
                "is padding: call that model, or pass what it is routed by as second argument"
            )
        if binding.fault is not None:
            raise binding.fault
        if (mask := binding.mask) is not None and mask.shape != x.shape[:2]:
            raise ValueError(
                f"the attention_mask {list(mask.shape)} is not of the {list(x.shape[:2])} positions that a bottleneck "
                "routed by text has: leave this place out (exclude=)"
            )
        v, counted = x, mask
        if pooled:
            v, counted = Tokens(x, mask).mean().features, None
        elif mask is not None:
            v = x.masked_fill(~mask.unsqueeze(2), 0)
        return Reading(v, None, None, counted)

    def _checked(self, x: torch.Tensor) -> Binding:
        """The binding to read for ``x``."""
        binding = self._current()
        if binding is not None and binding.fault is not None:
            raise binding.fault
        if self.source == "encoder" and (binding is None or binding.features is None):
            raise RuntimeError(
                "a bottleneck that is routed by an encoder's states ran where there are none: call the whole model, or "
                "its decoder with encoder_hidden_states="
            )
        if binding is None or binding.features is None:
            raise RuntimeError(
                "a routed layer ran with no visual features bound: call the model inside "
                "`with context.bind(features):` or `with routingvl.bind_image(model, features):`, attach its image "
                "once with routingvl.attach(model, ...), or pass pixel_values= or vision_features= to a routingvl model"
            )
        if torch.compiler.is_exporting() and not binding.traced:
            raise RuntimeError(
                "an export inside a binding would write this one image into the program: export a module whose forward "
                "takes the features as an input and binds them itself, `with context.bind(features):`"
            )
        images, rows = binding.batch, x.shape[0]
        what = "features have" if binding.index is None else "image_index has"
        if binding.beams is None:
            if not images or rows % images:
                raise ValueError(
                    f"{what} batch {images}, and the text of a routed layer has batch {rows}: not a whole "
                    "number of rows for each image"
                )
        elif images * binding.beams != rows:
            times = f" and {binding.beams} beams each" if binding.beams > 1 else ""
            raise ValueError(
                f"{what} batch {images}{times}, text has batch {rows}; with beams, bind "
                "context.bind(features, beams=num_beams)"
            )
        return binding

    def _current(self) -> Binding | None:
        """The binding to read: this thread's, but in a backward pass that of the forward pass being recomputed."""
        binding = self._thread.binding
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return binding
        if binding is not None and binding.recomputes:
            return binding
        if (found := self._of_graph()) is not None:
            return found
        if binding is None or binding.features is None or self._thread.hidden:
            what = "with which image" if self.source == "image" else "what it was routed by"
            raise RuntimeError(
                f"a backward pass recomputes a routed layer, and it is not known {what}: switch checkpointing "
                "on with gradient_checkpointing_enable({'use_reentrant': False, 'context_fn': "
                "context.checkpoint_context_fn}), or by a routingvl model's own gradient_checkpointing_enable()"
            )
        binding.hidden = False  # this is its reentrant checkpoint
        return binding

    def _of_graph(self) -> Binding | None:
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
        if binding.features is None:  # no text has an image
            return None
        if recording and (layer.image_projection is not None or binding.index is not None):
            return None
        features = binding.pooled if layer.pooled or binding.index is not None else binding.features
        options = layer.joint_options(features) if recording else None
        if recording and (options is None or features.is_inference()):
            return None
        if any(weight.is_inference() for weight in weights):  # these do not count their changes
            return None
        known = binding.kept.get(layer)
        if known is None or known[0] != _state(recording, features, weights):
            together = self._like(layer, weights, features, options) if recording else {layer: weights}
            codes = [None]  # one that is trained and has none like it makes its code in its call
            if not recording:
                codes = [layer.project(layer.to_own_width(features))]
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
        self._sharded = self._sharded or any(is_sharded(own[0]) for own in readers.values())
        if self._sharded:
            return {layer: weights}
        alike = layer.kind, *map(_traits, weights)
        return {
            reader: own
            for reader, own in readers.items()
            if (reader.kind, *map(_traits, own)) == alike
            and reader.joint_options(features) == options
            and reader.image_projection is None
            and reader.context is self
        }

    def checkpoint_context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """``context_fn`` for non-reentrant ``torch.utils.checkpoint``: the recomputation sees the same features."""
        return contextlib.nullcontext(), self.bound_again(self._thread.binding or Binding())

    def bound(self) -> Binding | None:
        """What is bound here, to be handed to :meth:`bound_again`; None for nothing."""
        return self._current() if self._thread.binding is not None else None

    def bound_again(self, binding: Binding) -> AbstractContextManager[None]:
        """Bind for a recomputation what :meth:`bound` gave."""
        return self._bound(binding.again())

    def __reduce__(self):
        return type(self), (self.source,)


class _Thread(threading.local):
    """What is bound in each thread."""

    def __init__(self) -> None:
        self.binding: Binding | None = None
        self.hidden = False  # whether a binding ended whose layers may be recomputed by a reentrant checkpoint


def _state(recording: bool, features: torch.Tensor, weights: Weights) -> tuple:
    """What a code depends on besides the layer's options: whether gradients are recorded, and the tensors' contents."""
    version = None if features.is_inference() else features._version
    v = (features.data_ptr(), version, features.requires_grad)
    return recording, v, *((w.data_ptr(), w._version, w.requires_grad) for w in weights)


def _traits(weight: torch.Tensor) -> tuple:
    return weight.shape, weight.dtype, weight.device, weight.requires_grad
