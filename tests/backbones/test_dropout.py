"""The dropout of the backbones: rate, scale, independence, and that a seed repeats it."""

import pytest
import torch
from tiny import answerer, captioner
from torch import nn
from torch.utils.checkpoint import checkpoint

from routingvl.backbones.dropout import LaneDropout, lighten_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p):
    torch.manual_seed(0)
    kept = LaneDropout(p)(torch.ones(1000, 1000))
    # 4.5 standard deviations of the mean of a million coins
    assert (kept > 0).double().mean().item() == pytest.approx(1 - p, abs=4.5 * (p * (1 - p) / 1e6) ** 0.5)
    torch.testing.assert_close(kept[kept > 0].unique(), torch.tensor([1 / (1 - p)]), rtol=3e-4, atol=0)
    assert kept.double().mean().item() == pytest.approx(1, abs=5e-3)


def test_components_are_independent():
    """Neighbours share a 64-bit number and must not share a fate: correlations at distances within it and beyond."""
    torch.manual_seed(1)
    kept = (LaneDropout(0.5)(torch.ones(400_000)) > 0).double() * 2 - 1
    for distance in range(1, 9):
        assert abs((kept[distance:] * kept[:-distance]).mean().item()) < 4.5 / 400_000**0.5, distance
    for lane in range(4):
        assert abs(kept[lane::4].mean().item()) < 4.5 / 100_000**0.5, lane


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (0, 4), (8, 4)])
def test_gradient_has_the_mask_and_a_seed_repeats_it(dtype, shape):
    x = torch.randn(shape).to(dtype).transpose(0, -1).requires_grad_()
    drop = LaneDropout(0.5)
    torch.manual_seed(2)
    y = drop(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, x * grad)
    torch.manual_seed(2)
    assert torch.equal(drop(x), y)
    torch.manual_seed(2)
    (again,) = torch.autograd.grad(checkpoint(drop, x, use_reentrant=False).sum(), x)
    assert torch.equal(again, grad)


@pytest.mark.parametrize("p", [0.0, 1e-4, 1.0])
def test_what_16_bits_cannot_express_is_left_to_torch(p):
    x = torch.randn(50, 50)
    torch.manual_seed(3)
    want = nn.Dropout(p)(x)
    torch.manual_seed(3)
    assert torch.equal(LaneDropout(p)(x), want)


def test_nothing_is_dropped_in_evaluation():
    x = torch.randn(5)
    assert LaneDropout(0.5).eval()(x) is x


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_one_graph_and_drops_the_same(backend):
    torch._dynamo.reset()
    drop = LaneDropout(0.3)
    compiled = torch.compile(drop, backend=backend, fullgraph=True, dynamic=True)
    for shape in [(8, 6), (5, 6)]:  # the second is not a multiple of four in numbers, nor of the first's shape
        x = torch.randn(shape, requires_grad=True)
        torch.manual_seed(4)
        want = drop(x)
        torch.manual_seed(4)
        with torch._inductor.config.patch(fallback_random=True):  # as routingvl.training.compile has it
            got = compiled(x)
        torch.testing.assert_close(got, want)
        assert (want == 0).any()
        (grad,) = torch.autograd.grad(got.sum(), x)
        assert torch.equal(grad == 0, want == 0)


@pytest.mark.parametrize("build", [captioner, answerer])
def test_models_have_it(build):
    kinds = {type(module) for module in build().language_model.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {LaneDropout}


def test_replacement_keeps_probability_and_mode():
    model = nn.Sequential(nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.2).eval(), nn.Dropout1d(0.2)))
    lighten_dropout(model)
    first, second, other = model[0], *model[1]
    assert (first.p, first.training, second.p, second.training) == (0.3, True, 0.2, False)
    assert type(other) is nn.Dropout1d
