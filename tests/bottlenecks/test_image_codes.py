"""The image projected beforehand: by the kernels' functions, and by a context for all layers of a model together."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import WIDTH, answerer, batch, captioner, randomise, small_gpt2
from tolerances import relative_rms

from routingvl import RoutingConfig, VisualContext, inject
from routingvl.bottlenecks import inject as surgery
from routingvl.bottlenecks import layers
from routingvl.kernels import (
    ROUTINGS,
    project_adapter_images,
    project_lora_images,
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
    ("add", False, 1),
    ("mul", False, 1),
    ("expand", False, 1),
    ("vllora", False, 1),
    ("vllora", True, 1),
    ("vllora", False, 7),
    ("vllora", True, 7),
]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float32).requires_grad_()


def gradients(output: torch.Tensor, leaves: list[torch.Tensor], retain_graph: bool = False) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), leaves, retain_graph=retain_graph)]


def assert_alike(got: list[torch.Tensor], want: list[torch.Tensor], limit: float = 3e-6) -> None:
    for left, right in zip(got, want, strict=True):
        assert relative_rms(left, right) < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_lora_with_images_of_several_layers(name, relu, tokens, beams, backend):
    torch.manual_seed(0)
    x, v = drawn(2 * beams, 5, 12), drawn(2, tokens, 12)
    weight, bias = drawn(24, 12), drawn(24)
    pairs = [(drawn(8, 12), drawn(16, 4)) for _ in range(3)]
    form = {"routing": name, "relu": relu, "groups": 2, "scaling": 0.7, "backend": backend}
    images = project_lora_images(v, [a for a, _ in pairs], [b for _, b in pairs], **form)
    for (a, b), image in zip(pairs, images, strict=True):
        leaves = [x, v, a, b]

        def layer(**more):
            return routed_lora_linear(x, v, weight, bias, a, b, columns=(0, 16), **form, **more)  # noqa: B023

        # retained: the three layers share one product
        found = gradients(layer(image=image), leaves, retain_graph=True)
        assert_alike(found, gradients(layer(), leaves))


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

    image = project_adapter_images(v, [down], [down_bias], routing=name, relu=relu)[0]
    want = gradients(adapter(operands=[x, v.repeat_interleave(beams, 0), *leaves[2:]]), leaves)
    assert_alike(gradients(adapter(image=image), leaves), want)
    assert_alike(gradients(adapter(), leaves), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relu", [False, True])
def test_decoding_with_the_matrix_of_inner_products(relu, backend):
    torch.manual_seed(0)
    x, v, a, b = torch.randn(6, 1, 12), torch.randn(2, 9, 12), torch.randn(4, 12), torch.randn(10, 4)
    form = {"routing": "vllora", "relu": relu, "backend": backend}
    image = project_lora_images(v, [a], [b], decoding=True, **form)[0]
    assert image.gram.shape == (2, 4, 4)
    assert image.gram.dtype == torch.float32
    weight = torch.randn(10, 12)
    got = routed_lora_linear(x, v, weight, None, a, b, image=image, **form)
    assert relative_rms(got, routed_lora_linear(x, v, weight, None, a, b, **form)) < 3e-6
    up, biases = torch.randn(12, 4), (torch.randn(4), torch.randn(12))
    image = project_adapter_images(v, [a], [biases[0]], routing="vllora", relu=relu, decoding=True)[0]
    assert image.gram is not None
    operands = (x, v, a, biases[0], up, biases[1])
    got = routed_adapter(*operands, image=image, **form)
    assert relative_rms(got, routed_adapter(*operands, **form)) < 3e-6


def test_nothing_to_prepare():
    v, a, b = torch.randn(2, 3, 12), [torch.randn(4, 12)], [torch.randn(10, 4)]
    assert project_lora_images(v, a, b, routing="none") is None
    assert project_lora_images(v, a, b, routing="vllora", placement="output") is None  # has no closed form
    assert project_adapter_images(v, a, None, routing="none") is None


def test_image_and_dropout_exclude_each_other():
    x, v, a, b, weight = (torch.randn(*shape) for shape in ((2, 3, 8), (2, 1, 8), (4, 8), (8, 4), (8, 8)))
    image = project_lora_images(v, [a], [b], routing="mul")[0]
    with pytest.raises(ValueError, match="image="):
        routed_lora_linear(x, v, weight, None, a, b, routing="mul", dropout=0.1, image=image)


def test_prepared_under_another_dtype_than_used():
    torch.manual_seed(0)
    x, v, a, b, weight = (torch.randn(*shape) for shape in ((2, 3, 8), (2, 1, 8), (4, 8), (8, 4), (8, 8)))
    image = project_lora_images(v, [a], [b], routing="vllora")[0]
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


# Through a context -------------------------------------------------------------------------------------------------

FORMS = [{"method": "lora"}, {"method": "adapter"}]


@pytest.fixture
def products(monkeypatch):
    """Counts products for the image: in a binding ("stacked": how many layers each served) and in layers ("single")."""
    counts = {"stacked": [], "single": 0}

    def counted(function):
        def project(v, weights, *args, **kwargs):
            counts["stacked"].append(len(weights))
            return function(v, weights, *args, **kwargs)

        return project

    def single(function):
        def project(*args, **kwargs):
            counts["single"] += 1
            return function(*args, **kwargs)

        return project

    functions = {"project_lora_image": routed_lora, "project_adapter_image": routed_adapter}
    for name, function in functions.items():
        home = sys.modules[function.__module__]
        monkeypatch.setattr(layers, f"{name}s", counted(getattr(layers, f"{name}s")))
        monkeypatch.setattr(home, name, single(getattr(home, name)))
    return counts


def step(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    output.logits.square().mean().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return [output.logits.detach(), torch.cat([grad.flatten() for grad in grads])]


@pytest.mark.parametrize("build", [captioner, answerer])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("routing", "kind"), [*((name, "pooler") for name in ROUTINGS), ("vllora", "tokens")])
def test_stacked_is_layer_by_layer(build, form, routing, kind, products):
    model = randomise(build(RoutingConfig(rank=4, routing=routing, **form), vision_features=kind)).double()
    inputs = batch()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    stacked = step(model, inputs)
    image = routing != "none"
    assert len(products["stacked"]) == int(image)
    assert products["single"] == 0
    model.context.stacked = False
    assert_alike(stacked, step(model, inputs), 1e-11)
    assert (products["single"] > 0) == image
    assert len(products["stacked"]) == int(image)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("routing", "kind"), [("mul", "pooler"), ("vllora", "pooler"), ("vllora", "tokens")])
def test_generation_projects_once_for_all_steps(form, routing, kind, products):
    model = randomise(captioner(RoutingConfig(rank=4, routing=routing, **form), vision_features=kind), 0.2).eval()
    pixels = batch(2)["pixel_values"]
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6}
    tokens = model.generate(pixel_values=pixels, **options)
    assert len(products["stacked"]) == 1
    assert products["single"] == 0
    model.context.stacked = False
    assert torch.equal(model.generate(pixel_values=pixels, **options), tokens)


def test_dropout_draws_a_mask_for_each_layer(products):
    model = randomise(captioner(RoutingConfig(rank=4, routing="add", dropout=0.3))).train()
    model(**batch())
    assert products["stacked"] == []
    assert products["single"] == 2
    model.eval()(**batch())
    assert products["stacked"] == [2]


def test_two_backward_passes_and_a_step_within_one_binding():
    def losses(stacked: bool) -> list[float]:
        context = VisualContext(stacked=stacked)
        model = small_gpt2().eval()
        inject(model, RoutingConfig(rank=4, routing="vllora"), context)
        randomise(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        found = []
        with context.bind(torch.ones(2, 1, WIDTH)):
            for _ in range(3):
                loss = model(torch.tensor([[1, 2], [3, 4]])).logits.square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


def test_bound_without_gradients_and_used_with_them():
    context = VisualContext()
    model = small_gpt2().eval()
    inject(model, RoutingConfig(rank=4, routing="expand"), context)
    randomise(model).double()
    found = []
    for grad_at_bind in (True, False):
        model.zero_grad()
        with torch.set_grad_enabled(grad_at_bind), context.bind(torch.ones(1, 1, WIDTH).double()), torch.enable_grad():
            model(torch.tensor([[1, 2]])).logits.square().mean().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert_alike(*found, 1e-5)


def test_copies_register_with_their_own_context_and_removal_forgets():
    context = VisualContext()
    model = small_gpt2()
    inject(model, RoutingConfig(rank=4, routing="mul"), context)
    assert len(context.readers) == 2
    twin = copy.deepcopy(model)
    own = twin.transformer.h[0].attn.c_attn.context
    assert own is not context
    assert own is twin.transformer.h[1].attn.c_attn.context
    assert {id(reader) for reader in own.readers} == {id(block.attn.c_attn) for block in twin.transformer.h}
    surgery.remove(model)
    assert context.readers == []
    assert len(own.readers) == 2


def test_layers_of_different_ranks_stand_in_products_of_their_own(products):
    context = VisualContext()
    wide, narrow, other = (
        layers.RoutedLoRALinear(torch.nn.Linear(WIDTH, WIDTH), rank, routing="mul", context=context)
        for rank in (8, 4, 8)
    )
    for layer in (wide, narrow, other):
        torch.nn.init.normal_(layer.lora_B)
        layer.register()
        layer.register()  # once more changes nothing
    x, v = torch.randn(2, 3, WIDTH), torch.randn(2, 1, WIDTH)
    with context.bind(v):
        got = [layer(x) for layer in (wide, narrow, other)]
    assert sorted(products["stacked"]) == [1, 2]
    for layer, y in zip((wide, narrow, other), got, strict=True):
        assert torch.allclose(y, layer(x, v.clone()), atol=1e-5)


def test_features_of_another_width_are_left_to_the_layer():
    context = VisualContext()
    layer = layers.RoutedLoRALinear(torch.nn.Linear(8, 8), 2, routing="mul", context=context)
    layer.register()
    with context.bind(torch.randn(2, 1, 5)), pytest.raises(ValueError, match="v must have shape"):
        layer(torch.randn(2, 3, 8))


def test_beams_are_counted():
    context = VisualContext()
    features = torch.randn(2, 1, 4)
    with context.bind(features, beams=3):
        assert context.read(torch.zeros(6, 1, 4)) is features
        with pytest.raises(ValueError, match="3 beams each, text has batch 2"):
            context.read(torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="beams=0"):
        context.bind(features, beams=0)


def test_nested_bindings_hand_out_their_own_images():
    context = VisualContext()
    layer = layers.RoutedLoRALinear(torch.nn.Linear(8, 8), 2, routing="mul", context=context)
    torch.nn.init.normal_(layer.lora_B)
    layer.register()
    x, first, second = torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    want = F.linear(x, layer.weight, layer.bias)
    with context.bind(first):
        before = layer(x)
        with context.bind(second):
            inner = layer(x)
        assert torch.equal(layer(x), before)
    assert torch.allclose(inner, layer(x, second), atol=1e-6)
    assert not torch.allclose(inner, before)
    assert not torch.allclose(before, want)
    assert layer.prepared.get() is None
