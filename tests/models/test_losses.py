"""The chunked cross entropy of the language model's head: values, gradients, dtypes and memory."""

import pytest
import torch
from tiny import batch, captioner, randomise
from torch.nn import functional as F

from routingvl.models import losses
from routingvl.models.losses import linear_cross_entropy

ROWS, WIDTH, VOCABULARY = 23, 8, 31


def inputs(dtype=torch.float64, weight_grad=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight.requires_grad_(weight_grad), targets


def exact(hidden, weight, targets):
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    loss = F.cross_entropy(hidden @ weight.t(), targets)
    (3 * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [None, 1, 7, ROWS, 100])
@pytest.mark.parametrize("weight_grad", [True, False])
def test_equals_cross_entropy_of_all_logits(chunk, weight_grad):
    hidden, weight, targets = inputs(weight_grad=weight_grad)
    want = exact(hidden, weight, targets)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    (3 * loss).backward()  # not 1, so that the incoming gradient matters
    torch.testing.assert_close(loss.detach(), want[0])
    torch.testing.assert_close(hidden.grad, want[1])
    if weight_grad:
        torch.testing.assert_close(weight.grad, want[2])
    else:
        assert weight.grad is None


def test_large_logits_do_not_overflow():
    hidden, weight, targets = inputs(torch.float32)
    loss = linear_cross_entropy(1e4 * hidden, weight, targets, chunk=5)
    want = F.cross_entropy(1e4 * hidden.double() @ weight.double().t(), targets)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_float32_and_autocast_keep_a_float32_loss():
    hidden, weight, targets = inputs(torch.float32)
    want = exact(hidden, weight, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=6)
    (3 * loss).backward()
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(want[0].item(), rel=0.01)
    for found, expected in zip((hidden.grad, weight.grad), want[1:], strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()
    # The products are in bfloat16, as those of any other head are under autocast.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ordinary = F.cross_entropy(F.linear(hidden, weight).float(), targets)
    assert loss.item() == pytest.approx(ordinary.item(), rel=1e-5)


def test_without_gradients_nothing_is_prepared_for_backward():
    hidden, weight, targets = inputs()
    want = exact(hidden, weight, targets)[0]
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want)


def test_nothing_to_learn_is_a_loss_of_zero():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden[:0], weight, targets[:0])
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_no_tensor_has_more_than_a_chunk_of_logits():
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return result

    hidden, weight, targets = inputs(weight_grad=False)
    kept = []
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t),
    ):
        linear_cross_entropy(hidden, weight, targets, chunk=3).backward()
    assert largest.elements == max(weight.numel(), hidden.numel())
    assert largest.elements > 3 * VOCABULARY
    assert kept == [hidden.numel()]


@pytest.mark.parametrize(
    ("shapes", "chunk", "message"),
    [
        (((5, 4), (9, 3), (5,)), None, r"\[n, d\] and \[V, d\]"),
        (((5, 4), (9, 4), (4,)), None, "one entry for each of 5 rows"),
        (((5, 4), (9, 4), (5,)), 0, "chunk=0"),
    ],
)
def test_errors(shapes, chunk, message):
    hidden, weight, targets = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, targets.long(), chunk=chunk)


@pytest.mark.parametrize("caption_loss", ["sound", "reference"])
@pytest.mark.parametrize("visual_prefix", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_without_logits_has_the_same_loss_and_gradients(caption_loss, visual_prefix, checkpointing):
    model = randomise(captioner(caption_loss=caption_loss, visual_prefix=visual_prefix)).double().train()
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[0, 2] = 0
    found = []
    for return_logits in (True, False):
        if checkpointing and not return_logits:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        output = model(**inputs, labels=labels, return_logits=return_logits)
        output.loss.backward()
        assert (output.logits is None) is not return_logits
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss.detach(), gradients))
    torch.testing.assert_close(*found)


def test_model_without_logits_needs_labels():
    with pytest.raises(ValueError, match="pass labels="):
        captioner()(**batch(), return_logits=False)


@pytest.mark.parametrize("rows", [losses.PADDED_ROWS - 1, losses.PADDED_ROWS, losses.PADDED_ROWS + 13])
@pytest.mark.parametrize("chunk", [None, losses.PADDED_ROWS + 5])
def test_padding_of_the_products_changes_nothing(rows, chunk):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (rows,), generator=generator)
    want = torch.nn.functional.cross_entropy(hidden @ weight.t(), targets)
    found = losses.linear_cross_entropy(hidden, weight, targets, chunk)
    torch.testing.assert_close(found, want)
    for got, expected in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (found, want)), strict=True):
        torch.testing.assert_close(got, expected)
