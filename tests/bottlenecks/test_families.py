"""A further kind of language model is one row: DistilBERT, added here and used by all that reads the table."""

import pytest
import text_zoo
import torch
from safetensors.torch import load_file, save_file
from tiny import WIDTH, WORDS, randomise
from transformers import DistilBertConfig, DistilBertModel

from routingvl import RoutingConfig, VisualContext, inject
from routingvl.bottlenecks import inject as injection
from routingvl.bottlenecks.checkpoint import copy_strictly, trained_parameters
from routingvl.bottlenecks.families import FAMILIES, Family, Projection, Sublayer
from routingvl.bottlenecks.layers import RoutedLayer
from routingvl.bottlenecks.places import SurgeryError
from routingvl.config import ConfigError

ROW = Family(
    model_type="distilbert",
    layer="transformer.layer.{}",
    projections=(Projection("attention.q_lin"), Projection("attention.v_lin")),
    sublayers=(Sublayer(None, "sa_layer_norm", "attention"), Sublayer("ffn.dropout", "output_layer_norm", "ffn")),
    adapter_residual=False,
    activation_key="activation",
)
METHODS = [
    {"method": "lora"},
    {"method": "adapter", "position": "pre_norm"},
    {"method": "adapter", "position": "post_norm"},
]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def _row(monkeypatch):
    monkeypatch.setitem(FAMILIES, "distilbert", ROW)


def small_distilbert() -> DistilBertModel:
    torch.manual_seed(0)
    sizes = {"dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 16}
    return DistilBertModel(DistilBertConfig(vocab_size=WORDS, dropout=0.0, attention_dropout=0.0, **sizes))


def routed(method: dict, **options) -> tuple[DistilBertModel, VisualContext]:
    model, context = small_distilbert(), VisualContext()
    inject(model, RoutingConfig(rank=4, routing="vllora", **method, **options), context)
    return randomise(model), context


def output(model: DistilBertModel, context: VisualContext, features: torch.Tensor) -> torch.Tensor:
    with context.bind(features):
        return model(input_ids=IDS).last_hidden_state


@pytest.mark.parametrize("method", METHODS)
def test_trains_saves_and_loads(method, tmp_path):
    model, context = routed(method)
    assert sum(isinstance(module, RoutedLayer) for module in model.modules()) == 4
    features = torch.randn(2, 1, WIDTH)
    loss = output(model, context, features)[..., 0].sum()
    loss.backward()
    without = [name for name, parameter in trained_parameters(model).items() if not parameter.grad.any()]
    assert not without
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    save_file(trained_parameters(model), tmp_path / "adapter.safetensors")
    again, own = routed(method)
    randomise(again)  # once more: other values
    assert not torch.allclose(output(again, own, features), output(model, context, features))
    copy_strictly(trained_parameters(again), load_file(tmp_path / "adapter.safetensors"), "the file")
    assert torch.equal(output(again, own, features), output(model, context, features))
    assert not torch.allclose(output(model, context, features + 1), output(model, context, features))


@pytest.mark.parametrize("method", METHODS)
def test_is_put_in_chosen_layers_and_taken_out(method):
    plain = small_distilbert().eval()
    want = plain(input_ids=IDS).last_hidden_state
    model, _ = routed(method, layers=[1], train_layer_norm=False, train_bias=False)
    names = [name for name, module in model.named_modules() if isinstance(module, RoutedLayer)]
    assert len(names) == 2
    assert all(name.startswith("transformer.layer.1.") for name in names)
    injection.remove(model)
    assert torch.equal(model.eval()(input_ids=IDS).last_hidden_state, want)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_an_adapter_behind_a_sublayer_needs_its_dropout():
    model = small_distilbert()
    before = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(injection.SurgeryError, match=r"distilbert.*position='pre_norm'"):
        inject(model, RoutingConfig(method="adapter", rank=4))
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_one_of_a_decoders_attentions_may_be_chosen(kind):
    def names(**options):
        model = text_zoo.text_model(kind)
        inject(model, RoutingConfig(rank=2, routing="mul", **options))
        return {name for name, module in model.named_modules() if isinstance(module, RoutedLayer)}

    def is_cross(name):
        return any(part in name for part in ("encoder_attn", "EncDecAttention", "layer.1.adapter"))

    for method in ("lora", "adapter"):
        every = names(method=method)
        inner, cross = (names(method=method, decoder_attention=which) for which in ("self", "cross"))
        encoder = {name for name in every if "decoder" not in name}
        assert encoder
        assert inner & cross >= encoder
        assert every - inner == {name for name in every - encoder if is_cross(name)}
        rest = {"bart": "self_attn", "t5": "SelfAttention" if method == "lora" else "layer.0.adapter"}[kind]
        assert every - cross == {name for name in every - encoder if rest in name}


def test_a_model_without_cross_attention_has_none_to_choose():
    for kind in ("gpt2", "roberta"):
        with pytest.raises(SurgeryError, match=r"decoder_attention='cross' is for decoders with cross-attention"):
            inject(text_zoo.text_model(kind), RoutingConfig(rank=2, decoder_attention="cross"))
    with pytest.raises(ConfigError, match="with targets, name the projections of one attention there"):
        RoutingConfig(targets=("q_proj",), decoder_attention="self")
