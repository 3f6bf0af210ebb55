"""What is known of each kind of language model, as data: another kind is another row here and nothing else.

Models of no kind listed here take LoRA too, with ``targets`` in the configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

# What transformers' configurations call an activation -> its name in routingvl.kernels.ACTIVATIONS.
ACTIVATIONS = {name: name for name in ("gelu", "gelu_new", "relu", "silu")}
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}


@dataclass(frozen=True)
class Projection:
    """A linear projection of a transformer layer.

    Attributes:
        name: the module's name inside the layer.
        parts: into how many equal parts its output divides (GPT-2's c_attn gives q, k and v: 3).
        adapted: the parts that LoRA changes; they share one bottleneck (joined rank, an up-projection each).
    """

    name: str
    parts: int = 1
    adapted: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Sublayer:
    """A residual sublayer (attention or feed-forward) of a transformer layer.

    Attributes:
        output: the dropout module that returns the sublayer's output, before the residual is added; None where there
            is none, so that adapters can only stand around the norm.
        norm: its LayerNorm: in front of the sublayer (GPT-2) or behind its residual (RoBERTa).
        adapter_home: the module that registers the adapter, "" for the layer itself. Sublayers that name one home
            share one adapter.
    """

    output: str | None
    norm: str
    adapter_home: str


@dataclass(frozen=True)
class Family:
    """Module names of one kind of language model; names are relative to a transformer layer.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        layer: the end of a transformer layer's module name, with ``{}`` for its index.
        projections: what LoRA adapts unless the configuration names targets (query and value).
        sublayers: where adapters go.
        adapter_residual: whether the published adapters add their own input (GPT-2 yes, RoBERTa no) when they
            stand on a sublayer's output. Around a norm they always do by default, since the residual stream itself
            passes through them there.
        activation_key: the attribute of the model's config that names the adapter's activation.
    """

    model_type: str
    layer: str
    projections: tuple[Projection, ...]
    sublayers: tuple[Sublayer, ...]
    adapter_residual: bool
    activation_key: str


def _encoder(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        layer="encoder.layer.{}",
        projections=(Projection("attention.self.query"), Projection("attention.self.value")),
        sublayers=(
            Sublayer("attention.output.dropout", "attention.output.LayerNorm", "attention.output"),
            Sublayer("output.dropout", "output.LayerNorm", "output"),
        ),
        adapter_residual=False,
        activation_key="hidden_act",
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _encoder("roberta"),
        _encoder("bert"),
        Family(
            model_type="gpt2",
            layer="h.{}",
            projections=(Projection("attn.c_attn", parts=3, adapted=(0, 2)),),
            sublayers=(Sublayer("attn.resid_dropout", "ln_1", ""), Sublayer("mlp.dropout", "ln_2", "")),
            adapter_residual=True,
            activation_key="activation_function",
        ),
    )
}
