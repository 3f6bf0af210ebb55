"""The image projected for all alike layers by one call: gradients, several passes, changes, copies, leaks."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from tiny import WIDTH, randomise, small_gpt2, small_roberta
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from routingvl import RoutingConfig, VisualContext, inject
from routingvl.bottlenecks import layers
from routingvl.bottlenecks.inject import remove
from routingvl.kernels.image_code import JointImage

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
MODELS = {"gpt2": small_gpt2, "roberta": small_roberta}
CASES = [
    (kind, method, routing) for kind in MODELS for method in ("lora", "adapter") for routing in ("expand", "vllora")
]


@pytest.fixture
def calls(monkeypatch):
    """One entry per joint call: how many layers it served."""
    seen = []
    apply = JointImage.apply

    def noted(v, factors, *weights):
        seen.append(len(weights) // 2)
        return apply(v, factors, *weights)

    monkeypatch.setattr(JointImage, "apply", noted)
    return seen


def routed(kind="gpt2", method="lora", routing="vllora", **options):
    torch.manual_seed(0)
    model, context = MODELS[kind]().double().eval(), VisualContext()
    inject(model, RoutingConfig(rank=4, alpha=10, method=method, routing=routing, **options), context)
    return randomise(model, 0.2), context


def image(seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids=IDS) -> torch.Tensor:
    return model(ids)[0].square().mean()


def each_by_itself(monkeypatch) -> None:
    monkeypatch.setattr(layers.RoutedLayer, "takes", lambda self, v: False)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def taken(model) -> dict[str, torch.Tensor]:
    """The gradients, which are then gone from the model."""
    found = gradients(model)
    model.zero_grad()
    return found


def assert_same(found, expected, tolerance: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=name)


def expected_gradients(model, context, features, monkeypatch, losses=loss_of):
    with monkeypatch.context() as patch:
        each_by_itself(patch)
        with context.bind(features):
            losses(model).backward()
    return taken(model)


@pytest.mark.parametrize(("kind", "method", "routing"), CASES)
def test_gradients_are_those_of_each_layer_by_itself(kind, method, routing, calls, monkeypatch):
    model, context = routed(kind, method, routing)
    features = image().requires_grad_()
    expected = expected_gradients(model, context, features, monkeypatch)
    expected["features"], features.grad = features.grad, None
    assert not calls
    with context.bind(features):
        loss_of(model).backward()
    assert calls == [sum(isinstance(module, layers.RoutedLayer) for module in model.modules())]
    assert_same({**gradients(model), "features": features.grad}, expected)


@pytest.mark.parametrize("options", [{"routing": "add"}, {"routing": "mul"}, {"relu": True}, {"placement": "output"}])
def test_what_does_not_gain_is_left_to_each_layer(options, calls):
    model, context = routed(**options)
    with context.bind(image()):
        loss_of(model).backward()
    with torch.no_grad(), context.bind(image()):
        model(IDS)
    assert not calls


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_backward_pass_for_each_of_two_losses(method, calls, monkeypatch):
    model, context = routed(method=method)
    both = lambda model: loss_of(model) + loss_of(model, IDS.flip(0))  # noqa: E731
    expected = expected_gradients(model, context, image(), monkeypatch, both)
    with context.bind(image()):
        one, two = loss_of(model), loss_of(model, IDS.flip(0))
    one.backward()
    two.backward()
    assert len(calls) == 1
    assert_same(gradients(model), expected)


def test_two_bindings_before_their_backward_passes(calls, monkeypatch):
    model, context = routed()
    expected = [expected_gradients(model, context, image(seed), monkeypatch) for seed in (1, 2)]
    losses = []
    for seed in (1, 2):
        with context.bind(image(seed)):
            losses.append(loss_of(model))
    for loss, gradient in zip(losses, expected, strict=True):
        loss.backward()
        assert_same(taken(model), gradient)
    assert len(calls) == 2


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_weights_changed_inside_a_binding(method, calls, monkeypatch):
    model, context = routed(method=method)
    changed, own = routed(method=method)
    first = next(module for module in changed.modules() if isinstance(module, layers.RoutedLayer))
    first.projection[0].data *= 2
    expected = expected_gradients(changed, own, image(), monkeypatch)
    with context.bind(image()):
        before = loss_of(model)
        first = next(module for module in model.modules() if isinstance(module, layers.RoutedLayer))
        with torch.no_grad():
            first.projection[0].mul_(2)
        after = loss_of(model)
    assert before.item() != after.item()
    assert len(calls) == 2
    after.backward()
    assert_same(gradients(model), expected)


def test_features_changed_between_forward_and_backward_are_an_error():
    model, context = routed()
    features = image()
    with context.bind(features):
        loss = loss_of(model)
        features.mul_(2)
        assert loss_of(model).item() != loss.item()  # seen by the next call
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def with_blocks_checkpointed(model, context, *, reentrant: bool) -> None:
    for block in model.transformer.h:
        forward, options = block.forward, {"use_reentrant": reentrant}
        if not reentrant:
            options["context_fn"] = lambda: context.checkpoint_context_fn()
        block.forward = lambda *args, f=forward, o=options, **more: checkpoint(f, *args, **o, **more)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_recomputation_reads_what_its_forward_read(method, calls, monkeypatch):
    model, context = routed(method=method)
    expected = expected_gradients(model, context, image(), monkeypatch)
    with_blocks_checkpointed(model, context, reentrant=False)
    with context.bind(image()):
        loss = loss_of(model)
    with context.bind(image(9)):
        loss.backward()
    assert len(calls) == 1
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_checkpointing_of_transformers_inside_the_block(method, reentrant, calls, monkeypatch):
    model, context = routed(method=method)
    model.train()
    model.enable_input_require_grads()
    expected = expected_gradients(model, context, image(), monkeypatch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with context.bind(image()):
        loss_of(model).backward()
    assert len(calls) == 1
    assert_same(gradients(model), expected)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_nothing_made_without_gradients_is_used_with_them(method, calls, monkeypatch):
    model, context = routed(method=method)
    expected = expected_gradients(model, context, image(), monkeypatch)
    for decoding in (False, True):
        with context.bind(image(), decoding=decoding):
            with torch.no_grad():
                model(IDS)
            loss_of(model).backward()
        assert_same(taken(model), expected)
    assert len(calls) == 2


def test_saved_tensor_hooks_see_nothing_of_it():
    model, context = routed()
    first = next(module for module in model.modules() if isinstance(module, layers.RoutedLayer))
    seen = []
    with context.bind(image()), torch.autograd.graph.saved_tensors_hooks(seen.append, lambda x: x):
        assert context.image_code(first, first.projection).factors[0].requires_grad
    assert not seen


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_frozen_layer_gets_no_gradient(method, monkeypatch):
    model, context = routed(method=method)
    first = next(module for module in model.modules() if isinstance(module, layers.RoutedLayer))
    with context.bind(image()):
        loss_of(model).backward()
    everything = taken(model)
    for weight in first.projection:
        weight.requires_grad_(False)
    with context.bind(image()):
        loss_of(model).backward()
    found = gradients(model)
    assert len(everything) - len(found) == 2
    assert all(torch.allclose(found[name], everything[name], rtol=1e-12, atol=1e-14) for name in found)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_layers_projected(again, calls, monkeypatch):
    model, context = routed()
    expected = expected_gradients(model, context, image(), monkeypatch)
    twin = again(model)
    own = next(module.context for module in twin.modules() if isinstance(module, layers.RoutedLayer))
    assert own is not context
    with own.bind(image()):
        loss_of(twin).backward()
    assert calls == [2]
    assert not gradients(model)
    assert_same(gradients(twin), expected)


def test_removed_layers_are_not_projected(calls):
    model, context = routed()
    remove(model)
    gc.collect()
    inject(model, RoutingConfig(rank=4, routing="expand"), context)
    with context.bind(image()):
        loss_of(model).backward()
    assert calls == [2]


def test_a_layer_with_dropout_projects_what_it_dropped(calls, monkeypatch):
    model, context = routed("roberta")
    drawing, *others = (module for module in model.modules() if isinstance(module, layers.RoutedLayer))
    drawing.dropout = 0.5
    drawing.train()
    found = []
    for alone in (True, False):
        torch.manual_seed(5)
        if alone:
            found.append(expected_gradients(model, context, image(), monkeypatch))
        else:
            with context.bind(image()):
                loss_of(model).backward()
            found.append(gradients(model))
    assert calls == [len(others)]
    assert_same(*found)


def test_weights_of_one_call(calls):
    model, context = routed()
    others = {name: 2 * value.detach() for name, value in model.named_parameters() if "lora" in name}
    with context.bind(image()):
        before = model(IDS)[0]
        replaced = functional_call(model, others, (IDS,))[0]
        after = model(IDS)[0]
    with context.bind(image()):
        again = functional_call(model, others, (IDS,))[0]
    assert torch.equal(before, after)
    assert not torch.allclose(before, replaced)
    torch.testing.assert_close(replaced, again, rtol=1e-12, atol=1e-12)


def test_transforms_of_torch_func(calls, monkeypatch):
    model, context = routed()
    expected = expected_gradients(model, context, image(), monkeypatch)
    weights = {name: p.detach() for name, p in model.named_parameters() if name in expected}
    with context.bind(image()):
        found = torch.func.grad(lambda w: functional_call(model, w, (IDS,))[0].square().mean())(weights)
    assert not calls
    assert_same(found, expected)


def test_autocast(monkeypatch):
    model, context = routed()
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = expected_gradients(model, context, image().float(), monkeypatch)
        with context.bind(image().float()):
            loss_of(model).backward()
    found = gradients(model)
    assert_same(found, expected, 2e-2)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_threads_make_their_own(monkeypatch):
    model, context = routed()
    parameters = [p for p in model.parameters() if p.requires_grad]
    barrier, found = threading.Barrier(2), {}

    def work(seed: int) -> None:
        with context.bind(image(seed)):
            for _ in range(3):
                barrier.wait()
                found[seed] = torch.autograd.grad(loss_of(model), parameters)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    each_by_itself(monkeypatch)
    for seed in (1, 2):
        with context.bind(image(seed)):
            expected = torch.autograd.grad(loss_of(model), parameters)
        for left, right in zip(found[seed], expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_steps_leave_no_features_and_no_graph_behind(checkpointed):
    model, context = routed()
    if checkpointed:
        with_blocks_checkpointed(model, context, reentrant=False)
    gc.collect()
    gc.disable()  # nothing waits for the garbage collector
    try:
        alive = []
        for seed in range(200):
            features = image(seed)
            with context.bind(features):
                loss = loss_of(model)
                first = next(module for module in model.modules() if isinstance(module, layers.RoutedLayer))
                factor = context.image_code(first, first.projection).factors[0]
            loss.backward()
            alive += [weakref.ref(features), weakref.ref(factor)]
            del features, factor, loss
        living = sum(reference() is not None for reference in alive)
    finally:
        gc.enable()
    assert living == 0
