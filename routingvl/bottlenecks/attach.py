"""The image bound for a whole model: by hand with :func:`bind_image`, or by its own hooks with :func:`attach`."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from routingvl.bottlenecks.context import TEXT_ONLY, VisualContext
from routingvl.bottlenecks.nearest import nearest_images
from routingvl.bottlenecks.rows import (
    BindingError,
    Tokens,
    has_places,
    ids_of,
    place_in_rows,
    refuse_packed_rows,
    tensors_of,
)

IMAGE_POOLING = ("mean", "tokens", "nearest")
STEP_TEXTS = ("decoder_input_ids", "input_ids", "inputs_embeds")  # what a step of generate reads


def contexts_of(model: nn.Module) -> list[VisualContext]:
    """The contexts from which routed layers of ``model`` read the image, each once: ``context`` of its modules."""
    found = (context for context in map(_context, model.modules()) if context is not None)
    return list({id(context): context for context in found if context.source == "image"}.values())


def _context(module: nn.Module) -> VisualContext | None:
    context = vars(module).get("context")
    return context if isinstance(context, VisualContext) else None


@contextlib.contextmanager
def bind_image(
    model: nn.Module,
    features: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    beams: int | None = None,
    text_only: str | None = None,
    decoding: bool = False,
    image_index: torch.Tensor | None = None,
) -> Iterator[None]:
    """Make ``features`` the image of every routed layer of ``model`` inside the ``with`` block::

        with routingvl.bind_image(model, features):  # features [B, L, d]
            model(**batch)

    Args:
        model: any model with routed layers: after ``inject``, after ``get_peft_model``, or a routingvl model.
        features, mask, text_only, decoding, image_index: see :meth:`VisualContext.bind`; decoding=True is for
            ``generate``.
        beams: how many rows of text each entry of the features serves; None finds it in each layer.

    Raises:
        BindingError: the model has no routed layers.
        ValueError: as :meth:`VisualContext.bind`.
    """
    if not (contexts := contexts_of(model)):
        if others := sorted({c.source for c in map(_context, model.modules()) if c is not None}):
            raise BindingError(
                f"the bottlenecks of {type(model).__name__} are routed by {others[0]} and read no image: "
                "call it without"
            )
        raise BindingError(
            f"{type(model).__name__} has no routed layers to bind an image for: call inject(model, config) or "
            "peft.get_peft_model(model, RoutedLoraConfig(...)) first"
        )
    with contextlib.ExitStack() as stack:
        for context in contexts:
            context.follow(model)
            options = {"mask": mask, "beams": beams, "decoding": decoding, "text_only": text_only}
            stack.enter_context(context.bind(features, image_index=image_index, **options))
        yield


def attach(
    model: nn.Module,
    image_from: str | Callable[[dict[str, Any]], Any],
    *,
    image_pooling: str = "mean",
    text_only: str | None = "skip",
) -> Attachment:
    """Have ``model`` bind its own image in every forward pass and in ``generate``, under Trainer too::

        routingvl.attach(model, "model.multi_modal_projector")
        model(**batch)

    While an image is bound by hand, the model leaves it at that.

    Args:
        model: a model with routed layers (they may come later), the one that is called.
        image_from: the dotted name of a sub-module whose output is the image, as tokens of the layers' width; or a
            function of the call's arguments (a dict, from which it may remove its own), which returns features
            [B, L, d], features and a mask bool [B, L], these and an ``image_index`` as :meth:`VisualContext.bind` takes
            it, or None where no text has an image. A module's output goes to
            the rows whose ``input_ids`` hold the model's image tokens, one for one, or by one entry for each row.
        image_pooling: "mean": every layer reads the mean of a row's tokens; "tokens": all of them, padded (pooled
            functions their mean); "nearest": each token of the text reads the mean of the nearest image before it, so
            that a row may be several texts packed together. Tokens before the first image have none.
        text_only: see :meth:`VisualContext.bind`.

    Returns:
        A handle; ``remove()`` makes the model as it was.

    Raises:
        BindingError: there is no such sub-module, an argument is none of its values, or the model is attached already.
    """
    if image_pooling not in IMAGE_POOLING:
        raise BindingError(f"image_pooling={image_pooling!r} is not one of {', '.join(map(repr, IMAGE_POOLING))}")
    if text_only not in TEXT_ONLY:
        raise BindingError(f"text_only={text_only!r} is not one of {', '.join(map(repr, TEXT_ONLY))}")
    if any(isinstance(getattr(hook, "__self__", None), Attachment) for hook in model._forward_pre_hooks.values()):
        raise BindingError(f"{type(model).__name__} has its image attached already: remove() that first")
    if isinstance(image_from, str):
        _sub_module(model, image_from)
    elif not callable(image_from):
        raise BindingError(f"image_from must be the name of a sub-module or a function, not {image_from!r}")
    return Attachment(model, image_from, image_pooling, text_only)


class Attachment:
    """The hooks by which a model binds its own image; made by :func:`attach`."""

    def __init__(
        self, model: nn.Module, image_from: str | Callable[..., Any], image_pooling: str, text_only: str | None
    ) -> None:
        self.model, self.image_from = model, image_from
        self.image_pooling, self.text_only = image_pooling, text_only
        self._hooks = [
            model.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
        ]
        self.image_module()
        self._generate = vars(model).get("generate")
        if hasattr(type(model), "generate"):
            model.generate = self.generate

    def remove(self) -> None:
        """Take the hooks away, and the image with them."""
        for hook in self._hooks:
            hook.remove()
        if vars(self.model).get("generate") == self.generate:
            del self.model.generate
            if self._generate is not None:
                self.model.generate = self._generate

    def image_module(self) -> nn.Module | None:
        """The sub-module that ``image_from`` names now, whose output is looked at; None for a function."""
        if not isinstance(self.image_from, str):
            return None
        module = _sub_module(self.model, self.image_from)
        if not any(hook is _image_passes for hook in module._forward_hooks.values()):
            self._hooks.append(module.register_forward_hook(_image_passes))
        return module

    @torch.compiler.disable
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate``: the image of the prompt serves all its steps, and whatever it calls."""
        generate = self._generate or type(self.model).generate.__get__(self.model)
        if self._bound_by_hand():
            return generate(*args, **kwargs)
        args, kwargs = _named(generate, args, kwargs)
        call = _Call(self, kwargs, generates=True)
        depth = len(_CALLS.open)
        _CALLS.open.append((self, call))
        try:
            call.start()
            output = generate(*args, **kwargs)
            call.check()
            return output
        finally:
            del _CALLS.open[depth:]
            call.close()

    @torch.compiler.disable
    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = _named(model.forward, args, kwargs)
        running = self._running()
        if running is not None and running.owns(kwargs):
            _CALLS.open.append((self, None))
            running.batch, running.begins = kwargs, True
            running.inside += 1
        elif running is None and self._bound_by_hand():
            _CALLS.open.append((self, None))
        else:
            call = _Call(self, kwargs, generates=False)
            _CALLS.open.append((self, call))
            call.start()
        return args, kwargs

    @torch.compiler.disable
    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        _, call = _CALLS.open.pop() if _CALLS.open else (self, None)
        if call is None:
            running = self._running()
            if running is not None:
                running.inside -= 1
        else:
            try:
                if output is not None:  # else it failed
                    call.check()
            finally:
                call.close()

    def _running(self) -> _Call | None:
        """The innermost of this model's calls that bind an image."""
        return next((call for owner, call in reversed(_CALLS.open) if owner is self and call is not None), None)

    def _bound_by_hand(self) -> bool:
        open_calls = any(owner is self for owner, _ in _CALLS.open)
        return not open_calls and any(context.is_bound for context in contexts_of(self.model))


class _Calls(threading.local):
    """The attached models' calls that run in each thread, the innermost last; None where an outer one binds."""

    def __init__(self) -> None:
        self.open: list[tuple[Attachment, _Call | None]] = []


_CALLS = _Calls()


@torch.compiler.disable
def _image_passes(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The hook of a module that gives an image. It holds nothing, so that the module can be copied by itself."""
    call = next((call for _, call in reversed(_CALLS.open) if call is not None and call.module is module), None)
    if call is not None and call.expects_image:
        call.receive(output)


class _Call:
    """One call of the model, forward or generate, and what is bound in it."""

    def __init__(self, attachment: Attachment, batch: dict[str, Any], generates: bool) -> None:
        self.attachment, self.generates = attachment, generates
        self.batch = self.first = batch
        self.begins = True  # the model's forward; its image replaces what is bound
        self.contexts = contexts_of(attachment.model)
        self.bindings = contextlib.ExitStack()
        self.module: nn.Module | None = None
        self.outputs: list[torch.Tensor] = []
        self.waits: BindingError | None = None
        self.past = 0  # tokens in its cache when it began
        self.steps = self.inside = 0  # forward passes of generate so far, and how many of them run now
        self.cache: Any = None
        self.text: Any = None

    def owns(self, batch: dict[str, Any]) -> bool:
        """Whether a forward pass with ``batch`` inside of this call is a part of it.

        In generate, a stopping criterion or a logits processor may use the model for something else. A step has the
        cache of the first one, or without a cache a text that begins as its text.
        """
        if not self.generates:
            return True
        cache = batch.get("past_key_values")
        text = next((batch[key] for key in STEP_TEXTS if batch.get(key) is not None), None)
        if not self.steps:
            self.text = text
        if self.steps and self.cache is not None:
            own = cache is self.cache
        else:
            self.cache = cache
            own = not self.steps or cache is not None or _begins(text, self.text)
        self.steps += own
        return own

    @property
    def expects_image(self) -> bool:
        """Whether what the image's module gives now is of this call: before the first step of generate, or in one."""
        return not self.generates or not self.steps or self.inside > 0

    def start(self) -> None:
        """Bind what is known before the model runs."""
        for context in self.contexts:
            context.follow(self.attachment.model)
        self.past = _cached(self.first)
        self.module = self.attachment.image_module()
        given = self.attachment.image_from(self.batch) if self.module is None else None
        features, mask, index = (*(given if isinstance(given, tuple) else (given,)), None, None)[:3]
        if features is not None and index is None and self.attachment.image_pooling == "nearest":
            raise BindingError(
                "image_pooling='nearest': a function says by itself which image each token reads, it returns features, "
                "a mask (or None) and an image_index"
            )
        self._bind(None if features is None else Tokens(features, mask), index)

    def receive(self, output: Any) -> None:
        """Bind what the module gave, in the rows of the text where it belongs."""
        name = f"image_from={self.attachment.image_from!r}"
        if self.begins:
            self.outputs, self.begins = [], False
        if any(context.read_without_image for context in self.contexts):
            raise BindingError(
                f"routed layers ran before {name} gave the image: inject bottlenecks into the language model only"
            )
        self.outputs += tensors_of(output, name)
        try:
            ids, config = self._text(self.batch)
            if self.attachment.image_pooling == "nearest":
                features, index = nearest_images(self.outputs, ids, self.batch, config, name)
                tokens = Tokens(features, None)
            else:
                tokens, index = place_in_rows(self.outputs, ids, config, name), None
        except BindingError as error:
            self.waits = error  # another call of the module may bring the rest
        else:
            self.waits = None
            self._bind(tokens, index)

    def _text(self, batch: dict[str, Any]) -> tuple[Any, Any]:
        model = self.attachment.model
        ids, config = batch.get("input_ids", batch.get("inputs")), getattr(model, "config", None)
        if ids is None and isinstance(embeds := batch.get("inputs_embeds"), torch.Tensor):
            ids = ids_of(embeds, model.get_input_embeddings(), config)
        return ids, config

    def _check_rows(self, features: torch.Tensor) -> None:
        """In generate each layer finds how many rows share an entry: here is known how many there must be."""
        batches = [rows for batch in (self.first, self.batch) if (rows := _rows(batch)) is not None]
        if batches and len(features) not in batches:
            raise BindingError(
                f"image_from={self.attachment.image_from!r} gives features of {len(features)} rows, and the prompt "
                f"of generate has {batches[0]}"
            )

    def _bind(self, tokens: Tokens | None, index: torch.Tensor | None = None) -> None:
        features, mask = None, None
        if tokens is not None:
            if self.generates:
                self._check_rows(tokens.features if index is None else index)
            elif index is None:
                refuse_packed_rows(self.batch)
            pools = self.attachment.image_pooling == "mean" and index is None
            features, mask = tokens.mean() if pools else tokens
        self.bindings.close()
        for context in self.contexts:
            how = {"beams": None if self.generates else 1, "decoding": self.generates}
            how |= {"mask": mask, "image_index": index, "text_only": self.attachment.text_only}
            bound = context.bind(features, **how)
            self.bindings.enter_context(bound)

    def check(self) -> None:
        """Raise the error of an image that did not reach the text."""
        if self.waits is not None:
            raise self.waits
        if self.module is None or self.outputs:
            return
        name = f"image_from={self.attachment.image_from!r}"
        if has_places(*self._text(self.first)):
            raise BindingError(f"the text has places for an image, but {name} did not run: name a module that does")
        goes_on = self.past > 0 if self.generates else _cached(self.first) > self._length()
        if goes_on:
            raise BindingError(
                f"a call goes on from past_key_values, and {name} did not run in it: bind the prompt's image around "
                "the whole loop with routingvl.bind_image(model, features), or give generate the whole prompt"
            )

    def _length(self) -> int:
        """How many tokens this call itself has put into its cache."""
        texts = [self.first[key] for key in ("input_ids", "inputs_embeds") if self.first.get(key) is not None]
        return texts[0].shape[1] if texts else 0

    def close(self) -> None:
        """End the bindings of this call."""
        self.bindings.close()
        self.outputs, self.batch, self.first = [], {}, {}


def _cached(batch: dict[str, Any]) -> int:
    """How many tokens the cache of a call holds."""
    cache = batch.get("past_key_values")
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0


def _begins(text: Any, first: Any) -> bool:
    """Whether ``text`` begins as ``first``, both [B, T] or [B, T, d]; True where one of them is not known."""
    if not isinstance(text, torch.Tensor) or not isinstance(first, torch.Tensor):
        return True
    return text.shape[0] == first.shape[0] and torch.equal(text[:, : first.shape[1]], first)


def _rows(batch: dict[str, Any]) -> int | None:
    """How many texts a call has; None where it has none of its own."""
    texts = (batch.get(key) for key in ("input_ids", "inputs", "inputs_embeds"))
    return next((len(text) for text in texts if isinstance(text, torch.Tensor)), None)


def _sub_module(model: nn.Module, name: str) -> nn.Module:
    with contextlib.suppress(AttributeError):
        return _callable(model.get_submodule(name), name)
    modules = dict(model.named_modules())
    endings = [found for found in modules if found.endswith(f".{name}")]
    if len(endings) == 1:
        return _callable(modules[endings[0]], name)
    leaf = name.rpartition(".")[2]
    near = endings or [found for found in modules if leaf in found or "project" in found.rpartition(".")[2]]
    raise BindingError(
        f"image_from={name!r} is {'more than one' if endings else 'no'} sub-module of {type(model).__name__}; "
        f"near: {', '.join(near[:6]) or 'none'}"
    )


def _callable(module: nn.Module, name: str) -> nn.Module:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        raise BindingError(f"image_from={name!r} is a {type(module).__name__}, which has no output: name one within it")
    return module


def _named(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with its arguments by name, as far as they have one."""
    kwargs = dict(kwargs)
    if not args:
        return (), kwargs
    parameters = list(inspect.signature(function).parameters.values())[: len(args)]
    if len(parameters) < len(args) or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return args, kwargs
    return (), {**{p.name: value for p, value in zip(parameters, args, strict=True)}, **kwargs}
