"""inject, remove, freeze and the trainable report, on both families and on a stranger."""

import copy

import pytest
import torch
from tiny import small_gpt2, small_roberta
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaModel

from routingvl import RoutingConfig, VisualContext, ViTRobertaForVQA, inject
from routingvl.bottlenecks.inject import SurgeryError, remove
from routingvl.bottlenecks.layers import RoutedAdapter, RoutedLoRALinear
from routingvl.bottlenecks.report import trainable_report
from routingvl.kernels import dispatch
from routingvl.kernels.optional_triton import interpreted


def build(factory, config, **changes):
    """A model without memory behind it: only its parameters' shapes matter here."""
    with torch.device("meta"):
        return factory(config(**changes))


GPT2 = {"resid_pdrop": 0.0}
MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16}
BASE = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = BASE | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


@pytest.mark.parametrize(
    ("factory", "config", "changes", "routing", "trainable", "total"),
    [
        (GPT2LMHeadModel, GPT2Config, GPT2, {"rank": 128}, 4_783_104, 129_158_400),
        (GPT2LMHeadModel, GPT2Config, GPT2, {"method": "adapter", "rank": 128}, 2_406_912, 126_809_856),
        (GPT2LMHeadModel, GPT2Config, MEDIUM, {"rank": 128}, 12_754_944, 367_406_080),
        (RobertaModel, RobertaConfig, BASE, {"rank": 128}, 10_767_417, 135_357_753),
        (RobertaModel, RobertaConfig, BASE, {"method": "adapter", "rank": 64}, 8_409_657, 133_018_425),
        (RobertaModel, RobertaConfig, LARGE, {"rank": 128}, 21_244_985, 376_457_273),
    ],
    ids=["gpt2-lora", "gpt2-adapter", "gpt2-medium-lora", "roberta-lora", "roberta-adapter", "roberta-large-lora"],
)
def test_published_parameter_counts(factory, config, changes, routing, trainable, total):
    text = build(factory, config, **changes)
    routing = RoutingConfig(alpha=routing["rank"], **routing)
    if factory is RobertaModel:
        with torch.device("meta"):
            report = ViTRobertaForVQA.from_backbones(None, text, routing, num_labels=3129, classifier_layers=2).report
    else:
        report = inject(text, routing)
    assert (report.trainable, report.total) == (trainable, total)


def test_layer_selection_and_shared_adapter():
    model = small_gpt2()
    inject(model, RoutingConfig(rank=4, layers=(1,)))
    assert [n for n, m in model.named_modules() if isinstance(m, RoutedLoRALinear)] == ["transformer.h.1.attn.c_attn"]
    adapted = small_gpt2()
    inject(adapted, RoutingConfig(method="adapter", rank=4, layers=[0]))
    assert [n for n, m in adapted.named_modules() if isinstance(m, RoutedAdapter)] == ["transformer.h.0.adapter"]
    encoder = small_roberta()
    inject(encoder, RoutingConfig(method="adapter", rank=4))
    assert len([m for m in encoder.modules() if isinstance(m, RoutedAdapter)]) == 4


@pytest.mark.parametrize("position", ["post_module", "pre_norm", "post_norm"])
@pytest.mark.parametrize("factory", [small_gpt2, small_roberta])
def test_every_position_acts_and_is_removed(factory, position):
    context = VisualContext()
    model = factory().eval()
    keys = set(model.state_dict())
    ids, features = torch.tensor([[5, 6, 7]]), torch.randn(1, 1, 32)
    plain = model(input_ids=ids)[0]
    with torch.no_grad():
        torch.manual_seed(0)
        inject(model, RoutingConfig(method="adapter", rank=4, position=position), context)
        for module in model.modules():
            if isinstance(module, RoutedAdapter):
                module.up_sampler.weight.normal_()
        with context.bind(features):
            first = model(input_ids=ids)[0]
        with context.bind(features + 1):
            second = model(input_ids=ids)[0]
    assert not torch.allclose(plain, first)
    assert not torch.allclose(first, second)
    residual = next(m for m in model.modules() if isinstance(m, RoutedAdapter)).residual
    assert residual == (factory is small_gpt2 or position != "post_module")
    remove(model)
    assert set(model.state_dict()) == keys
    assert torch.equal(model(input_ids=ids)[0], plain)


def test_lora_removal_restores_types_and_outputs():
    model = small_gpt2().eval()
    ids = torch.tensor([[5, 6, 7]])
    plain, types = model(input_ids=ids).logits, [type(m) for m in model.modules()]
    inject(model, RoutingConfig(rank=4, routing="none"))
    remove(model)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(input_ids=ids).logits, plain)
    with pytest.raises(SurgeryError, match="no routed bottlenecks"):
        remove(model)


def test_targets_on_a_model_of_no_known_family():
    class Stranger(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(
                [nn.ModuleDict({"to_q": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(3)]
            )
            self.final_norm = nn.LayerNorm(8)

    model = Stranger()
    report = inject(model, RoutingConfig(rank=2, targets=["to_q"], layers=[0, 2]))
    assert [layer.name for layer in report.layers] == ["blocks.0.to_q", "blocks.2.to_q"]
    assert "final_norm.weight" not in report.names
    assert "blocks.1.norm.weight" in report.names
    with pytest.raises(SurgeryError, match=r"not in routingvl.bottlenecks.families.*targets"):
        inject(Stranger(), RoutingConfig(rank=2))
    with pytest.raises(SurgeryError, match="adapters"):
        inject(Stranger(), RoutingConfig(rank=2, method="adapter"))


def test_no_match_names_the_nearest_and_changes_nothing():
    model = small_roberta()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(SurgeryError, match=r"match no projection of RobertaModel; nearest: .*query"):
        inject(model, RoutingConfig(rank=4, targets=["qeury"]))
    with pytest.raises(SurgeryError, match=r"no layer \[7\]; it has \[0, 1\]"):
        inject(model, RoutingConfig(rank=4, layers=[7]))
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before
    inject(model, RoutingConfig(rank=4))
    with pytest.raises(SurgeryError, match="already"):
        inject(model, RoutingConfig(rank=4))


def test_frozen_norms_and_biases():
    names = inject(small_gpt2(), RoutingConfig(rank=4, train_layer_norm=False, train_bias=False)).names
    assert names
    assert all(name.endswith(("lora_A", "lora_B")) for name in names)


def test_report_says_which_backend_and_why():
    report = inject(small_gpt2(), RoutingConfig(rank=4), backend="eager")
    assert {layer.backend for layer in report.layers} == {"eager"}
    text = str(report)
    assert f"{report.trainable:,}" in text
    assert "transformer.h.0.attn.c_attn" in text
    assert "backend='eager'" in text


@pytest.mark.skipif(not interpreted(), reason="needs the Triton backend on a CPU: its interpreter")
def test_report_names_what_the_fused_kernels_do_not_take(monkeypatch):
    monkeypatch.setenv("ROUTINGVL_BACKEND", "triton")
    assert {layer.backend for layer in inject(small_gpt2(), RoutingConfig(rank=4)).layers} == {"triton"}
    for model, rank, word in ((small_gpt2().double(), 4, "float64"), (small_gpt2(), 129, "258")):
        (layer, _) = inject(model, RoutingConfig(rank=rank)).layers
        assert layer.backend == "eager"
        assert word in layer.reason


def test_a_model_for_the_gpu_is_built_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    report = inject(small_gpt2(), RoutingConfig(rank=2), backend="triton")
    assert {layer.backend for layer in report.layers} == {"triton"}
    assert all("cannot run" in layer.reason for layer in report.layers)


def test_deepcopy_gives_an_independent_model():
    context = VisualContext()
    model = small_gpt2().eval()
    inject(model, RoutingConfig(method="adapter", rank=4), context)
    twin = copy.deepcopy(model)
    adapters = [m for m in twin.modules() if isinstance(m, RoutedAdapter)]
    assert len({id(adapter.context) for adapter in adapters}) == 1
    assert adapters[0].context is not context
    ids, features = torch.tensor([[5, 6, 7]]), torch.randn(1, 1, 32)
    with context.bind(features):
        want = model(input_ids=ids).logits
    with torch.no_grad():
        for adapter in (m for m in model.modules() if isinstance(m, RoutedAdapter)):
            adapter.up_sampler.weight.zero_()  # the copy must not run the original's adapters
    with adapters[0].context.bind(features):
        assert torch.equal(twin(input_ids=ids).logits, want)
    assert trainable_report(twin).trainable == trainable_report(model).trainable


def test_projections_of_different_widths_are_refused():
    model, config = small_gpt2(), {"rank": 4, "targets": ["c_attn", "c_proj"]}
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(SurgeryError, match=r"mlp\.c_proj takes 128 features; one image reaches all, so name one width"):
        inject(model, RoutingConfig(routing="mul", **config))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert inject(model, RoutingConfig(routing="none", **config)).trainable > 0  # without an image they may be any
