"""RoutedLoRALinear and RoutedAdapter as modules; their numbers are in test_golden.py and the kernels' own tests."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from routingvl import VisualContext
from routingvl.bottlenecks.layers import AdaptedDropout, AdaptedLayerNorm, RoutedAdapter, RoutedLoRALinear
from routingvl.kernels import ROUTINGS

ROUTED = [name for name, row in ROUTINGS.items() if row.uses_image]


def inputs(batch=2, tokens=5, width=12):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, tokens, width, generator=generator),
        torch.randn(batch, 1, width, generator=generator),
    )


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("conv1d", [False, True])
def test_lora_starts_as_its_base_bit_for_bit(routing, conv1d):
    x, v = inputs()
    base = Conv1D(36, 12) if conv1d else nn.Linear(12, 36)
    want = base(x)
    layer = RoutedLoRALinear(base, 4, routing=routing, slices=[(0, 12), (24, 36)])
    assert torch.equal(layer(x, v), want)
    nn.init.normal_(layer.lora_B)
    changed = (layer(x, v) != want).flatten(0, 1).any(0)
    assert changed[:12].all()
    assert changed[24:].all()
    assert not changed[12:24].any()


def test_initial_range_and_scaling():
    layer = RoutedLoRALinear(nn.Linear(16, 8), 64, alpha=16)
    assert layer.scaling == 0.25
    assert layer.lora_A.abs().max() <= 1 / 4
    assert layer.lora_A.abs().max() > 0.9 / 4
    assert not layer.lora_B.any()


def test_adapter_initialisation():
    adapter = RoutedAdapter(256, 128)
    assert adapter.down_sampler.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert adapter.up_sampler.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not adapter.down_sampler.bias.any()
    assert not adapter.up_sampler.bias.any()


def test_state_dict_keeps_the_keys_of_the_base():
    base = nn.Linear(4, 3)
    layer = RoutedLoRALinear(base, 2)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    restored = layer.restore()
    assert type(restored) is nn.Linear
    assert restored.weight is layer.weight


@pytest.mark.parametrize("routing", ROUTED)
def test_dropout_draws_text_and_image_separately_and_only_in_training(routing):
    # Equal text and image: with one shared mask a dropped component would be missing from both.
    torch.manual_seed(0)
    layer = RoutedLoRALinear(nn.Linear(64, 64), 64, routing="add", dropout=0.5)
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.zero_()
        layer.lora_A.copy_(torch.eye(64)), layer.lora_B.copy_(torch.eye(64))
    x = torch.ones(1, 1, 64)
    levels = torch.unique(layer.train()(x, x)).tolist()
    assert levels == [0.0, 2.0, 4.0]  # both dropped, one kept (scaled by 2), both kept
    assert torch.equal(layer.eval()(x, x), torch.full((1, 1, 64), 2.0))
    routed = RoutedLoRALinear(nn.Linear(12, 12), 4, routing=routing, dropout=0.5)
    nn.init.normal_(routed.lora_B)
    x, v = inputs()
    assert not torch.equal(routed(x, v), routed(x, v))
    routed.eval()
    assert torch.equal(routed(x, v), routed(x, v))


def test_adapter_dropout_spares_the_residual():
    adapter = RoutedAdapter(12, 4, routing="none", dropout=0.9)
    nn.init.zeros_(adapter.up_sampler.weight)
    x, _ = inputs()
    assert torch.equal(adapter.train()(x), x)
    adapter.residual = False
    assert not adapter(x).any()


def test_missing_image_is_an_error():
    x, _ = inputs()
    with pytest.raises(RuntimeError, match="second argument"):
        RoutedLoRALinear(nn.Linear(12, 12), 2, routing="mul")(x)
    with pytest.raises(RuntimeError, match="no visual features bound"):
        RoutedLoRALinear(nn.Linear(12, 12), 2, routing="mul", context=VisualContext())(x)


def test_only_plain_projections_are_taken():
    with pytest.raises(TypeError, match="LayerNorm"):
        RoutedLoRALinear(nn.LayerNorm(4), 2)


@pytest.mark.parametrize("slices", [[(0, 4), (4, 9)], [(0, 4), (2, 6)], [(8, 12)], [(-2, 2)]])
def test_bad_slices(slices):
    with pytest.raises(ValueError, match="slices"):
        RoutedLoRALinear(nn.Linear(6, 10), 2, slices=slices)


def test_two_dimensional_input_without_routing():
    layer = RoutedLoRALinear(nn.Linear(12, 7), 3, routing="none")
    nn.init.normal_(layer.lora_B)
    x, _ = inputs()
    assert torch.allclose(layer(x)[0], layer(x[0]))


def test_adapted_norm_and_dropout_positions():
    x, v = inputs()
    context = VisualContext()
    adapter = RoutedAdapter(12, 4, routing="mul", context=context)
    nn.init.normal_(adapter.up_sampler.weight)
    norm = nn.LayerNorm(12)
    nn.init.normal_(norm.weight)
    with context.bind(v):
        assert torch.equal(AdaptedLayerNorm(norm, adapter, "pre_norm")(x), norm(adapter(x)))
        assert torch.equal(AdaptedLayerNorm(norm, adapter, "post_norm")(x), adapter(norm(x)))
        assert torch.equal(AdaptedDropout(nn.Dropout(0.0), adapter)(x), adapter(x))
    restored = AdaptedLayerNorm(norm, adapter, "pre_norm").restore()
    assert type(restored) is nn.LayerNorm
    assert torch.equal(restored(x), norm(x))
    assert AdaptedDropout(nn.Dropout(0.3), adapter).restore().p == 0.3


def test_deepcopy_is_independent():
    context = VisualContext()
    layer = RoutedLoRALinear(nn.Linear(12, 12), 4, routing="add", context=context)
    nn.init.normal_(layer.lora_B)
    twin = copy.deepcopy(layer)
    assert twin.context is not context
    x, v = inputs()
    assert torch.equal(twin(x, v), layer(x, v))
    with torch.no_grad():
        twin.lora_A.zero_()
    assert layer.lora_A.any()
