"""LoRA over projections that have to be called, and the update whose weights belong to somebody else."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from routingvl import VisualContext
from routingvl.bottlenecks.beside import LoRAUpdate, RoutedLoRABeside, callable_widths
from routingvl.bottlenecks.layers import RoutedAdapter, RoutedLoRALinear
from routingvl.kernels import ROUTINGS

SLICES = [(0, 12), (24, 36)]


class Called(nn.Linear):
    """A projection whose forward nobody else can stand in for."""

    def forward(self, x, factor=2.0):
        return factor * super().forward(x)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, tokens, 12, generator=generator).to(dtype) for tokens in (5, 1))
    return x, v


def exact(layer, base):
    """The same LoRA beside a plain nn.Linear of the same weights."""
    plain = nn.Linear(12, 36, dtype=base.weight.dtype)
    plain.load_state_dict(base.state_dict())
    twin = RoutedLoRALinear(plain, 4, routing=layer.routing.name, slices=SLICES, dtype=torch.float32)
    twin.load_state_dict({**twin.state_dict(), "lora_A": layer.lora_A, "lora_B": layer.lora_B})
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_called_base_equals_the_exact_layer(routing, dtype):
    base, (x, v) = nn.Linear(12, 36, dtype=dtype), inputs(dtype)
    layer = RoutedLoRABeside(base, 4, routing=routing, slices=SLICES)
    assert torch.equal(layer(x, v=v), base(x))
    nn.init.normal_(layer.lora_B)
    twin = exact(layer, base)
    y, want = layer(x, v=v), twin(x, v)
    assert y.dtype == dtype
    torch.testing.assert_close(y, want)
    y.float().square().sum().backward()
    want.float().square().sum().backward()
    for ours, theirs in zip(layer.projection, twin.projection, strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=3e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)


def test_the_base_is_called_with_its_own_arguments_and_stays_whole():
    base, (x, v) = Called(12, 36), inputs()
    layer = RoutedLoRABeside(base, 4, routing="mul")
    assert torch.equal(layer(x, 3.0, v=v), base(x, 3.0))
    assert torch.equal(layer(x, factor=0.5, v=v), base(x, 0.5))
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", "lora_A", "lora_B"}
    assert layer.weight is base.weight
    assert layer.restore() is base


@pytest.mark.parametrize("routing", ["none", "mul", "vllora"])
def test_an_update_looks_its_weights_up_and_follows_copies(routing):
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.ParameterDict({"one": torch.randn(*shape)}) for shape in ((4, 12), (36, 4)))
            self.updates = {"one": LoRAUpdate((12, 36), 4, partial(self.pair, "one"), routing=routing, alpha=8)}

        def pair(self, name):
            return self.a[name], self.b[name]

    owner, (x, v) = Owner(), inputs()
    base = torch.randn(2, 5, 36)
    update = owner.updates["one"]
    twin = RoutedLoRALinear(nn.Linear(12, 36), 4, routing=routing, alpha=8)
    twin.load_state_dict({"weight": torch.zeros(36, 12), "bias": torch.zeros(36), "lora_A": owner.a["one"],
                          "lora_B": owner.b["one"]})  # fmt: skip
    torch.testing.assert_close(update(x, base, v), base + twin(x, v))
    clone = copy.deepcopy(owner)
    clone.b["one"].data.zero_()
    assert torch.equal(clone.updates["one"](x, base, v), base)
    assert not torch.equal(update(x, base, v), base)
    assert not list(update.parameters())


def test_a_base_output_of_another_dtype_keeps_it():
    x, v = inputs(torch.bfloat16)
    weights = torch.randn(4, 12), torch.randn(36, 4)
    update = LoRAUpdate((12, 36), 4, lambda: weights, routing="add")
    base = torch.randn(2, 5, 36)
    y = update(x, base, v)
    assert y.dtype == torch.float32
    bare = update(x, torch.zeros(2, 5, 36, dtype=torch.bfloat16), v)
    assert torch.equal(y, base + bare.float())


def test_dropout_follows_the_training_switch():
    x, v = inputs()
    layer = RoutedLoRABeside(nn.Linear(12, 36), 4, routing="add", dropout=0.5)
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x, v=v), layer(x, v=v))
    layer.eval()
    assert torch.equal(layer(x, v=v), layer(x, v=v))


def test_widths():
    assert callable_widths(nn.Linear(3, 4)) == (3, 4)
    assert callable_widths(nn.LayerNorm(3)) is None
    with pytest.raises(TypeError, match="LayerNorm"):
        RoutedLoRABeside(nn.LayerNorm(3), 2)


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_the_image_is_kept_for_them_as_for_the_others(routing, decoding):
    context, (x, v) = VisualContext(), inputs()
    layers = [RoutedLoRABeside(nn.Linear(12, 36), 4, routing=routing, context=context) for _ in range(3)]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    with context.bind(v, decoding=decoding), torch.set_grad_enabled(not decoding):
        for layer in layers:
            torch.testing.assert_close(layer(x), layer(x, v=v))
        if decoding or routing == "vllora":
            assert all(context.image_code(layer, layer.projection) is not None for layer in layers)


@pytest.mark.parametrize("routing", list(ROUTINGS))
def test_float32_bottlenecks_over_bfloat16(routing):
    x, v = inputs(torch.bfloat16)
    adapter = RoutedAdapter(12, 4, routing=routing)  # float32
    half = copy.deepcopy(adapter).bfloat16()
    assert torch.equal(adapter(x, v.float()), half(x, v))
    adapter(x, v).float().square().sum().backward()
    assert {p.grad.dtype for p in adapter.parameters()} == {torch.float32}
    context = VisualContext()
    layers = [RoutedLoRALinear(nn.Linear(12, 12, dtype=torch.bfloat16), 4, routing=routing, dtype=torch.float32,
                               context=context) for _ in range(2)]  # fmt: skip
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    with context.bind(v):
        for layer in layers:
            torch.testing.assert_close(layer(x), layer(x, v.float()), rtol=2e-2, atol=2e-2)
    sum(layer(x, v).float().sum() for layer in layers).backward()
    assert {p.grad.dtype for layer in layers for p in layer.projection} == {torch.float32}
