"""The image's own down-projection in layers and models: every form, every way an image is bound, widths, files."""

from __future__ import annotations

import copy

import pytest
import torch
from golden_cases import VARIANT_CASES, Tensors
from text_zoo import text_batch, text_model
from tiny import WIDTH, answerer, batch, captioner, randomise, small_gpt2, small_roberta
from torch import nn
from transformers.pytorch_utils import Conv1D

import routingvl
from routingvl import RoutingConfig, VisualContext, inject
from routingvl.bottlenecks import layers
from routingvl.bottlenecks.beside import RoutedLoRABeside
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.bottlenecks.inject import remove
from routingvl.config import ConfigError
from routingvl.kernels import ROUTINGS
from routingvl.kernels.image_code import JointImage
from routingvl.kernels.reference import reference_adapter

K, WIDE, RANK, ROWS, TOKENS = 8, 12, 3, 3, 4
OWN = {"image_projection": "own", "image_width": WIDE}
READING = [name for name, row in ROUTINGS.items() if row.uses_image]
KINDS = ["linear", "beside", "adapter"]


def drawn(layer: nn.Module) -> nn.Module:
    """In float64, every parameter random."""
    generator = torch.Generator().manual_seed(5)
    for parameter in layer.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def make(kind: str, routing: str, context: VisualContext | None = None, **options) -> layers.RoutedLayer:
    options = {"routing": routing, "context": context, **OWN, **options}
    if kind == "adapter":
        return drawn(layers.RoutedAdapter(K, RANK, **options))
    cls = layers.RoutedLoRALinear if kind == "linear" else RoutedLoRABeside
    return drawn(cls(nn.Linear(K, K), RANK, **options))


def some(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


FORMS = {
    "linear": lambda **o: layers.RoutedLoRALinear(nn.Linear(K, 9), RANK, **o),
    "beside": lambda **o: RoutedLoRABeside(nn.Linear(K, 9), RANK, **o),
    "slices": lambda **o: layers.RoutedLoRALinear(Conv1D(9, K), RANK, slices=[(0, 3), (6, 9)], **o),
    "even parts": lambda **o: layers.RoutedLoRALinear(nn.Linear(K, 9), RANK, parts=[(0, 2, 4), (1, 3, 8)], **o),
    "parts": lambda **o: layers.RoutedLoRALinear(nn.Linear(K, 9), RANK, parts=[(0, 2, 4, 5), (7,)], **o),
}
COLUMNS = {"slices": [(0, 1, 2), (6, 7, 8)], "even parts": [(0, 2, 4), (1, 3, 8)], "parts": [(0, 2, 4, 5), (7,)]}


@pytest.mark.parametrize("routing", READING)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_lora_is_the_formula(form, routing):
    layer = drawn(FORMS[form](routing=routing, alpha=6, **OWN))
    x, v = some(ROWS, TOKENS, K).requires_grad_(), some(ROWS, 1, WIDE, seed=2).requires_grad_()
    y = layer(x, v=v)
    base = getattr(layer, "base_layer", layer)
    weight = base.weight.t() if form == "slices" else base.weight
    z = layer.routing.route(x @ layer.lora_A.T, v @ layer.lora_A_image.T, False)
    want = nn.functional.linear(x, weight, base.bias)
    start = 0
    for group, columns in enumerate(COLUMNS.get(form, [range(9)])):
        up = layer.lora_B[start : start + len(columns)]
        start += len(columns)
        delta = 2 * z[..., group * RANK : (group + 1) * RANK] @ up.T
        want = want.index_add(-1, torch.tensor(list(columns)), delta)
    leaves = [x, v, layer.lora_A, layer.lora_A_image, layer.lora_B]
    dy = some(*y.shape, seed=3)
    torch.testing.assert_close(y, want)
    for got, expected in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy, allow_unused=True), strict=True
    ):
        torch.testing.assert_close(got, torch.zeros_like(got) if expected is None else expected)


@pytest.mark.parametrize("routing", READING)
def test_adapter_is_the_formula(routing):
    layer = make("adapter", routing)
    x, v = some(ROWS, TOKENS, K), some(ROWS, 1, WIDE, seed=2)
    down, own, up = layer.down_sampler, layer.image_down_sampler, layer.up_sampler
    want = reference_adapter(
        x, v, down.weight, down.bias, up.weight, up.bias, routing=routing, image_weight=own.weight, image_bias=own.bias
    )
    torch.testing.assert_close(layer(x, v=v), want)


def test_published_split_is_vllora_with_an_own_projection():
    """Its two steps down are one matrix: golden case e_split, to 1e-10."""
    case = VARIANT_CASES["e_split"]
    tensors, init = Tensors(case), case["init"]
    third = init["out_features"] // 3
    layer = layers.RoutedLoRALinear(
        Conv1D(init["out_features"], init["in_features"]), init["r"], routing="vllora", alpha=init["lora_alpha"],
        slices=[(0, third), (2 * third, 3 * third)], image_projection="own",
    ).double()  # fmt: skip
    text, image = (
        tensors[f"param/lora_A_{part}_up.weight"] @ tensors[f"param/lora_A_{part}.weight"] for part in ("text", "img")
    )
    with torch.no_grad():
        for parameter, value in (
            (layer.weight, 0), (layer.bias, 0), (layer.lora_A, text), (layer.lora_A_image, image),
            (layer.lora_B, tensors["param/lora_B"]),
        ):  # fmt: skip
            parameter.copy_(torch.as_tensor(value))
    x, v = (tensors[f"input/{name}"].requires_grad_() for name in ("x", "vis_feat"))
    y = layer(x, v=v)
    y.backward(tensors["input/cotangent"])
    for got, name in (
        (y, "output/y"), (x.grad, "grad_input/x"), (v.grad, "grad_input/vis_feat"), (layer.lora_B.grad, "grad/lora_B"),
    ):  # fmt: skip
        error = (got - tensors[name]).abs().max() / tensors[name].abs().max()
        assert error <= 1e-10, (name, error)


@pytest.mark.parametrize("decoding", [False, True])
@pytest.mark.parametrize("routing", ["mul", "expand", "vllora"])
@pytest.mark.parametrize("kind", KINDS)
def test_bound_images_of_several_tokens(kind, routing, decoding):
    context = VisualContext()
    layer = make(kind, routing, context)
    x, counts = some(ROWS, TOKENS, K), (2, 5, 1)
    padded = some(ROWS, 5, WIDE, seed=2)
    mask = torch.arange(5) < torch.tensor(counts)[:, None]
    with torch.set_grad_enabled(not decoding), context.bind(padded, mask=mask, decoding=decoding):
        got = layer(x), layer(x)
    for found in got:
        for row, count in enumerate(counts):
            own = padded[row, :count]
            own = own[None] if layer.routing.max_visual_tokens is None else own.mean(0)[None, None]
            torch.testing.assert_close(found[row], layer(x[row : row + 1], v=own)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ["mul", "vllora"])
def test_tokens_that_name_their_image_and_texts_without_one(kind, routing):
    context = VisualContext()
    layer = make(kind, routing, context)
    x, v = some(2, 5, K), some(3, 1, WIDE, seed=2)
    index = torch.tensor([[2, 2, 0, 0, -1], [1, 1, 0, 1, 2]])
    with context.bind(v, image_index=index, text_only="zero"):
        got = layer(x)
    zero = torch.zeros(1, 1, WIDE, dtype=torch.float64)
    for row in range(2):
        for token, image in enumerate(index[row].tolist()):
            alone = layer(x[row : row + 1, token : token + 1], v=zero if image < 0 else v[image : image + 1])
            torch.testing.assert_close(got[row, token], alone[0, 0])
    with context.bind(None, text_only="zero"):
        torch.testing.assert_close(layer(x), layer(x, v=zero.expand(2, 1, WIDE)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_while_decoding_follows_the_weight(kind):
    context = VisualContext()
    layer = make(kind, "mul", context)
    x, v = some(ROWS, TOKENS, K), some(ROWS, 1, WIDE, seed=2)
    own = layer.image_down_sampler.weight if kind == "adapter" else layer.lora_A_image
    with torch.no_grad(), context.bind(v, decoding=True):
        before = layer(x)
        own.mul_(2)
        after = layer(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, layer(x, v=v))


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_trains_every_weight(kind):
    layer = make(kind, "vllora", dropout=0.4).train()
    x, v = some(ROWS, TOKENS, K).requires_grad_(), some(ROWS, 2, WIDE, seed=2).requires_grad_()
    layer(x, v=v).square().sum().backward()
    trained = dict(layer.named_parameters())
    assert all(p.grad is not None and p.grad.any() for name, p in trained.items() if "lora" in name or "down" in name)
    assert v.grad.any()


def test_start_of_training():
    layer = layers.RoutedLoRALinear(nn.Linear(K, K), RANK, routing="mul", **OWN)
    assert layer.lora_A_image.shape == (RANK, WIDE)
    assert 0 < layer.lora_A_image.abs().max() <= WIDE**-0.5
    assert not layer.lora_B.any()
    assert "image 12 -> 3" in repr(layer)
    adapter = layers.RoutedAdapter(K, RANK, image_projection="own")
    assert adapter.image_down_sampler.weight.shape == (RANK, K)
    assert not adapter.image_down_sampler.bias.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_projection": "linear"}, "image_projection='linear' is not one of None and 'own' in a layer"),
        ({**OWN, "routing": "none"}, "image_projection='own' is for an image, which routing 'none' does not read"),
        ({"image_width": 4}, "image_width=4 is the width of an image_projection='own'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        layers.RoutedLoRALinear(nn.Linear(K, K), RANK, **options)


# ------------------------------------------------------------------------------------------------------ whole models

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
TEXTS = {captioner: small_gpt2, answerer: small_roberta}


def injected(method: str, routing: str = "mul", width: int | None = 20, **options):
    model, context = small_gpt2().eval(), VisualContext()
    config = RoutingConfig(rank=4, method=method, routing=routing, image_projection="own", **options)
    report = inject(model, config, context, image_width=width)
    return model, context, report


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_inject_takes_an_image_of_any_width_and_files_keep_it(method, tmp_path):
    model, context, report = injected(method)
    name = "lora_A_image" if method == "lora" else "image_down_sampler.weight"
    assert len([found for found in report.names if found.endswith(name)]) == 2
    assert not hasattr(model, "image_projections")
    randomise(model)
    images = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(2))
    with context.bind(images):
        logits = model(IDS).logits
    logits.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith(name))
    routingvl.save_adapter(model, tmp_path)
    fresh = small_gpt2().eval()
    routingvl.load_adapter(fresh, tmp_path)
    with routingvl.bind_image(fresh, images):
        torch.testing.assert_close(fresh(IDS).logits, logits, rtol=0, atol=0)
    shared = small_gpt2()
    inject(shared, RoutingConfig(rank=4, method=method, routing="mul"))
    with pytest.raises(CheckpointError, match="image_projection is 'own', this model was injected with None"):
        routingvl.load_adapter(shared, tmp_path)
    other, *_ = injected(method, width=16)
    with pytest.raises(CheckpointError, match="the image is 20 wide, this model was injected for 16"):
        routingvl.load_adapter(other, tmp_path)
    with (
        pytest.raises(ValueError, match="features are 16 wide, and the routed layers read 20"),
        context.bind(images[..., :16]),
    ):
        model(IDS)
    remove(model)
    assert not any("image" in found for found in model.state_dict())


@pytest.mark.parametrize("routing", ["expand", "vllora"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_alike_layers_have_their_image_projected_together(method, routing, monkeypatch):
    """By one call for all, with the gradients that each by itself has, also where a loss reaches the first only."""
    seen, apply = [], JointImage.apply
    monkeypatch.setattr(
        JointImage, "apply", lambda v, factors, *weights: seen.append(weights) or apply(v, factors, *weights)
    )
    model, context, _ = injected(method, routing)
    randomise(model.double(), 0.2)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    images = some(2, 1, 20, seed=2).requires_grad_()

    def gradients(depth: int):
        with context.bind(images):
            hidden = model(IDS, output_hidden_states=True).hidden_states[depth]
        return torch.autograd.grad(hidden.square().mean(), [images, *trained], allow_unused=True)

    together = [gradients(depth) for depth in (1, 2)]
    assert [len(weights) for weights in seen] == [2 * (3 if method == "lora" else 4)] * 2
    monkeypatch.setattr(layers.RoutedLayer, "takes", lambda self, v: False)
    apart = [gradients(depth) for depth in (1, 2)]
    assert len(seen) == 2
    for got, want in zip(together, apart, strict=True):
        for left, right in zip(got, want, strict=True):
            assert (left is None) == (right is None)
            if left is not None:
                assert (left - right).abs().max() <= 1e-10 * right.abs().max() + 1e-12  # some are 0 but for rounding


@pytest.mark.parametrize("settings", [{"image_projection": "own"}, {"routing": "attention", "heads": 1}])
def test_states_of_an_encoder_reach_inputs_of_any_width(settings):
    model = text_model("bart").eval()
    targets = [r".*decoder\..*fc2", r".*decoder\..*encoder_attn\.q_proj"]
    settings = {"routing": "vllora", "targets": targets, **settings}
    inject(model, RoutingConfig(rank=4, routed_by="encoder_tokens", **settings), image_width=20)
    randomise(model)
    found = {layer.in_features: layer.image_width for layer in model.modules() if isinstance(layer, layers.RoutedLoRA)}
    width = model.config.d_model
    assert found.keys() > {width}
    assert set(found.values()) == {width}
    model(**text_batch("bart")).loss.backward()
    own = {
        name: p.grad for name, p in model.named_parameters() if name.endswith(("lora_A_image", "two_step.image.weight"))
    }
    assert len(own) == 2 * model.config.decoder_layers
    assert all(grad.any() for grad in own.values())


def test_targets_of_every_width_read_one_image():
    model, context, _ = injected("lora", targets="all-linear")
    widths = {layer.in_features for layer in model.modules() if isinstance(layer, layers.RoutedLoRA)}
    assert len(widths) > 1
    with context.bind(torch.ones(2, 1, 20)):
        model(IDS)
    model, _, _ = injected("lora", width=None)
    assert model.routed_injections[0].image_width == WIDTH
    half = small_gpt2().bfloat16()
    inject(half, RoutingConfig(rank=4, image_projection="own"), image_width=20)
    assert {p.dtype for n, p in half.named_parameters() if n.endswith("lora_A_image")} == {torch.float32}


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("build", [captioner, answerer])
def test_ready_made_models_need_no_visual_projection(build, method, prefix, tmp_path):
    config = RoutingConfig(rank=4, method=method, routing="mul", image_projection="own")
    model = randomise(build(config, vit_width=16, visual_prefix=prefix)).eval()
    assert (model.visual_projection is not None) is prefix  # the token in front of the text is as wide as the text
    inputs = batch()
    model(**inputs).logits.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    own = "lora_A_image" if method == "lora" else "image_down_sampler.weight"
    assert all(grad.any() for name, grad in grads.items() if name.endswith(own))
    assert any(name.endswith(own) for name in grads)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, vision=copy.deepcopy(model.vit), text=TEXTS[build]())
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    if build is captioner:
        pixels = inputs["pixel_values"]
        tokens = model.generate(pixel_values=pixels, num_beams=2, max_new_tokens=3)
        assert torch.equal(tokens, again.generate(pixel_values=pixels, num_beams=2, max_new_tokens=3))


def test_config():
    assert RoutingConfig(image_projection="own").image_projection == "own"
    with pytest.raises(ConfigError, match="image_projection='owned' is not one of 'linear', 'own'"):
        RoutingConfig(image_projection="owned")
    with pytest.raises(ConfigError, match="projects the image, which routing 'none' does not read"):
        RoutingConfig(image_projection="own", routing="none")
