"""VisualContext: binding, reading, copies, threads, checkpointing."""

import copy
import gc
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from tiny import WIDTH, batch, randomise, small_gpt2, small_roberta
from torch.utils.checkpoint import checkpoint

from routingvl import RoutingConfig, VisualContext, ViTRobertaForVQA, inject
from routingvl.bottlenecks.layers import RoutedLoRALinear


def test_read_needs_a_binding():
    context = VisualContext()
    with pytest.raises(RuntimeError, match="no visual features bound"):
        context.read(torch.zeros(2, 3, 4))
    features = torch.randn(2, 1, 4)
    with context.bind(features):
        assert context.read(torch.zeros(2, 3, 4)) is features
    with pytest.raises(RuntimeError, match="no visual features bound"):
        context.read(torch.zeros(2, 3, 4))


def test_bindings_nest_and_clear_after_an_error():
    context, outer, inner = VisualContext(), torch.zeros(1, 1, 2), torch.ones(1, 1, 2)
    with context.bind(outer):
        with pytest.raises(KeyError), context.bind(inner):
            raise KeyError
        assert context.features is outer
    assert context.features is None


def test_batch_mismatch_names_both_and_the_fix():
    context = VisualContext()
    with (
        context.bind(torch.zeros(2, 1, 4)),
        pytest.raises(ValueError, match=r"batch 2, text has batch 6.*beams=num_beams"),
    ):
        context.read(torch.zeros(6, 3, 4))


def test_beams_are_counted():
    context = VisualContext()
    features = torch.randn(2, 1, 4)
    with context.bind(features, beams=3):
        assert context.read(torch.zeros(6, 1, 4)) is features
        with pytest.raises(ValueError, match="3 beams each, text has batch 2"):
            context.read(torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="beams=0"):
        context.bind(features, beams=0)


def test_features_must_have_three_dimensions():
    with pytest.raises(ValueError, match=r"\[2, 4\].*features\[:, None\]"):
        VisualContext().bind(torch.zeros(2, 4))


def test_copies_do_not_share_a_binding():
    context = VisualContext()
    with context.bind(torch.zeros(1, 1, 2)):
        holders = [context, context]
        copied = copy.deepcopy(holders)
        assert copied[0] is copied[1]
        assert copied[0] is not context
        assert copied[0].features is None
        assert pickle.loads(pickle.dumps(context)).features is None


def test_threads_see_their_own_features():
    context, seen, barrier = VisualContext(), {}, threading.Barrier(2)

    def work(value: float) -> None:
        with context.bind(torch.full((1, 1, 1), value)):
            barrier.wait()
            seen[value] = context.read(torch.zeros(1, 1, 1)).item()

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {1.0: 1.0, 2.0: 2.0}


def test_recomputation_sees_the_features_of_its_forward():
    context = VisualContext()

    def step(x: torch.Tensor) -> torch.Tensor:
        return (x * context.read(x)).sin()

    grads = []
    for checkpointed in (False, True):
        x = torch.linspace(0, 1, 4).view(2, 1, 2).requires_grad_()
        outputs = []
        for scale in (1.0, 2.0):  # two forwards before one backward: each must recompute with its own image
            with context.bind(torch.full((2, 1, 2), scale)):
                if checkpointed:
                    outputs.append(checkpoint(step, x, use_reentrant=False, context_fn=context.checkpoint_context_fn))
                else:
                    outputs.append(step(x))
        (outputs[0].sum() + outputs[1].sum()).backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])


@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_two_losses_of_one_image(routing):
    """Two forward passes in one binding, then a backward pass each."""
    context, model = VisualContext(), small_gpt2().eval()
    inject(model, RoutingConfig(rank=4, routing=routing), context)
    ids = torch.tensor([[1, 2], [3, 4]])
    found = []
    for apart in (True, False):
        model.zero_grad()
        with context.bind(torch.ones(2, 1, WIDTH)):
            one, two = model(ids, labels=ids).loss, model(ids.flip(0), labels=ids).loss
        if apart:
            one.backward()
            two.backward()
        else:
            (one + two).backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_steps_within_one_binding_see_the_weights_of_the_moment():
    losses = []
    for bindings in (1, 3):
        context, model = VisualContext(), small_gpt2().eval()
        inject(model, RoutingConfig(rank=4, routing="vllora"), context)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        found = []
        for _ in range(bindings):
            with context.bind(torch.ones(2, 1, WIDTH)):
                for _ in range(3 // bindings):
                    loss = model(torch.tensor([[1, 2], [3, 4]])).logits.square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    found.append(loss.item())
        losses.append(found)
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 3


def test_training_leaves_nothing_behind():
    model = ViTRobertaForVQA.from_backbones(
        None, small_roberta(), RoutingConfig(rank=4, routing="vllora"), num_labels=5, vision_width=WIDTH
    ).train()
    alive = []
    for _ in range(200):
        features = torch.randn(2, 1, WIDTH)
        ids = torch.randint(3, 40, (2, 4))
        model(vision_features=features, input_ids=ids, labels=torch.rand(2, 5)).loss.backward()
        alive.append(weakref.ref(features))
    del features
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    assert model.context.features is None


def by_torch(model) -> None:
    """The blocks run in reentrant checkpoints of torch's, of which no one tells the context."""
    for block in model.transformer.h:
        block.forward = lambda *args, f=block.forward, **more: checkpoint(partial(f, **more), *args, use_reentrant=True)


def gradients_of_two_images(routing, checkpointing, backward_inside, *, nested=False, trained=False):
    """Gradients of two forward passes with two images and one backward pass, in a plain loop around transformers."""
    text = {name: value for name, value in batch().items() if name != "pixel_values"}
    images = torch.randn(2, 3, 1, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_(trained)
    model, context = small_gpt2(), VisualContext()
    inject(model, RoutingConfig(routing=routing, rank=4, alpha=8, dropout=0.1), context)
    randomise(model).train()
    if checkpointing is by_torch:
        checkpointing(model)
        model.enable_input_require_grads()
    elif checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    torch.manual_seed(0)
    with context.bind(images[0]):
        one = model(**text, labels=text["input_ids"]).loss
        if nested:
            with context.bind(images[1]):
                (one + model(**text, labels=text["input_ids"]).loss).backward()
    if not nested:
        with context.bind(images[1]):
            two = model(**text, labels=text["input_ids"]).loss
            if backward_inside:
                (one + two).backward()
        if not backward_inside:
            (one + two).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "images": images.grad} if trained else found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", [{"nested": True}, {"trained": True}, {}], ids=str)
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_checkpointing_that_knows_nothing_of_the_context(routing, backward_inside, when, reentrant):
    """transformers' own switch: each pass is recomputed with its own image, whichever is bound by then, or none."""
    plain = gradients_of_two_images(routing, None, backward_inside, **when)
    checkpointed = gradients_of_two_images(routing, {"use_reentrant": reentrant}, backward_inside, **when)
    assert plain.keys() == checkpointed.keys()
    for name, want in plain.items():
        torch.testing.assert_close(checkpointed[name], want, rtol=1e-5, atol=1e-7, msg=name)
        if not reentrant and not when:
            assert torch.equal(checkpointed[name], want), name


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("backward_inside", [True, False])
def test_a_reentrant_checkpoint_of_another_image_is_an_error(backward_inside, nested):
    with pytest.raises(RuntimeError, match=r"not known with which image.*context_fn"):
        gradients_of_two_images("mul", by_torch, backward_inside, nested=nested)


def test_a_copy_of_a_checkpointed_model_recomputes_with_its_own_image():
    model, context = small_gpt2(), VisualContext()
    inject(model, RoutingConfig(routing="mul", rank=4), context)
    randomise(model).train().activation_checkpointing_enable({"use_reentrant": True})
    ids = torch.tensor([[1, 2], [3, 4]])
    found = []
    with context.bind(torch.ones(2, 1, WIDTH)):
        loss = model(ids, labels=ids).loss
    loss.backward()
    for twin in (model, copy.deepcopy(model)):
        twin.zero_grad()
        own = next(module.context for module in twin.modules() if hasattr(module, "lora_A"))
        with own.bind(torch.ones(2, 1, WIDTH)):
            loss = twin(ids, labels=ids).loss
        loss.backward()
        found.append([p.grad for p in twin.parameters() if p.grad is not None])
    assert own is not context
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


class BindsItself(torch.nn.Module):
    """A layer that gets its image as an input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, v):
        with self.layer.context.bind(v):
            return self.layer(x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_has_the_image_as_an_input_and_never_in_it(strict):
    layer = RoutedLoRALinear(torch.nn.Linear(8, 8), 2, routing="mul", context=VisualContext())
    torch.nn.init.normal_(layer.lora_B)
    layer.requires_grad_(False)
    x, v = torch.randn(2, 3, 8), torch.randn(2, 1, 8)
    program = torch.export.export(BindsItself(layer), (x, v), strict=strict).module()
    torch.testing.assert_close(program(x, 2 * v), layer(x, 2 * v))
    with layer.context.bind(v), pytest.raises(Exception, match="write this one image into the program"):
        torch.export.export(layer, (x,), strict=strict)
