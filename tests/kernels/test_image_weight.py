"""The image's own down-projection in the public functions: the definition's numbers and gradients, on both backends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import relative_rms
from torch import Tensor

from routingvl.kernels import (
    ROUTINGS,
    project_adapter_image,
    project_lora_image,
    routed_adapter,
    routed_lora,
    routed_lora_linear,
)
from routingvl.kernels.optional_triton import interpreted
from routingvl.kernels.reference import reference_adapter, reference_lora

B, T, K, WIDE, R, N = 3, 5, 12, 20, 4, 8
READING = [name for name, row in ROUTINGS.items() if row.uses_image]
BACKENDS = [
    pytest.param("eager", torch.float64, 1e-12, id="eager"),
    pytest.param(
        "triton", torch.float32, 2e-6, id="triton", marks=pytest.mark.skipif(not interpreted(), reason="compiled only")
    ),
]
# (routing, L, relu, placement)
CALLS = [(name, 1, False, "bottleneck") for name in READING]
CALLS += [("vllora", 3, False, "bottleneck"), ("vllora", 1, True, "bottleneck"), ("vllora", 3, True, "bottleneck")]
CALLS += [("mul", 1, False, "output"), ("vllora", 1, False, "output"), ("vllora", 3, True, "output")]


def drawn(dtype: torch.dtype, tokens: int, groups: int = 1) -> dict[str, Tensor]:
    """Every tensor of a call; each needs a gradient."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = {
        "x": (B, T, K), "v": (B, tokens, WIDE), "a": (groups * R, K), "b": (groups * N, R), "own": (groups * R, WIDE),
        "weight": (3 * N, K), "bias": (3 * N,), "down_bias": (R,), "up": (K, R), "up_bias": (K,), "own_bias": (R,),
    }  # fmt: skip
    return {
        name: (torch.randn(*shape, generator=generator, dtype=torch.float64) / 2).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def assert_same(call, definition, tensors: dict[str, Tensor], limit: float) -> None:
    """Output and every gradient of ``call`` are those of ``definition`` in float64."""
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    got, want = call(**tensors), definition(**exact)
    dy = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).view_as(want)
    got.backward(dy.to(got.dtype))
    want.backward(dy)
    assert relative_rms(got.detach(), want.detach()) <= limit
    for name, tensor in tensors.items():
        if exact[name].grad is not None:
            assert tensor.grad is not None, name
            assert relative_rms(tensor.grad, exact[name].grad) <= limit, name
        else:
            assert tensor.grad is None, name


@pytest.mark.parametrize(("backend", "dtype", "limit"), BACKENDS)
@pytest.mark.parametrize(("routing", "tokens", "relu", "placement"), CALLS)
def test_lora(routing, tokens, relu, placement, backend, dtype, limit):
    groups, columns = 2, (0, 2 * N)  # query and value of one fused projection
    options = {"routing": routing, "scaling": 0.5, "relu": relu, "placement": placement}
    options |= {"groups": groups, "columns": columns}

    def call(x, v, weight, bias, a, b, own, **_):
        return routed_lora_linear(x, v, weight, bias, a, b, image_weight=own, backend=backend, **options)

    def definition(x, v, weight, bias, a, b, own, **_):
        return reference_lora(x, v, a, b, base=F.linear(x, weight, bias), image_weight=own, **options)

    assert_same(call, definition, drawn(dtype, tokens, groups), limit)


@pytest.mark.parametrize(("backend", "dtype", "limit"), BACKENDS)
def test_bottleneck_alone(backend, dtype, limit):
    def call(x, v, a, b, own, **_):
        return routed_lora(x, v, a, b, routing="vllora", image_weight=own, backend=backend)

    def definition(x, v, a, b, own, **_):
        return reference_lora(x, v, a, b, routing="vllora", image_weight=own)

    assert_same(call, definition, drawn(dtype, 1), limit)


@pytest.mark.parametrize(("backend", "dtype", "limit"), BACKENDS)
@pytest.mark.parametrize(("routing", "tokens", "relu"), [call[:3] for call in CALLS if call[3] == "bottleneck"])
def test_adapter(routing, tokens, relu, backend, dtype, limit):
    options = {"routing": routing, "relu": relu, "activation": "silu"}

    def call(x, v, a, down_bias, up, up_bias, own, own_bias, **_):
        own = {"image_weight": own, "image_bias": own_bias}
        return routed_adapter(x, v, a, down_bias, up, up_bias, backend=backend, **own, **options)

    def definition(x, v, a, down_bias, up, up_bias, own, own_bias, **_):
        own = {"image_weight": own, "image_bias": own_bias}
        return reference_adapter(x, v, a, down_bias, up, up_bias, **own, **options)

    assert_same(call, definition, drawn(dtype, tokens), limit)


@pytest.mark.parametrize(("backend", "dtype", "limit"), BACKENDS)
@pytest.mark.parametrize(
    ("routing", "placement"), [("mul", "bottleneck"), ("vllora", "bottleneck"), ("vllora", "output")]
)
def test_each_token_reads_its_own_image(routing, placement, backend, dtype, limit):
    index = torch.arange(B * T).view(B, T) % B
    options = {"routing": routing, "placement": placement, "groups": 2, "columns": (0, 2 * N)}

    def call(x, v, weight, bias, a, b, own, **_):
        return routed_lora_linear(
            x, v, weight, bias, a, b, image_weight=own, image_index=index, backend=backend, **options
        )

    def definition(x, v, weight, bias, a, b, own, **_):
        rows = x.reshape(B * T, 1, K)
        base = F.linear(rows, weight, bias)
        y = reference_lora(rows, v[index.flatten()], a, b, base=base, image_weight=own, **options)
        return y.view(B, T, -1)

    assert_same(call, definition, drawn(dtype, 1, groups=2), limit)


@pytest.mark.parametrize(("backend", "dtype", "limit"), BACKENDS)
@pytest.mark.parametrize(("routing", "tokens", "relu"), [("mul", 1, False), ("expand", 1, False), ("vllora", 3, True)])
def test_a_kept_code_stands_for_the_projection(routing, tokens, relu, backend, dtype, limit):
    t = {name: tensor.detach() for name, tensor in drawn(dtype, tokens).items()}
    x, v, own = t["x"], t["v"], t["own"]
    routed = {"routing": routing, "relu": relu}
    code = project_lora_image(v, t["a"], t["b"], backend=backend, decoding=True, image_weight=own, **routed)
    weights = (t["weight"][:N], t["bias"][:N], t["a"], t["b"])
    got = routed_lora_linear(x, v, *weights, image=code, image_weight=own, backend=backend, **routed)
    want = routed_lora_linear(x, v, *weights, image_weight=own, backend="eager", **routed)
    assert relative_rms(got, want) <= limit
    own = {"image_weight": own, "image_bias": t["own_bias"]}
    code = project_adapter_image(v, t["a"], t["down_bias"], decoding=True, **own, **routed)
    weights = (t["a"], t["down_bias"], t["up"], t["up_bias"])
    got = routed_adapter(x, v, *weights, image=code, backend=backend, **own, **routed)
    assert relative_rms(got, routed_adapter(x, v, *weights, backend="eager", **own, **routed)) <= limit


def test_dropout_draws_for_text_and_image():
    t = drawn(torch.float64, 1)
    torch.manual_seed(3)
    y = routed_lora_linear(
        t["x"], t["v"], t["weight"][:N], None, t["a"], t["b"], image_weight=t["own"], routing="mul", dropout=0.5
    )
    torch.manual_seed(3)
    x, v = F.dropout(t["x"], 0.5), F.dropout(t["v"], 0.5)
    want = reference_lora(
        x, v, t["a"], t["b"], routing="mul", base=F.linear(t["x"], t["weight"][:N]), image_weight=t["own"]
    )
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("shape", [(R + 1, WIDE), (R,)])
def test_an_unfit_weight_is_named(shape):
    t = drawn(torch.float64, 1)
    own = torch.zeros(*shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"image_weight must have shape \[{R}, K_v\]"):
        routed_lora(t["x"], t["v"], t["a"], t["b"], routing="mul", image_weight=own)
    with pytest.raises(ValueError, match=rf"image_weight must have shape \[{R}, K_v\]"):
        routed_adapter(t["x"], t["v"], t["a"], None, t["up"], None, routing="mul", image_weight=own)
    with pytest.raises(ValueError, match=rf"v must have shape \[B, L, {K}\]"):
        routed_lora(t["x"], t["v"], t["a"], t["b"], routing="mul")
