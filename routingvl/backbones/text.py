"""Language models, a row per kind: how one is loaded, and what its model here needs to know of it.

Where the bottlenecks sit in one is another table: routingvl/bottlenecks/families.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from routingvl.backbones.loading import BackboneError, load_float32, model_type


@dataclass(frozen=True)
class TextModel:
    """A kind of language model of transformers.

    Attributes:
        model_type: ``model_type`` in its config.
        model_class: name of its class in transformers.
        body: name under which a model with another head holds one of this class; "" when the head is part of it.
        needs_pooler: whether its ``pooler`` is used. A checkpoint without one (of a masked language model, such as
            roberta-base) gets a random one, which then trains with the bottlenecks and is saved with them.
        unused_positions: position embeddings that no token gets.
    """

    model_type: str
    model_class: str
    body: str = ""
    needs_pooler: bool = False
    unused_positions: Callable[[nn.Module], int] = lambda model: 0


TEXT_MODELS: dict[str, TextModel] = {
    row.model_type: row
    for row in (
        TextModel(
            "roberta",
            "RobertaModel",
            body="roberta",
            needs_pooler=True,
            # RoBERTa counts positions from padding_idx + 1.
            unused_positions=lambda model: model.embeddings.padding_idx + 1,
        ),
        TextModel("gpt2", "GPT2LMHeadModel"),
    )
}


def load_text(kind: str, name: str) -> nn.Module:
    """The language model of a hub name or folder in float32, as the class that the row ``kind`` names.

    Weights of the pooler that the checkpoint lacks are drawn from torch's generator; :func:`drawn_weights` names them.

    Raises:
        BackboneError: it is of another model type, or cannot be loaded whole; the message names file and weights.
    """
    row = TEXT_MODELS[kind]
    _check_type(kind, name)
    model, drawn = load_float32(row.model_class, name, optional="pooler." if row.needs_pooler else "")
    model.drawn_weights = drawn
    return model


def drawn_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that :func:`load_text` drew because the checkpoint lacks them: frozen, they would be noise."""
    return [model.get_parameter(name) for name in getattr(model, "drawn_weights", ())]


def _check_type(kind: str, model: nn.Module | str) -> None:
    if (found := model_type(model)) != kind:
        raise BackboneError(f"the text model must be of type {kind!r}, not {found!r}")


def text_body(kind: str, model: nn.Module) -> nn.Module:
    """``model``, or the part of it, that the row ``kind`` describes.

    Raises:
        BackboneError: it is of another model type, lacks its pooler, or has a special token outside its vocabulary.
    """
    row = TEXT_MODELS[kind]
    _check_type(kind, model)
    words = model.config.vocab_size
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(model.config, key, None)
        for token in ids if isinstance(ids, list | tuple) else () if ids is None else (ids,):
            if not isinstance(token, int) or not 0 <= token < words:
                name = getattr(model.config, "_name_or_path", "") or type(model).__name__
                raise BackboneError(
                    f"{name}: {key} {token!r} is not a token of its vocabulary of {words}; correct its config"
                )
    body = getattr(model, row.body, model) if row.body else model
    if row.needs_pooler and getattr(body, "pooler", None) is None:
        raise BackboneError(f"the text model needs its pooler: load {row.model_class} with add_pooling_layer=True")
    return body


def position_limit(model: nn.Module) -> int:
    """How many tokens a language model has position embeddings for."""
    return model.config.max_position_embeddings - TEXT_MODELS[model_type(model)].unused_positions(model)


def fuse_gelu(model: nn.Module) -> None:
    """Put torch's GELU with tanh, one pass over memory, in the place of transformers' eight operations."""
    from transformers.activations import NewGELUActivation

    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, NewGELUActivation):
            model.set_submodule(name, nn.GELU(approximate="tanh"))
