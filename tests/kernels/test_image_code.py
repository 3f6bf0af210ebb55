"""What an image comes to before any text: made once by a function of its own, used as if the call had made it."""

import pytest
import torch
from routed_cases import FORMS
from tolerances import relative_rms

from routingvl.kernels import (
    ROUTINGS,
    project_adapter_image,
    project_lora_image,
    routed_adapter,
    routed_lora,
    routed_lora_linear,
)
from routingvl.kernels.optional_triton import interpreted

BACKENDS = [
    "eager",
    pytest.param("triton", marks=pytest.mark.skipif(not interpreted(), reason="needs Triton's interpreter")),
]
CASES = [
    (name, relu, tokens)
    for name, relu in FORMS
    if ROUTINGS[name].uses_image
    for tokens in (1, 7)[: 2 if ROUTINGS[name].max_visual_tokens is None else 1]
]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32).requires_grad_()


def gradients(output: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves)]


def assert_alike(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    largest = max(tensor.abs().max() for tensor in want)
    for left, right in zip(got, want, strict=True):
        # Beside the largest, what is left of a gradient whose terms cancel is rounding.
        assert relative_rms(left, right) < 3e-6 or (left - right).abs().max() < 1e-6 * largest


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_lora_with_prepared_image_and_beams(name, relu, tokens, beams, backend):
    torch.manual_seed(0)
    x, v = drawn(2 * beams, 5, 12), drawn(2, tokens, 12)
    weight, bias, a, b = drawn(24, 12), drawn(24), drawn(8, 12), drawn(16, 4)
    options = {"routing": name, "relu": relu, "groups": 2, "scaling": 0.7, "backend": backend}
    leaves = [x, v, a, b]

    def layer(**more):
        return routed_lora_linear(x, v, weight, bias, a, b, columns=(0, 16), **options, **more)

    image = project_lora_image(v, a, b, **options)
    assert_alike(gradients(layer(image=image), leaves), gradients(layer(), leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_adapter_with_prepared_image_and_beams(name, relu, tokens, beams, backend):
    torch.manual_seed(0)
    x, v = drawn(2 * beams, 5, 12), drawn(2, tokens, 12)
    down, down_bias, up, up_bias = drawn(4, 12), drawn(4), drawn(12, 4), drawn(12)
    leaves = [x, v, down, down_bias, up, up_bias]

    def adapter(**more):
        return routed_adapter(*more.pop("operands", leaves), routing=name, relu=relu, backend=backend, **more)

    image = project_adapter_image(v, down, down_bias, routing=name, relu=relu)
    want = gradients(adapter(operands=[x, v.repeat_interleave(beams, 0), *leaves[2:]]), leaves)
    assert_alike(gradients(adapter(image=image), leaves), want)
    assert_alike(gradients(adapter(), leaves), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
def test_decoding_with_the_matrix_of_inner_products(relu, backend):
    torch.manual_seed(0)
    x, v, a, b = torch.randn(6, 1, 12), torch.randn(2, 9, 12), torch.randn(4, 12), torch.randn(10, 4)
    options = {"routing": "vllora", "relu": relu, "backend": backend}
    image = project_lora_image(v, a, b, decoding=True, **options)
    assert image.gram.shape == (2, 4, 4)
    assert image.gram.dtype == torch.float32
    weight = torch.randn(10, 12)
    got = routed_lora_linear(x, v, weight, None, a, b, image=image, **options)
    assert relative_rms(got, routed_lora_linear(x, v, weight, None, a, b, **options)) < 3e-6
    up, biases = torch.randn(12, 4), (torch.randn(4), torch.randn(12))
    image = project_adapter_image(v, a, biases[0], routing="vllora", relu=relu, decoding=True)
    assert image.gram is not None
    operands = (x, v, a, biases[0], up, biases[1])
    got = routed_adapter(*operands, image=image, **options)
    assert relative_rms(got, routed_adapter(*operands, **options)) < 3e-6


@pytest.mark.parametrize("row", [row for row in ROUTINGS.values() if row.probe_backward], ids=lambda row: row.name)
def test_probe_backward_is_the_gradient_of_probe(row):
    torch.manual_seed(0)
    u, dp = drawn(3, 4), torch.randn(3, 4)
    probe, found = row.probe(u), row.probe_backward(dp, u.detach())
    if found is None:
        assert not probe.requires_grad
    else:
        torch.testing.assert_close(found, torch.autograd.grad(probe, u, dp)[0])


def test_nothing_to_prepare():
    v, a, b = torch.randn(2, 3, 12), torch.randn(4, 12), torch.randn(10, 4)
    assert project_lora_image(v, a, b, routing="none") is None
    assert project_lora_image(v, a, b, routing="vllora", placement="output") is None  # has no closed form
    assert project_adapter_image(v, a, None, routing="none") is None


def test_image_and_dropout_exclude_each_other():
    x, v, a, b, weight = (torch.randn(*shape) for shape in ((2, 3, 8), (2, 1, 8), (4, 8), (8, 4), (8, 8)))
    image = project_lora_image(v, a, b, routing="mul")
    with pytest.raises(ValueError, match="image="):
        routed_lora_linear(x, v, weight, None, a, b, routing="mul", dropout=0.1, image=image)


def test_prepared_under_another_dtype_than_used():
    torch.manual_seed(0)
    x, v, a, b, weight = (torch.randn(*shape) for shape in ((2, 3, 8), (2, 1, 8), (4, 8), (8, 4), (8, 8)))
    image = project_lora_image(v, a, b, routing="vllora")
    with torch.autocast("cpu", torch.bfloat16):
        late = routed_lora_linear(x, v, weight, None, a, b, routing="vllora", image=image)
        want = routed_lora_linear(x, v, weight, None, a, b, routing="vllora")
    assert late.dtype == want.dtype == torch.bfloat16
    assert relative_rms(late, want) < 3e-2  # two orders of rounding to bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_beams_of_routed_lora(backend):
    torch.manual_seed(0)
    x, v, a, b, base = (torch.randn(*shape) for shape in ((6, 3, 8), (2, 1, 8), (4, 8), (9, 4), (6, 3, 9)))
    want = routed_lora(x, v.repeat_interleave(3, 0), a, b, routing="mul", base=base, backend="eager")
    assert relative_rms(routed_lora(x, v, a, b, routing="mul", base=base, backend=backend), want) < 1e-6
