"""Which image a token reads, said token by token: packed texts, several images a row, texts without one, generation."""

import copy

import pytest
import torch
from test_masks import KINDS, WIDTH, base_of, make
from tiny import randomise, small_gpt2

import routingvl
from routingvl import RoutingConfig, VisualContext, inject
from routingvl.kernels import ROUTINGS

ROUTED = [name for name, row in ROUTINGS.items() if row.uses_image]
# Two rows of five tokens: a text each of image 2, of image 0 and of none; then one text that reads two images in turns.
SEGMENTS = {2: [(0, 0, 2)], 0: [(0, 2, 4), (1, 3, 5)], 1: [(1, 0, 3)], -1: [(0, 4, 5)]}
INDEX = torch.full((2, 5), -1)
for image, places in SEGMENTS.items():
    for row, start, stop in places:
        INDEX[row, start:stop] = image


def text(rows: int = 2, tokens: int = 5) -> torch.Tensor:
    return torch.randn(rows, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def images(tokens: int = 1) -> torch.Tensor:
    return torch.randn(3, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def by_segments(layer, x, v, text_only):
    """Each segment as a text of its own."""
    y = torch.zeros_like(x)
    for image, places in SEGMENTS.items():
        for row, start, stop in places:
            xs = x[row, start:stop][None]
            if image >= 0:
                piece = layer(xs, v=v[image].mean(0)[None, None])
            elif text_only == "skip":
                piece = base_of(layer, xs)
            else:
                piece = layer(xs, v=torch.zeros_like(v[:1, :1]))
            y = y.index_put((torch.tensor(row), torch.arange(start, stop)), piece[0])
    return y


@pytest.mark.parametrize("text_only", ["skip", "zero"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ROUTED)
def test_each_segment_is_a_text_of_its_own(routing, kind, text_only):
    context = VisualContext()
    layer = make(kind, routing, context)
    twin = copy.deepcopy(layer)
    # Functions of one visual token read the mean of several.
    x, v = text(), images(1 if layer.routing.max_visual_tokens is None else 3)
    leaves = [x.clone().requires_grad_(), v.clone().requires_grad_()]
    with context.bind(leaves[1], image_index=INDEX, text_only=text_only):
        y = layer(leaves[0])
    expected = [x.clone().requires_grad_(), v.clone().requires_grad_()]
    want = by_segments(twin, *expected, text_only)
    torch.testing.assert_close(y, want, rtol=1e-10, atol=1e-10)
    weights = torch.randn(y.shape, dtype=torch.float64)
    (y * weights).sum().backward()
    (want * weights).sum().backward()
    pairs = [*zip(leaves, expected, strict=True), *zip(layer.parameters(), twin.parameters(), strict=True)]
    for got, wanted in pairs:
        assert (got.grad is None) == (wanted.grad is None)
        if got.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_token_is_the_base_layers_bit_for_bit(kind):
    context = VisualContext()
    layer = make(kind, "mul", context)
    x = text()
    with context.bind(images(), image_index=INDEX, text_only="skip"):
        y = layer(x)
    assert torch.equal(y[INDEX < 0], base_of(layer, x)[INDEX < 0])
    assert not torch.isclose(y, base_of(layer, x)).all(2)[INDEX >= 0].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ROUTED)
def test_decoding_steps_and_beams_read_what_the_last_token_does(routing, kind):
    context = VisualContext()
    layer = make(kind, routing, context)
    x, v = text(), images()
    index = INDEX.clone()
    index[0, 4] = 1
    with context.bind(v, image_index=index, beams=None):
        whole = layer(x)
    step = text(6, 1)  # three beams
    with torch.no_grad(), context.bind(v, image_index=index, decoding=True, beams=None):
        torch.testing.assert_close(layer(x), whole)
        got = [layer(step), layer(step)]
        assert layer in context.bound().kept
    for row, image in enumerate((1, 1, 1, 0, 0, 0)):
        want = layer(step[row][None], v=v[image][None])[0]
        for found in got:
            torch.testing.assert_close(found[row], want)
    with torch.no_grad(), context.bind(v, image_index=INDEX, decoding=True, text_only="skip", beams=3):
        layer(text(6))
        torch.testing.assert_close(layer(step)[:3], base_of(layer, step)[:3])


def test_without_a_cache_the_text_comes_again_with_what_was_written():
    context = VisualContext()
    layer = make("linear", "mul", context)
    x, longer, longest, v = text(), text(2, 6), text(4, 8), images()
    with torch.no_grad(), context.bind(v, image_index=INDEX, decoding=True, text_only="skip", beams=None):
        layer(x)
        got, beams = layer(longer), layer(longest)
    for tokens, found in ((longer, got), (longest, beams)):
        index = torch.cat([INDEX, INDEX[:, -1:].expand(-1, tokens.shape[1] - 5)], 1)
        index = index.repeat_interleave(len(tokens) // 2, 0)
        with torch.no_grad(), context.bind(v, image_index=index, text_only="skip"):
            torch.testing.assert_close(found, layer(tokens))


def test_some_rows_know_that_the_text_has_begun():
    context = VisualContext()
    layer = make("linear", "mul", context)
    rows = torch.tensor([1])
    with torch.no_grad(), context.bind(images(), image_index=INDEX, decoding=True, text_only="skip", beams=None):
        for tokens in (5, 1):  # PEFT's rows of one adapter, in a prompt and in a step
            with context.rows(rows, of=2):
                layer(text(1, tokens))


def test_a_text_that_comes_in_pieces_is_an_error():
    context = VisualContext()
    layer = make("linear", "mul", context)
    with (
        context.bind(images(), image_index=INDEX, decoding=True, text_only="skip"),
        pytest.raises(ValueError, match=r"is for 5 tokens, and the first call has 2 of them.*prefill_chunk_size"),
    ):
        layer(text(2, 2))


def test_some_rows_of_the_text():
    context = VisualContext()
    layer = make("linear", "mul", context)
    x = text(4)
    with context.bind(images(), image_index=INDEX, text_only="skip", beams=2):
        whole = layer(x)
        with context.rows(torch.tensor([1, 2]), of=4):
            some = layer(x[1:3])
    torch.testing.assert_close(some, whole[1:3])


def test_an_image_of_another_width_is_projected():
    context = VisualContext()
    layer = make("linear", "mul", context)
    projection = torch.nn.Linear(5, WIDTH).double()
    layer.project_image_by(projection)
    x, v = text(), torch.randn(3, 1, 5, dtype=torch.float64)
    for text_only in ("skip", "zero"):
        with context.bind(v, image_index=INDEX, text_only=text_only):
            y = layer(x)
        torch.testing.assert_close(y, by_segments(layer, x, projection(v), text_only))


def test_padding_of_the_images_does_not_count():
    context = VisualContext()
    layer = make("linear", "mul", context)
    x, v = text(), images(3)
    mask = torch.tensor([[True, False, False], [True, True, False], [True] * 3])
    means = torch.stack([tokens[kept].mean(0, keepdim=True) for tokens, kept in zip(v, mask, strict=True)])
    with context.bind(v.masked_fill(~mask[..., None], float("nan")), mask=mask, image_index=INDEX, text_only="skip"):
        torch.testing.assert_close(layer(x), by_segments(layer, x, means, "skip"))


def test_checkpointing_recomputes_with_the_index():
    context = VisualContext()
    layer = make("linear", "mul", context).train()
    x, v = text().requires_grad_(), images()
    with context.bind(v, image_index=INDEX, text_only="skip"):
        plain = layer(x)
        again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    want = torch.autograd.grad(plain.square().sum(), layer.lora_A)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), layer.lora_A), want)


def test_packed_rows_of_a_model_are_the_texts_apart():
    """Two texts in one row: attention kept apart by a mask, positions begun again, each its own image."""
    model = small_gpt2().double().eval()
    inject(model, RoutingConfig(method="lora", routing="mul", rank=4, alpha=4))
    randomise(model)
    ids, lengths = torch.randint(5, 40, (1, 9)), (4, 5)
    v = torch.randn(2, 1, model.config.n_embd, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    which = torch.arange(2).repeat_interleave(torch.tensor(lengths))
    apart = (which[:, None] == which[None]) & torch.ones(9, 9, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 9, 9, dtype=torch.float64).masked_fill(~apart, float("-inf"))
    with routingvl.bind_image(model, v, image_index=which[None]):
        packed = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
    for own, image, found in zip(ids.split(lengths, 1), v, packed.split(lengths, 1), strict=True):
        with routingvl.bind_image(model, image[None]):
            torch.testing.assert_close(found, model(input_ids=own).logits, rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_an_error():
    context = VisualContext()
    v = images()
    for wrong, message in (
        (INDEX.tolist(), "must be a tensor, .* not list"),
        (INDEX.int(), r"torch.int64 \[rows of text, T\], not torch.int32 \[2, 5\]"),
        (INDEX[0], r"not torch.int64 \[5\]"),
        (INDEX + 1, r"from 0 to 3, and there are 3 images: -1 \(none\) to 2"),
        (INDEX - 1, "from -2 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            context.bind(v, image_index=wrong, text_only="skip")
    with pytest.raises(ValueError, match="text_only='skip' or 'zero'"):
        context.bind(v, image_index=INDEX)
    with pytest.raises(ValueError, match="image_index= belongs to features"):
        context.bind(None, image_index=INDEX)
    layer = make("linear", "vllora", context)
    with context.bind(v, image_index=INDEX, text_only="skip"):
        with pytest.raises(ValueError, match="image_index is for 5 tokens, and the text of a routed layer has 4"):
            layer(text(2, 4))
        with pytest.raises(ValueError, match="image_index has batch 2, text has batch 3"):
            layer(text(3))
        with pytest.raises(ValueError, match=r"image_index is for text \[rows, T, width\]"):
            layer(text()[0, :2])
    with (
        context.bind(images(2), image_index=INDEX, text_only="skip"),
        pytest.raises(ValueError, match="one visual token per image, and the features have 2"),
    ):
        layer(text())
