"""What bottlenecks are routed by in the place of the image: their own text, or an encoder's states in a decoder.

Layers read both as they read the image, from a :class:`~routingvl.bottlenecks.context.VisualContext`. Nobody binds them
by hand: hooks of the stack that the layers are in do, of the arguments that it is called with.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from routingvl.backbones.loading import BackboneError
from routingvl.backbones.text import ENCODER, text_kind
from routingvl.bottlenecks.binding import Binding
from routingvl.bottlenecks.context import VisualContext
from routingvl.bottlenecks.families import STATES_READERS
from routingvl.bottlenecks.places import SurgeryError, text_models
from routingvl.bottlenecks.projections import is_projection, projection_widths
from routingvl.bottlenecks.rows import Tokens
from routingvl.config.routing import source_of
from routingvl.kernels.attention import find_function

ARGUMENT = {"text": "attention_mask", "encoder": "encoder_hidden_states"}  # of the stack that is told


class Sources:
    """What each bottleneck of one injection reads, and from which context.

    Args:
        model: that is injected.
        routed_by, routing: of the config.
        context: of the image.
        has_own: whether bottlenecks have a down-projection for what they read.

    Attributes:
        image_width: of those down-projections, where they read the image.
    """

    def __init__(
        self, model: nn.Module, routed_by: str, routing: str, context: VisualContext, has_own: bool = False
    ) -> None:
        self.model, self.context = model, context
        self.routed_by, self.source = routed_by, source_of(routed_by)
        self.routing, self.mixes_text = routing, find_function(routing).mixes_text
        self.stacks: dict[str, nn.Module] = {}
        self.has_own, self.image_width = has_own, None
        self._states: dict[str, int | None] = {}  # of each stack: how wide the states are that it reads
        self.own = context
        if self.source != "image":
            earlier = (told.context for module in model.modules() for told in _told(module))
            self.own = next((c for c in earlier if c.source == self.source), None) or VisualContext(self.source)

    def of(self, name: str, width: int) -> dict[str, Any]:
        """The keywords of the bottleneck at the module called ``name``, whose inputs are ``width``, that say what it
        reads.

        Raises:
            SurgeryError: it would be routed by what it must not see, by what it is not told, or by what has another
                width.
        """
        routed_by, context, states = self._source_of(name)
        found = {"routed_by": routed_by, "context": context}
        if self.has_own:
            widths = {"image": self.image_width, "encoder": states, "text": width}
            return found | {"image_projection": "own", "image_width": widths[source_of(routed_by)]}
        if states not in (None, width):
            raise SurgeryError(
                f"routed_by={routed_by!r}: {name} takes {width} features and the encoder's states have {states}: name "
                f"targets that take {states} (targets=, exclude=), or set image_projection='own', which takes any width"
            )
        return found

    def _source_of(self, name: str) -> tuple[str, VisualContext, int | None]:
        """What a bottleneck is routed by, where it reads that, and for an encoder's states how wide they are."""
        if self.mixes_text:
            stack = _stack(self.model, name, "attention_mask")
            _refuse_causal(name, self.model if stack is None else stack[1], f"routing={self.routing!r}")
        if self.source == "image":
            return "image", self.context, None
        stack, states = _stack(self.model, name, ARGUMENT[self.source]), None
        if self.source == "encoder":
            if stack is not None and stack[0] not in self._states:
                self._states[stack[0]] = _states_width(stack[1])
            if stack is None or (states := self._states[stack[0]]) is None:
                return "image", self.context, None
        if stack is None:
            raise SurgeryError(
                f"routed_by={self.routed_by!r}: no module above {name} takes attention_mask=, so what is padding is "
                "not known there"
            )
        if self.source == "text":
            _refuse_causal(name, stack[1], f"routed_by={self.routed_by!r}")
        self.stacks[stack[0]] = stack[1]
        return self.routed_by, self.own, states

    def check(self) -> None:
        """Raise SurgeryError where no bottleneck is routed by what was asked for."""
        if self.source != "image" and not self.stacks:
            raise SurgeryError(
                f"routed_by={self.routed_by!r} is for decoders that read an encoder's states, as BART's and T5's do, "
                "and none of the targets is in one: use routed_by='image', or 'text' in an encoder"
            )

    def connect(self) -> None:
        """Have the stacks bind what their bottlenecks are routed by."""
        if self.source == "image":
            return
        for stack in self.stacks.values():
            if not any(told.context is self.own for told in _told(stack)):
                Told(self.own).by(stack)


class Told:
    """The hooks by which a stack binds, for its own forward pass, what its bottlenecks are routed by."""

    def __init__(self, context: VisualContext) -> None:
        self.context = context
        self._followed = False
        self._running = _Running()
        # While a cache of keys and values lives, its states are bound again, with what the layers made of them.
        self._kept: weakref.WeakKeyDictionary[Any, _Kept] = weakref.WeakKeyDictionary()

    def by(self, stack: nn.Module) -> None:
        """Hang on ``stack``."""
        stack.register_forward_pre_hook(self.enter, prepend=True, with_kwargs=True)
        stack.register_forward_hook(self.leave, always_call=True)

    @torch.compiler.disable
    def enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Bind what ``stack`` is called with."""
        if not self._followed:  # a copy of a stack has hooks of its own, and these a context that follows nothing
            self.context.follow(stack)
            self._followed = True
        self._running.bound.append(contextlib.nullcontext())  # to be taken off where this fails
        given = inspect.signature(stack.forward).bind_partial(*args).arguments | kwargs
        try:
            binding = self._text(given) if self.context.source == "text" else self._states(given)
        except ValueError as fault:  # for the layers that read it: none may, as when they are disabled
            binding = Binding(fault=fault)
        bound = self.context.bind_made(binding)
        bound.__enter__()
        self._running.bound[-1] = bound

    @torch.compiler.disable
    def leave(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """End the binding."""
        self._running.bound.pop().__exit__(None, None, None)

    def _text(self, given: dict[str, Any]) -> Binding:
        return Binding(mask=_mask(given.get("attention_mask"), "attention_mask", None))

    def _states(self, given: dict[str, Any]) -> Binding:
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        cache = given.get("past_key_values")
        if states is None:
            return Binding()
        if cache is None or torch.is_grad_enabled() or states.is_inference():
            return _bound_states(states, mask, decoding=False)
        known = self._kept.get(cache)
        if known is None or known.states is not states or known.version != states._version or known.mask is not mask:
            known = _Kept(states, states._version, mask, _bound_states(states, mask, decoding=True))
            self._kept[cache] = known
        return replace(known.binding)  # with the same dictionary of what the layers made

    def __reduce__(self):
        return type(self), (self.context,)


class _Kept(NamedTuple):
    """What was bound for the states that a cache of keys and values belongs to."""

    states: torch.Tensor
    version: int
    mask: torch.Tensor | None
    binding: Binding


class _Running(threading.local):
    """The bindings of the calls that run in each thread, the innermost last."""

    def __init__(self) -> None:
        self.bound: list[AbstractContextManager[None]] = []


def take_off(module: nn.Module) -> None:
    """Remove the hooks of :class:`Told` from ``module``."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Told)]:
            module_hooks_of_kwargs = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called)
            for beside in (hooks, *module_hooks_of_kwargs):
                beside.pop(key, None)


def _told(stack: nn.Module) -> Iterator[Told]:
    """The hooks of :class:`Told` that ``stack`` has."""
    owners = (getattr(hook, "__self__", None) for hook in stack._forward_pre_hooks.values())
    return (owner for owner in owners if isinstance(owner, Told))


def _stack(model: nn.Module, name: str, argument: str) -> tuple[str, nn.Module] | None:
    """The module of a text model, above the module called ``name``, whose forward takes ``argument`` as it is given.

    That is the innermost that takes token ids too, for those below it get masks of attention; where none does, the
    outermost. An encoder-decoder is left out: the arguments of its forward are those of two stacks.
    """
    roots = [root for root in text_models(model) if not root or name.startswith(f"{root}.")]
    parts = name.split(".")
    found = None
    for prefix in (".".join(parts[:depth]) for depth in range(len(parts))):
        if roots and not (prefix == roots[0] or prefix.startswith(f"{roots[0]}.") or not roots[0]):
            continue
        module = model.get_submodule(prefix)
        taken = inspect.signature(module.forward).parameters
        if argument in taken and "decoder_input_ids" not in taken and (found is None or "input_ids" in taken):
            found = prefix, module
    return found


def _states_width(stack: nn.Module) -> int | None:
    """How wide the encoder's states are that ``stack`` reads; None where no cross-attention is known in it."""
    ends = tuple(f".{name}" for name in STATES_READERS)
    readers = (module for name, module in stack.named_modules() if name.endswith(ends) and is_projection(module))
    return next((projection_widths(module)[0] for module in readers), None)


def _refuse_causal(name: str, stack: nn.Module, what: str) -> None:
    """Raise SurgeryError unless every position of ``stack`` may see every other."""
    known = [module.is_causal for module in stack.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    if any(known) or getattr(getattr(stack, "config", None), "is_decoder", False):
        raise SurgeryError(
            f"{what}: {name} is in a causal model, where a token must not see those behind it, and this mixes "
            "all of a text into each of its tokens: use an encoder, name targets in one, or routed_by='image'"
        )
    if not known:
        try:
            encodes = text_kind(stack) == ENCODER
        except BackboneError:
            encodes = False
        if not encodes:
            raise SurgeryError(
                f"{what}: it is not known whether {type(stack).__name__}, which {name} is in, lets every token of a "
                "text see every other: use an encoder of transformers, or routed_by='image'"
            )


def _mask(mask: Any, name: str, like: torch.Tensor | None) -> torch.Tensor | None:
    """Which positions count, bool [B, T], from a mask of a call; None for all."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or (like is not None and mask.shape != like.shape[:2]):
        have = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(
            f"{name} {have} must be [texts, positions] for bottlenecks that are routed by their mean or all"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def _bound_states(states: torch.Tensor, mask: Any, decoding: bool) -> Binding:
    """The binding of an encoder's states [B, S, d]; what is padding reads as zero."""
    mask = _mask(mask, "encoder_attention_mask", states)
    if mask is not None:
        mask = mask.to(states.device)
        states = states.masked_fill(~mask.unsqueeze(2), 0)
    pooled = Tokens(states, mask).mean().features
    return Binding(states, pooled, None, decoding, mask=mask, counted=mask, traced=torch.compiler.is_compiling())
