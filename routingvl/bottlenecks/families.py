"""What is known of each kind of language model, as data: another kind is another row here and nothing else.

Models of no kind listed here take LoRA too, with ``targets`` in the configuration. ``places.py`` reads the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What transformers' configurations call an activation -> its name in routingvl.kernels.ACTIVATIONS.
ACTIVATIONS = {name: name for name in ("gelu", "gelu_new", "relu", "silu")}
ACTIVATIONS |= {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}


@dataclass(frozen=True)
class Projection:
    """A linear projection of a transformer layer.

    Attributes:
        name: the module's name inside the layer.
        parts: what its output consists of: a number of equally wide parts (GPT-2's c_attn gives q, k and v: 3), or
            a function of the model's config that returns their widths.
        adapted: the parts that LoRA changes; they share one bottleneck (joined rank, an up-projection each).
        repeats: the config's attribute that says how often the parts follow one another: GPT-NeoX's output is q, k
            and v of the first head, then those of the second. "" for once.
        optional: a layer may lack it, as those of an encoder lack cross-attention.
        default: LoRA adapts it unless the configuration names targets. One that is not is here for what else is
            known of it.
        unrouted: it is also called with another batch than the text's, so that its LoRA leaves the image out (routing
            "none"): always, or where the config's attribute of this name is true.
        cross: it is one of a decoder's cross-attention.
        reads_states: its input are the encoder's states.
    """

    name: str
    parts: int | Callable[[Any], tuple[int, ...]] = 1
    adapted: tuple[int, ...] = (0,)
    repeats: str = ""
    optional: bool = False
    default: bool = True
    unrouted: bool | str = False
    cross: bool = False
    reads_states: bool = False


@dataclass(frozen=True)
class Sublayer:
    """A residual sublayer (attention or feed-forward) of a transformer layer.

    Attributes:
        output: the module that returns the sublayer's output, before the residual is added: its dropout, where it has
            one as a module, else its last projection or norm; None where there is none, so that adapters can only stand
            around the norm.
        norm: its LayerNorm or RMSNorm: in front of the sublayer (GPT-2) or behind its residual (RoBERTa). Where two
            sublayers name one norm (Phi), the first has the adapter around it.
        adapter_home: the module that registers the adapter, "" for the layer itself. Sublayers that name one home
            share one adapter.
        optional: a layer may lack it, as those of an encoder lack cross-attention.
        attention: in a layer that has both, "self" or "cross"; "" for what is neither, and in families without.
    """

    output: str | None
    norm: str
    adapter_home: str
    optional: bool = False
    attention: str = ""


@dataclass(frozen=True)
class Family:
    """Module names of one kind of language model; names are relative to a transformer layer.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        layer: the end of a transformer layer's module name, with ``{}`` for its index; the layers of every stack
            (encoder and decoder) match it.
        projections: what LoRA adapts unless the configuration names targets (query and value).
        sublayers: where adapters go.
        adapter_residual: whether adapters on a sublayer's output add their own input unless the configuration says
            (the published ones: GPT-2 yes, RoBERTa no). Around a norm they always do by default, since the
            residual stream itself passes through them there.
        activation_key: the attribute of the model's config that names the adapter's activation; "gelu" where the
            config has none of that name, or one that is not in ACTIVATIONS.
    """

    model_type: str
    layer: str
    projections: tuple[Projection, ...]
    sublayers: tuple[Sublayer, ...]
    adapter_residual: bool
    activation_key: str


def _encoder(model_type: str, adapter_residual: bool = False) -> Family:
    """RoBERTa and its like; as a decoder they have cross-attention."""
    return Family(
        model_type=model_type,
        layer="encoder.layer.{}",
        projections=(
            Projection("attention.self.query"),
            Projection("attention.self.value"),
            Projection("crossattention.self.query", optional=True, cross=True),
            Projection("crossattention.self.value", optional=True, cross=True, reads_states=True),
        ),
        sublayers=(
            Sublayer("attention.output.dropout", "attention.output.LayerNorm", "attention.output", attention="self"),
            Sublayer("output.dropout", "output.LayerNorm", "output"),
            Sublayer(
                "crossattention.output.dropout",
                "crossattention.output.LayerNorm",
                "crossattention.output",
                optional=True,
                attention="cross",
            ),
        ),
        adapter_residual=adapter_residual,
        activation_key="hidden_act",
    )


def _deberta(model_type: str, *projections: Projection) -> Family:
    """DeBERTa's versions differ in their projections."""
    return dataclasses.replace(
        _encoder(model_type, adapter_residual=True),
        projections=projections,
        sublayers=tuple(sublayer for sublayer in _encoder(model_type).sublayers if not sublayer.optional),
    )


_QUERY_VALUE = (Projection("self_attn.q_proj"), Projection("self_attn.v_proj"))


def _decoder(model_type: str) -> Family:
    """Llama and its like: RMSNorm in front of attention and feed-forward, no dropout behind them."""
    return Family(
        model_type=model_type,
        layer="layers.{}",
        projections=_QUERY_VALUE,
        sublayers=(
            Sublayer("self_attn.o_proj", "input_layernorm", "self_attn"),
            Sublayer("mlp.down_proj", "post_attention_layernorm", "mlp"),
        ),
        adapter_residual=True,
        activation_key="hidden_act",
    )


def _gemma(model_type: str) -> Family:
    """Gemma 2 and 3: a norm in front of each sublayer and another behind it."""
    return Family(
        model_type=model_type,
        layer="layers.{}",
        projections=_QUERY_VALUE,
        sublayers=(
            Sublayer("post_attention_layernorm", "input_layernorm", "self_attn"),
            Sublayer("post_feedforward_layernorm", "pre_feedforward_layernorm", "mlp"),
        ),
        adapter_residual=True,
        activation_key="hidden_activation",
    )


def _bart(model_type: str) -> Family:
    """Encoder-decoders with BART's names."""
    return Family(
        model_type=model_type,
        layer="layers.{}",
        projections=(
            *_QUERY_VALUE,
            Projection("encoder_attn.q_proj", optional=True, cross=True),
            Projection("encoder_attn.v_proj", optional=True, cross=True, reads_states=True),
        ),
        sublayers=(
            Sublayer("self_attn.out_proj", "self_attn_layer_norm", "self_attn", attention="self"),
            Sublayer("encoder_attn.out_proj", "encoder_attn_layer_norm", "encoder_attn", True, "cross"),
            Sublayer("fc2", "final_layer_norm", ""),
        ),
        adapter_residual=True,
        activation_key="activation_function",
    )


def _t5(model_type: str) -> Family:
    """T5: the sub-modules of a block are attention, in the decoder cross-attention, and feed-forward."""
    attention, cross = "layer.0.SelfAttention", "layer.1.EncDecAttention"
    return Family(
        model_type=model_type,
        layer="block.{}",
        projections=(
            Projection(f"{attention}.q"),
            Projection(f"{attention}.v"),
            Projection(f"{cross}.q", optional=True, cross=True),
            Projection(f"{cross}.v", optional=True, cross=True, reads_states=True),
        ),
        sublayers=tuple(
            Sublayer(f"layer.{n}.dropout", f"layer.{n}.layer_norm", f"layer.{n}", n == 2, attention)
            for n, attention in enumerate(("self", "cross", ""))
        ),
        adapter_residual=True,
        activation_key="dense_act_fn",
    )


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _grouped_heads(config: Any) -> tuple[int, int, int]:
    """Widths of q, k and v side by side, where several heads of q share one of k and v."""
    keys = config.num_key_value_heads * _head_width(config)
    return config.num_attention_heads * _head_width(config), keys, keys


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        _encoder("roberta"),
        _encoder("xlm-roberta"),
        _encoder("camembert"),
        _encoder("bert"),
        _encoder("electra", adapter_residual=True),
        _deberta(
            "deberta-v2",  # DeBERTa-v3 too
            # These also project the relative positions, one batch of them for all texts.
            Projection("attention.self.query_proj", unrouted="share_att_key"),
            Projection("attention.self.value_proj"),
            Projection("attention.self.key_proj", default=False, unrouted="share_att_key"),
            Projection("attention.self.pos_query_proj", optional=True, default=False, unrouted=True),
            Projection("attention.self.pos_key_proj", optional=True, default=False, unrouted=True),
        ),
        _deberta(
            "deberta",
            Projection("attention.self.in_proj", parts=3, adapted=(0, 2), repeats="num_attention_heads"),
            Projection("attention.self.pos_q_proj", optional=True, default=False, unrouted=True),
            Projection("attention.self.pos_proj", optional=True, default=False, unrouted=True),
        ),
        Family(
            model_type="distilbert",
            layer="transformer.layer.{}",
            projections=(Projection("attention.q_lin"), Projection("attention.v_lin")),
            sublayers=(
                Sublayer("attention.out_lin", "sa_layer_norm", "attention"),
                Sublayer("ffn.dropout", "output_layer_norm", "ffn"),
            ),
            adapter_residual=True,
            activation_key="activation",
        ),
        Family(
            model_type="modernbert",
            layer="layers.{}",
            projections=(Projection("attn.Wqkv", parts=3, adapted=(0, 2)),),
            sublayers=(Sublayer("attn.out_drop", "attn_norm", "attn"), Sublayer("mlp.Wo", "mlp_norm", "mlp")),
            adapter_residual=True,
            activation_key="hidden_activation",
        ),
        Family(
            model_type="gpt2",
            layer="h.{}",
            projections=(
                Projection("attn.c_attn", parts=3, adapted=(0, 2)),
                Projection("crossattention.q_attn", optional=True, cross=True),
                Projection(
                    "crossattention.c_attn", parts=2, adapted=(1,), optional=True, cross=True, reads_states=True
                ),
            ),
            sublayers=(
                Sublayer("attn.resid_dropout", "ln_1", "", attention="self"),
                Sublayer("mlp.dropout", "ln_2", ""),
                Sublayer("crossattention.resid_dropout", "ln_cross_attn", "", True, "cross"),
            ),
            adapter_residual=True,
            activation_key="activation_function",
        ),
        Family(
            model_type="opt",
            layer="layers.{}",
            projections=(
                *_QUERY_VALUE,
                # The feed-forward part sees the tokens of all texts in one row.
                Projection("fc1", default=False, unrouted=True),
                Projection("fc2", default=False, unrouted=True),
            ),
            sublayers=(Sublayer("self_attn.out_proj", "self_attn_layer_norm", "self_attn"),),
            adapter_residual=True,
            activation_key="activation_function",
        ),
        Family(
            model_type="gpt_neox",
            layer="layers.{}",
            projections=(
                Projection("attention.query_key_value", parts=3, adapted=(0, 2), repeats="num_attention_heads"),
            ),
            sublayers=(
                Sublayer("post_attention_dropout", "input_layernorm", "attention"),
                Sublayer("post_mlp_dropout", "post_attention_layernorm", "mlp"),
            ),
            adapter_residual=True,
            activation_key="hidden_act",
        ),
        Family(
            model_type="phi",
            layer="layers.{}",
            projections=_QUERY_VALUE,
            # The two run side by side behind one norm, and share their dropout.
            sublayers=(
                Sublayer("self_attn.dense", "input_layernorm", "self_attn"),
                Sublayer("mlp.fc2", "input_layernorm", "mlp"),
            ),
            adapter_residual=True,
            activation_key="hidden_act",
        ),
        Family(
            model_type="phi3",
            layer="layers.{}",
            projections=(Projection("self_attn.qkv_proj", parts=_grouped_heads, adapted=(0, 2)),),
            sublayers=(
                Sublayer("resid_attn_dropout", "input_layernorm", "self_attn"),
                Sublayer("resid_mlp_dropout", "post_attention_layernorm", "mlp"),
            ),
            adapter_residual=True,
            activation_key="hidden_act",
        ),
        *map(_decoder, ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma")),
        *map(_decoder, ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")),  # inside the vision-language models
        *map(_gemma, ("gemma2", "gemma3_text")),
        *map(_bart, ("bart", "mbart")),
        *map(_t5, ("t5", "mt5")),
    )
}

# The ends of the names of what reads an encoder's states in a decoder; the last three are of models without a row.
STATES_READERS = (
    *dict.fromkeys(p.name for family in FAMILIES.values() for p in family.projections if p.reads_states),
    *("cross_attn.value_proj", "cross_attn.v_proj", "cross_attention.v_proj"),
)
