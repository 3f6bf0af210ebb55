"""The short way of applying an autograd function gives what torch's own does, and refuses the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from routingvl.kernels import routed_adapter, routed_lora_linear
from routingvl.kernels.autograd_function import applied, backward_of, keeping
from routingvl.kernels.optional_triton import interpreted


class Scaled(torch.autograd.Function):
    """y = x w factor, which saves what it computed on the way."""

    cast = 2
    seen: list[tuple[torch.dtype, ...]] = []  # noqa: RUF012

    @staticmethod
    def forward(x: Tensor, w: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        Scaled.seen.append((x.dtype, w.dtype))
        wide = x * factor
        return wide * w, wide

    @staticmethod
    @keeping
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.factor = inputs[2]
        ctx.save_for_backward(inputs[1], output[1])

    @staticmethod
    @backward_of
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        w, wide = ctx.saved_tensors
        return dy * w * ctx.factor, dy * wide


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 4, generator=generator).to(dtype).requires_grad_() for _ in range(2))


def test_gives_what_torchs_way_gives() -> None:
    x, w = operands()
    short, long = applied(Scaled, x, w, 3.0), Scaled.apply(x, w, 3.0)[0]
    assert torch.equal(short, long)
    assert type(short.grad_fn).__name__ == type(long.grad_fn).__name__ == "ScaledBackward"
    dy = torch.randn(3, 4)
    pairs = zip(torch.autograd.grad(short, (x, w), dy), torch.autograd.grad(long, (x, w), dy), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    short = applied(Scaled, x, w, 3.0)
    short += 1  # it is no view
    assert torch.autograd.grad(short.sum(), x)[0].shape == x.shape


class Stopped(torch.autograd.Function):
    """The identity, of which torch gets no gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> None:
        return None


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_without_a_gradient_no_zeros_are_made(backend: str) -> None:
    if backend == "triton" and not interpreted():
        pytest.skip("compiled only")
    x, w = operands()
    v, weight, bias = torch.randn(1, 1, 4), torch.randn(4, 4), torch.zeros(3, requires_grad=True)
    outputs = {
        "short": lambda: applied(Scaled, x, w, 3.0),
        "torch's": lambda: Scaled.apply(x, w, 3.0)[0],
        "lora": lambda: routed_lora_linear(x[None], v, weight, None, w, w.T, routing="mul", backend=backend),
        "adapter": lambda: routed_adapter(x[None], v, w, bias, w.T, None, routing="mul", backend=backend),
    }
    for name, call in outputs.items():
        Stopped.apply(call()).sum().backward()
        assert (x.grad, w.grad, bias.grad) == (None, None, None), name


def test_nothing_is_recorded_where_nothing_is_to_be_differentiated() -> None:
    x, w = operands()
    with torch.no_grad():
        assert not applied(Scaled, x, w, 3.0).requires_grad
    assert not applied(Scaled, x.detach(), w.detach(), 3.0).requires_grad


def test_a_second_derivative_is_refused() -> None:
    x, w = operands()
    (dx,) = torch.autograd.grad(applied(Scaled, x, w, 3.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


@pytest.mark.parametrize("recording", [True, False])
def test_a_dtype_is_that_inside_and_gradients_have_the_inputs_own(recording: bool) -> None:
    (x, w), Scaled.seen[:] = operands(), []
    with torch.set_grad_enabled(recording):
        y = applied(Scaled, x, w, 3.0, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert Scaled.seen == [(torch.bfloat16, torch.bfloat16)]
    if recording:
        y.sum().backward()
        outside = operands()
        Scaled.apply(*(tensor.bfloat16() for tensor in outside), 3.0)[0].sum().backward()
        for mine, theirs in zip((x, w), outside, strict=True):
            assert mine.grad.dtype == torch.float32
            assert torch.equal(mine.grad, theirs.grad)


def test_hooks_see_what_is_saved_and_may_change_it() -> None:
    x, w = operands()
    packed: list[Tensor] = []
    with saved_tensors_hooks(lambda saved: packed.append(saved) or saved, lambda saved: 2 * saved):
        y = applied(Scaled, x, w, 3.0)
    assert [tuple(saved.shape) for saved in packed] == [(3, 4)] * 2
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert torch.allclose(dx, 6 * w)
    assert torch.allclose(dw, 6 * x)


def test_torch_func_takes_torchs_way() -> None:
    x, w = (tensor.detach() for tensor in operands())
    dx = torch.func.grad(lambda tensor: applied(Scaled, tensor, w, 3.0).sum())(x)
    assert torch.allclose(dx, 3 * w)
