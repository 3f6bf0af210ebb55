"""Images of different sizes, texts without an image, beams that are found: each row as if it were alone."""

import copy

import pytest
import torch

from routingvl import VisualContext
from routingvl.bottlenecks import layers
from routingvl.bottlenecks.beside import RoutedLoRABeside
from routingvl.kernels import ROUTINGS

WIDTH = 8
KINDS = ["linear", "beside", "adapter"]


def make(kind: str, routing: str, context: VisualContext, **options) -> layers.RoutedLayer:
    torch.manual_seed(0)
    if kind == "adapter":
        layer = layers.RoutedAdapter(WIDTH, 3, routing=routing, context=context, **options)
    else:
        cls = layers.RoutedLoRALinear if kind == "linear" else RoutedLoRABeside
        layer = cls(torch.nn.Linear(WIDTH, WIDTH), 3, routing=routing, context=context, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer.double()


def base_of(layer, x):
    """What the layer puts out without its bottleneck."""
    if isinstance(layer, layers.RoutedAdapter):
        return x
    base = getattr(layer, "base_layer", layer)
    return torch.nn.functional.linear(x, base.weight, base.bias)


def text(rows: int) -> torch.Tensor:
    return torch.randn(rows, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def ragged(*counts: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Tokens of each row, all of them padded with rubbish, and their mask."""
    generator = torch.Generator().manual_seed(2)
    own = [torch.randn(count, WIDTH, dtype=torch.float64, generator=generator) for count in counts]
    padded = torch.full((len(counts), max(counts), WIDTH), float("nan"), dtype=torch.float64)
    for row, tokens in zip(padded, own, strict=True):
        row[: len(tokens)] = tokens
    return own, padded, torch.arange(max(counts)) < torch.tensor(counts)[:, None]


def alone(layer, x, tokens):
    """The layer's output for one row and its own tokens."""
    v = tokens[None] if layer.routing.max_visual_tokens is None else tokens.mean(0)[None, None]
    return layer(x[None], v=v)[0]


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", [name for name, row in ROUTINGS.items() if row.uses_image])
def test_each_row_reads_its_own_tokens(kind, routing, decoding):
    context = VisualContext()
    layer = make(kind, routing, context)
    x, (own, padded, mask) = text(3), ragged(2, 5, 1)
    with torch.set_grad_enabled(not decoding), context.bind(padded, mask=mask, decoding=decoding):
        got = layer(x), layer(x)
    for found in got:
        for row, (xs, tokens) in enumerate(zip(x, own, strict=True)):
            torch.testing.assert_close(found[row], alone(layer, xs, tokens), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_gradients_of_padded_images_are_those_of_each_row_alone(kind, routing):
    context = VisualContext()
    layer, other = make(kind, routing, context), make(kind, routing, VisualContext())
    x, (own, padded, mask) = text(2), ragged(2, 5)
    own = [tokens.requires_grad_() for tokens in own]
    padded.requires_grad_()
    with context.bind(padded, mask=mask):
        layer(x).square().sum().backward()
    sum(alone(other, xs, tokens).square().sum() for xs, tokens in zip(x, own, strict=True)).backward()
    for (name, left), right in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert (left.grad is None) == (right.grad is None), name
        if left.grad is not None:
            torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-10, msg=name)
    torch.testing.assert_close(padded.grad[0, :2], own[0].grad)
    assert not padded.grad[0, 2:].any()


@pytest.mark.parametrize("routing", ["add", "mul", "expand", "vllora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_image_is_the_base_layers_bit_for_bit(kind, routing):
    context = VisualContext()
    layer = make(kind, routing, context, dropout=0.3)  # drops while it trains
    x, (_, padded, mask) = text(3), ragged(2, 0, 3)
    base = base_of(layer, x)
    for training in (False, True):
        layer.train(training)
        with context.bind(padded, mask=mask, text_only="skip"):
            y = layer(x)
        assert torch.equal(y[1], base[1])
        assert not torch.allclose(y[0], base[0])
        assert not torch.allclose(y[2], base[2])
    with context.bind(padded, mask=mask, text_only="skip", beams=2):
        twice = layer.eval()(x.repeat_interleave(2, 0))
    assert torch.equal(twice[2:4], base_of(layer, x.repeat_interleave(2, 0))[2:4])


@pytest.mark.parametrize("routing", ["add", "mul", "vllora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_image_can_read_zeros(kind, routing):
    context = VisualContext()
    layer = make(kind, routing, context)
    x, (_, padded, mask) = text(3), ragged(2, 0, 3)
    zero = layer(x[1:2], v=torch.zeros(1, 1, WIDTH, dtype=torch.float64))[0]
    with context.bind(padded, mask=mask, text_only="zero"):
        torch.testing.assert_close(layer(x)[1], zero)
    with context.bind(None, text_only="zero"):
        torch.testing.assert_close(layer(x)[1], zero)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_images_trains(kind):
    """Its gradients are zeros, and not an error in the loss."""
    context = VisualContext()
    layer = make(kind, "mul", context)
    x = text(3)
    with context.bind(None, text_only="skip"):
        y = layer(x)
    assert torch.equal(y, base_of(layer, x))
    y.square().sum().backward()
    assert not any(weight.grad.any() for weight in layer.projection)


def test_what_does_not_fit_is_an_error():
    context = VisualContext()
    _, padded, mask = ragged(2, 0)
    with pytest.raises(ValueError, match=r"rows \[1\] of the mask have no visual token.*text_only"):
        context.bind(padded, mask=mask)
    with pytest.raises(ValueError, match=r"mask must be torch.bool \[2, 2\].*\[2, 3\]"):
        context.bind(padded, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"torch.bool.*float32"):
        context.bind(padded, mask=mask.float())
    with pytest.raises(ValueError, match="text_only='none'"):
        context.bind(padded, text_only="none")
    with pytest.raises(ValueError, match="features is None"):
        context.bind(None, mask=mask)


def test_beams_are_found_in_each_layer():
    context = VisualContext()
    layer = make("linear", "mul", context)
    x, v = text(2), text(2)[:, :1]
    with context.bind(v, beams=None):
        one, three = layer(x), layer(x.repeat_interleave(3, 0))
        with pytest.raises(ValueError, match=r"batch 2.*batch 3: not a whole number"):
            layer(text(3))
    torch.testing.assert_close(three, one.repeat_interleave(3, 0))


@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_some_rows_of_the_text(routing):
    context = VisualContext()
    layer = make("linear", routing, context)
    x, (_, padded, mask) = text(6), ragged(2, 0, 3)
    index = torch.tensor([1, 2, 5])
    with context.bind(padded, mask=mask, text_only="skip", beams=2):
        whole = layer(x)
        with context.rows(index, of=6):
            some = layer(x[index])
    torch.testing.assert_close(some, whole[index])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("routing", ["add", "mul", "vllora"])
def test_an_image_of_another_width_is_projected(routing, bias):
    context = VisualContext()
    layer = make("linear", routing, context)
    projection = torch.nn.Linear(5, WIDTH, bias=bias).double()
    layer.project_image_by(projection)
    assert not any("projection" in name for name, _ in layer.named_parameters())
    x, own = text(2), [torch.randn(count, 5, dtype=torch.float64) for count in (2, 4)]
    padded = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    for decoding in (False, True):
        with torch.set_grad_enabled(not decoding), context.bind(padded, mask=mask, decoding=decoding):
            y = layer(x)
        for row in range(2):
            torch.testing.assert_close(y[row], alone(layer, x[row], projection(own[row])))
    with context.bind(padded, mask=mask):
        layer(x).sum().backward()
    assert projection.weight.grad.abs().max() > 0
    with context.bind(padded, mask=torch.tensor([[True] * 4, [False] * 4]), text_only="zero"):
        zero = layer(x[1:], torch.zeros(1, 1, WIDTH, dtype=torch.float64))[0]
        torch.testing.assert_close(layer(x)[1], zero)
    twin = copy.deepcopy([layer, projection])
    assert twin[0].image_projection is twin[1]
