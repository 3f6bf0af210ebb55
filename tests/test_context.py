"""VisualContext: binding, reading, copies, threads, checkpointing."""

import copy
import pickle
import threading
import weakref

import pytest
import torch
from small_models import answerer, batch, captioner
from torch.utils.checkpoint import checkpoint

from routingvl import RoutingConfig, VisualContext


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


@pytest.mark.parametrize("build", [captioner, answerer])
def test_nothing_of_a_step_is_kept(build):
    """Neither the binding nor the graph of the image's codes, without a garbage collector."""
    model = build(RoutingConfig(rank=4, routing="mul")).train()
    made = []

    def remember(reader, *_):
        binding, code = reader.prepared.get()
        made.append((weakref.ref(binding), weakref.ref(code.u)))

    handle = model.context.readers[0].register_forward_hook(remember)
    for _ in range(3):
        model(**batch()).logits.square().mean().backward()
        model.zero_grad()
    handle.remove()
    assert len(made) == 3
    assert all(reference() is None for pair in made for reference in pair)


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
