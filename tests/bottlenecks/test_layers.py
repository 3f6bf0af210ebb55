"""RoutedLoRALinear and RoutedAdapter as modules; their numbers are in test_golden.py and the kernels' own tests."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from routingvl import VisualContext
from routingvl.bottlenecks.layers import RoutedAdapter, RoutedLoRALinear
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


@pytest.mark.parametrize("norm", [nn.LayerNorm(12), nn.RMSNorm(12), nn.Dropout(0.0), nn.Linear(12, 12)])
def test_an_adapter_hangs_on_any_module(norm):
    x, v = inputs()
    context = VisualContext()
    adapter = RoutedAdapter(12, 4, routing="mul", context=context)
    nn.init.normal_(adapter.up_sampler.weight)
    plain = copy.deepcopy(norm)
    with context.bind(v):
        adapter.hang_on(norm)
        assert torch.equal(norm(x), adapter(plain(x)))
        adapter.take_off()
        adapter.hang_on(norm, before=True)
        assert torch.equal(norm(x), plain(adapter(x)))
        both = nn.ModuleList([norm, adapter])
        for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
            with other[1].context.bind(v):
                assert torch.equal(other[0](x), norm(x))
                nn.init.zeros_(other[1].up_sampler.weight)
                assert not torch.equal(other[0](x), norm(x))
            other[1].take_off()
            assert torch.equal(other[0](x), plain(x))
    adapter.take_off()
    assert torch.equal(norm(x), plain(x))


@pytest.mark.parametrize("routing", ["none", "add", "mul", "vllora"])
@pytest.mark.parametrize("placement", ["bottleneck", "output"])
def test_parts_are_slices_where_they_are_side_by_side(routing, placement):
    x, v = inputs()
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    options = {"routing": routing, "placement": placement}
    slices = RoutedLoRALinear(base, 2, slices=[(0, 4), (6, 10)], **options)
    parts = RoutedLoRALinear(base, 2, parts=[range(4), range(6, 10)], **options)
    nn.init.normal_(slices.lora_B)
    with torch.no_grad():
        assert torch.equal(parts(x, v), base(x))
        parts.lora_A.copy_(slices.lora_A)
        parts.lora_B.copy_(slices.lora_B)
    assert torch.allclose(parts(x, v), slices(x, v), atol=1e-6)


def test_uneven_and_scattered_parts():
    x, v = inputs()
    base = nn.Linear(12, 9)
    layer = RoutedLoRALinear(base, 2, routing="add", parts=[(1, 3, 5, 8), (2, 0)])
    nn.init.normal_(layer.lora_B)
    q, k = layer.lora_A[:2], layer.lora_A[2:]
    want = base(x)
    want[..., [1, 3, 5, 8]] += (F.linear(x, q) + F.linear(v, q)) @ layer.lora_B[:4].t()
    want[..., [2, 0]] += (F.linear(x, k) + F.linear(v, k)) @ layer.lora_B[4:].t()
    y = layer(x, v)
    assert torch.allclose(y, want, atol=1e-5)
    y.square().sum().backward()
    assert all(parameter.grad.any(dim=1).all() for parameter in (layer.lora_A, layer.lora_B))
    for parts in ([(0, 1), (1, 2)], [(0, 9)], [(), (1,)]):
        with pytest.raises(ValueError, match="parts"):
            RoutedLoRALinear(base, 2, parts=parts)


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


def test_a_projection_without_bias_is_restored():
    base = nn.Linear(8, 6, bias=False)
    assert RoutedLoRALinear(base, 2, routing="none").restore() is base
    assert base.bias is None
