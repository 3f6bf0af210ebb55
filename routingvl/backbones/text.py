"""Language models: which one a folder or object is, how it is loaded, and what the models here need to know of it.

What transformers' own tables and configurations know is read there; TEXT_MODELS holds the exceptions. Where the
bottlenecks sit in a language model is another table: routingvl/bottlenecks/families.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from routingvl.backbones.loading import BackboneError, load_config, load_float32, model_type

ENCODER, DECODER, ENCODER_DECODER = "encoder", "decoder", "encoder-decoder"
READ, WRITE = "read", "write"  # what a language model is for: texts become states, or it writes them
# Weights of heads that checkpoints of these models bring along, and that a model to READ does not have.
OTHER_HEADS = (
    r"(?:lm_predictions|mask_predictions|discriminator_predictions|generator_predictions|generator_lm_head|head"
    r"|vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier|classification_head)\..*|final_logits_bias"
)
UNLIMITED = 2**30  # positions of a model that has no embeddings of them


@dataclass(frozen=True)
class TextModel:
    """What is special about a kind of language model.

    Attributes:
        attribute: name under which the models here hold it, and so the beginning of its parameters' names.
        embeds_twice: the published code sends texts behind an image through its embedding block twice.
    """

    attribute: str = "text"
    embeds_twice: bool = False


# By ``model_type`` in the config; all others are as TextModel() says.
TEXT_MODELS = {"roberta": TextModel("roberta", embeds_twice=True), "gpt2": TextModel("gpt")}


def text_model(model: nn.Module) -> TextModel:
    """What is special about a language model."""
    return TEXT_MODELS.get(model_type(model), TextModel())


def text_kind(model: nn.Module | str) -> str:
    """Whether a language model, or that of a hub name or folder, is an encoder, a decoder or an encoder-decoder.

    Raises:
        BackboneError: it is none of them.
    """
    from transformers.models.auto import modeling_auto as auto

    found = model_type(model)
    for kind, known in (
        (ENCODER_DECODER, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        (ENCODER, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        (DECODER, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        if found in known:
            return kind
    raise BackboneError(f"the text model is of type {found!r}, which is no language model of this transformers")


def load_text(use: str, name: str) -> nn.Module:
    """The language model of a hub name or folder in float32, with a head when it is to ``WRITE``.

    Weights of the pooler that the checkpoint lacks are drawn from torch's generator; :func:`drawn_weights` names them.

    Raises:
        BackboneError: its type cannot do that, or it cannot be loaded whole; the message names file and weights.
    """
    _check_config(_load_config(name), name)
    beside = {"optional": ("pooler.",), "others": OTHER_HEADS} if use == READ else {}
    model, drawn = load_float32(_class_name(use, name), name, **beside)
    model.drawn_weights = drawn
    return model


def drawn_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that :func:`load_text` drew because the checkpoint lacks them: frozen, they would be noise."""
    return [model.get_parameter(name) for name in getattr(model, "drawn_weights", ())]


def _class_name(use: str, model: nn.Module | str) -> str:
    """The class of transformers that serves this use."""
    from transformers.models.auto import modeling_auto as auto

    kind, found = text_kind(model), model_type(model)
    if use == READ:
        names = auto.MODEL_MAPPING_NAMES.get(found)
        return names if isinstance(names, str) else names[0]
    if kind == ENCODER:
        raise BackboneError(
            f"a text model of type {found!r} is an encoder, which cannot write: give a decoder (GPT-2, Llama, OPT ...) "
            "or an encoder-decoder (T5, BART ...)"
        )
    if kind == DECODER:
        return auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[found]
    return auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES[found]


def _load_config(name: str) -> Any:
    text_kind(name)  # before transformers' own error, which lists all models
    return load_config(name)


def _check_config(config: Any, name: str) -> None:
    """Refuse a config that is not of one language model, or has special tokens outside its vocabulary."""
    words = getattr(config, "vocab_size", None)
    if not isinstance(words, int) or not isinstance(getattr(config, "hidden_size", None), int):
        raise BackboneError(
            f"{name}: a {config.model_type} is made of several models: give the folder of its language model alone, or "
            "put bottlenecks into the whole with routingvl.inject or PEFT"
        )
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        for token in token_ids(getattr(config, key, None)):
            if not isinstance(token, int) or not 0 <= token < words:
                raise BackboneError(
                    f"{name}: {key} {token!r} is not a token of its vocabulary of {words}; correct its config"
                )


def token_ids(value: Any) -> list[Any]:
    """A token id of a config as a list: it may be one, several (Llama-3 has three end tokens) or None."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def text_body(use: str, model: nn.Module) -> nn.Module:
    """``model``, or the part of it, that serves this use: the model without a head to ``READ``, with one to ``WRITE``.

    Raises:
        BackboneError: it is of another type, lacks its pooler or head, or has a special token outside its vocabulary.
    """
    wanted = _class_name(use, model)
    _check_config(model.config, getattr(model.config, "_name_or_path", "") or type(model).__name__)
    has_head = model.get_output_embeddings() is not None
    if use == WRITE:
        if not has_head:
            raise BackboneError(f"the text model needs its language modelling head: load {wanted}")
        return model
    body = model.base_model
    if body.get_output_embeddings() is not None:
        raise BackboneError(f"the text model must be without a head: load {wanted}")
    if getattr(body, "pooler", body) is None:
        raise BackboneError(f"the text model needs its pooler: load {wanted} with add_pooling_layer=True")
    return body


def position_limit(model: nn.Module) -> int:
    """How many tokens a language model has positions for, by its config; a large number where any length will do."""
    positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    # RoBERTa and its kin count positions from padding_idx + 1.
    unused = 0 if getattr(positions, "padding_idx", None) is None else positions.padding_idx + 1
    return (getattr(model.config, "max_position_embeddings", None) or UNLIMITED) - unused


def fuse_gelu(model: nn.Module) -> None:
    """Put torch's GELU with tanh, one pass over memory, in the place of transformers' eight operations."""
    from transformers.activations import NewGELUActivation

    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, NewGELUActivation):
            model.set_submodule(name, nn.GELU(approximate="tanh"))


def check_embeddings(model: nn.Module) -> None:
    """Refuse a model that does not take embeddings in the place of tokens: an image could not stand in front of them.

    Raises:
        BackboneError: its embeddings have another width than its layers, or a text comes to something else when it is
            given as embeddings (Pegasus and Marian scale those of tokens only).
    """
    words, width = model.get_input_embeddings(), model.config.hidden_size
    fix = "set model.visual_prefix=false (visual_prefix=False), and the image reaches the bottlenecks alone"
    if words.embedding_dim != width:
        raise BackboneError(f"the text model embeds tokens in {words.embedding_dim} numbers, not {width}: {fix}")
    if model_type(model) in TEXT_MODELS or words.weight.is_meta:
        return
    pad = token_ids(getattr(model.config, "pad_token_id", None))
    tokens = [token for token in range(words.num_embeddings) if token not in pad][-2:]
    ids = torch.tensor([tokens], device=words.weight.device)
    try:
        as_tokens, as_embeddings = _probe(model, input_ids=ids), _probe(model, inputs_embeds=words(ids))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise BackboneError(f"a {model.config.model_type} takes no embeddings ({error}): {fix}") from error
    if not torch.allclose(as_tokens, as_embeddings, rtol=1e-3, atol=1e-5):
        raise BackboneError(f"a {model.config.model_type} reads tokens and their embeddings differently: {fix}")


def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits of a model that writes are the product of its last states and its head's weight, no more.

    Some add a bias, scale the logits or cap them: those have to compute them themselves.
    """
    head = model.get_output_embeddings()
    body = model.base_model
    if body is model or type(head) is not nn.Linear or head.bias is not None:
        return False
    if model_type(model) in TEXT_MODELS:
        return True
    if head.weight.is_meta:
        return False
    # Large states, so that a cap shows.
    ramp = torch.linspace(-30, 30, head.in_features, device=head.weight.device, dtype=head.weight.dtype)[None, None]
    token, read = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device), []
    hook = head.register_forward_pre_hook(lambda module, args: read.append(args[0]) or (ramp,))
    try:
        logits = _probe(model, input_ids=token)
    finally:
        hook.remove()
    return torch.equal(read[0], _probe(body, input_ids=token)) and torch.equal(logits.float(), head(ramp).float())


@torch.no_grad()
def _probe(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """The first result of a call on a few tokens, without dropout and without a trace in torch's generators."""
    if text_kind(model) == ENCODER_DECODER:
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    if text_kind(model) != ENCODER:
        inputs["use_cache"] = False
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return model(**inputs)[0]
    finally:
        for module in training:
            module.training = True
