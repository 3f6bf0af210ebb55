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
        needs_pooler: whether its ``pooler`` is used.
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
    """The language model of a hub name or folder in float32, as the class that the row ``kind`` names."""
    return load_float32(TEXT_MODELS[kind].model_class, name)


def text_body(kind: str, model: nn.Module) -> nn.Module:
    """``model``, or the part of it, that the row ``kind`` describes.

    Raises:
        BackboneError: it is of another model type, or lacks its pooler.
    """
    row = TEXT_MODELS[kind]
    if (found := model_type(model)) != kind:
        raise BackboneError(f"the text model must be of type {kind!r}, not {found!r}")
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
