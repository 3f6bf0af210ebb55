"""What layers keep of the image while decoding: when, how long, and never for another image or other weights."""

import copy
import threading

import pytest
import torch
from tiny import WIDTH, batch, captioner, randomise, small_gpt2
from torch.func import functional_call

from routingvl import RoutingConfig, VisualContext, inject
from routingvl.bottlenecks import layers

METHODS = [{"method": "lora"}, {"method": "adapter"}]


@pytest.fixture
def projections(monkeypatch):
    """One entry per image projected to be kept: the features."""
    seen = []

    def noted(function):
        def project(v, *weights, **options):
            seen.append(v)
            return function(v, *weights, **options)

        return project

    for name in ("project_lora_image", "project_adapter_image"):
        monkeypatch.setattr(layers, name, noted(getattr(layers, name)))
    return seen


def routed_layer(context: VisualContext, method: str = "lora", **options) -> layers.RoutedLayer:
    """A layer of width 8 that adds something for every image."""
    torch.manual_seed(0)
    if method == "adapter":
        layer = layers.RoutedAdapter(8, 2, context=context, **options)
    else:
        layer = layers.RoutedLoRALinear(torch.nn.Linear(8, 8), 2, context=context, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


def operands(images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, 8, generator=generator), torch.randn(images, 1, 8, generator=generator)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("routing", "kind"), [("mul", "pooler"), ("vllora", "pooler"), ("vllora", "tokens")])
def test_generation_projects_once_per_layer(method, routing, kind, projections, monkeypatch):
    model = randomise(captioner(RoutingConfig(rank=4, routing=routing, **method), vision_features=kind), 0.2).eval()
    pixels = batch(2)["pixel_values"]
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    tokens = model.generate(pixel_values=pixels, **options)
    assert len(projections) == sum(isinstance(module, layers.RoutedLayer) for module in model.modules())
    bind = model.context.bind
    monkeypatch.setattr(model.context, "bind", lambda *args, decoding, **more: bind(*args, **more))
    assert torch.equal(model.generate(pixel_values=pixels, **options), tokens)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_kept_until_the_binding_ends(method, projections):
    context = VisualContext()
    layer = routed_layer(context, method, routing="mul")
    x, v = operands()
    with torch.no_grad():
        want = layer(x, v)
        with context.bind(v, decoding=True):
            assert torch.allclose(layer(x), want, atol=1e-6)
            with context.bind(v + 1, decoding=True):
                assert torch.allclose(layer(x), layer(x, v + 1), atol=1e-6)
            layer(x)
        assert len(projections) == 2  # one per binding
        with context.bind(v):
            layer(x)
        layer(x, v)
    assert len(projections) == 2


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("routing", ["mul", "expand", "vllora"])
def test_never_kept_while_gradients_are_recorded(method, routing, projections):
    context = VisualContext()
    layer = routed_layer(context, method, routing=routing)
    x, v = operands()
    found = []
    for decoding in (False, True):
        layer.zero_grad()
        with context.bind(v, decoding=decoding):
            with torch.no_grad():
                layer(x)  # what is kept here has no way back to the weights
            first, second = layer(x).square().mean(), layer(2 * x).square().mean()
            second.backward()
            first.backward()
        found.append([p.grad for p in layer.parameters() if p.grad is not None])
    assert len(found[0]) > 2
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))
    assert len(projections) == 1


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_dropout_draws_in_every_step(method, projections):
    context = VisualContext()
    layer = routed_layer(context, method, routing="add", dropout=0.5)
    x, v = operands()
    with torch.no_grad(), context.bind(v, decoding=True):
        assert not torch.equal(layer(x), layer(x))
        assert not projections
        layer.eval()
        assert torch.equal(layer(x), layer(x))
    assert len(projections) == 1


def changed_in_place(layer):
    layer.projection[0].mul_(2)


def loaded(layer):
    layer.load_state_dict({name: 2 * value for name, value in layer.state_dict().items()})


def new_data(layer):
    for parameter in layer.projection:
        parameter.data = 2 * parameter.data


def new_parameter(layer):
    name, parameter = next((n, p) for n, p in layer.named_parameters() if p is layer.projection[0])
    home, _, attribute = name.rpartition(".")
    setattr(layer.get_submodule(home), attribute, torch.nn.Parameter(2 * parameter))


@pytest.mark.parametrize("change", [changed_in_place, loaded, new_data, new_parameter])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_changed_weights_are_seen(method, change):
    context = VisualContext()
    layer = routed_layer(context, method, routing="vllora")
    x, v = operands()
    with torch.no_grad(), context.bind(v, decoding=True):
        before = layer(x)
        change(layer)
        after = layer(x)
        assert torch.allclose(after, layer(x, v), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after, before, rtol=1e-2)


def test_weights_of_one_call_are_its_own():
    context = VisualContext()
    layer = routed_layer(context, routing="mul")
    x, v = operands()
    others = {"lora_A": torch.randn_like(layer.lora_A)}
    with torch.no_grad(), context.bind(v, decoding=True):
        before = layer(x)
        other = functional_call(layer, others, (x,))
        assert torch.allclose(other, functional_call(layer, others, (x, v)), atol=1e-5)
        assert torch.equal(layer(x), before)
    assert not torch.allclose(other, before)


def test_weights_that_do_not_count_their_changes_are_projected_in_every_call():
    context = VisualContext()
    x, v = operands()
    with torch.inference_mode():
        layer = routed_layer(context, routing="mul")
        with context.bind(v, decoding=True):
            layer(x)
            layer.lora_A.mul_(2)
            assert torch.equal(layer(x), layer(x, v))


def test_threads_keep_their_own():
    context, barrier = VisualContext(), threading.Barrier(2)
    layer = routed_layer(context, routing="vllora")
    x, v = operands()
    images, found = (v, v + 1), {}

    def work(number: int) -> None:
        with torch.no_grad(), context.bind(images[number], decoding=True):
            for _ in range(3):
                barrier.wait()
                found[number] = layer(x)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, image in enumerate(images):
        assert torch.allclose(found[number], layer(x, image), rtol=1e-4, atol=1e-4)


def test_a_copy_made_while_decoding_keeps_nothing():
    context = VisualContext()
    model = small_gpt2().eval()
    inject(model, RoutingConfig(rank=4, routing="mul"), context)
    randomise(model)
    ids = torch.tensor([[1, 2]])
    with torch.no_grad(), context.bind(torch.ones(1, 1, WIDTH), decoding=True):
        want = model(ids).logits
        twin = copy.deepcopy(model)
        own = twin.transformer.h[0].attn.c_attn.context
        assert own is not context
        assert own is twin.transformer.h[1].attn.c_attn.context
        with own.bind(-torch.ones(1, 1, WIDTH), decoding=True):
            other = twin(ids).logits
        assert torch.equal(model(ids).logits, want)
    assert not torch.allclose(other, want)


def test_features_that_do_not_fit_are_the_layers_error():
    context = VisualContext()
    layer = routed_layer(context, routing="mul")
    with torch.no_grad(), context.bind(torch.randn(2, 1, 5), decoding=True), pytest.raises(ValueError, match="5 wide"):
        layer(torch.randn(2, 3, 8))
