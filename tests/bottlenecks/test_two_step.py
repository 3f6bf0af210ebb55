"""Two steps down and low-rank attention: the published numbers, every form of layer, masks, models, files, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from golden_cases import VARIANT_CASES, Tensors
from tiny import answerer, batch, captioner, randomise, small_gpt2, small_roberta
from torch import nn
from transformers.pytorch_utils import Conv1D

import routingvl
from routingvl import RoutingConfig, VisualContext, inject
from routingvl.bottlenecks import layers
from routingvl.bottlenecks.beside import RoutedLoRABeside
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.bottlenecks.inject import remove
from routingvl.bottlenecks.places import SurgeryError
from routingvl.config import ConfigError
from routingvl.kernels.attention import ATTENTION

K, WIDE, RANK, ROWS, TOKENS = 8, 12, 16, 3, 4
FORMS = {
    "before": {"two_step": "before", "routing": "vllora"},
    "after": {"two_step": "after", "routing": "vllora"},
    "residual": {"two_step": "residual", "routing": "vllora"},
    "before, mul": {"two_step": "before", "routing": "mul"},
    "attention": {"routing": "attention", "heads": 2},
}
KINDS = ["linear", "slices", "parts", "beside", "adapter"]
# The published names of the parameters of each variant, and ours.
NAMES = {
    "lora_B": "lora_B",
    "lora_A_text": "two_step.text",
    "lora_A_img": "two_step.image",
    "lora_A_text_up": "two_step.text_up",
    "lora_A_img_up": "two_step.image_up",
    "lora_A_up": "two_step.up",
    "layer_norm": "two_step.norm",
    "lora_A_text_query": "two_step.query",
    "lora_A_img_key": "two_step.key",
    "lora_A_img_value": "two_step.value",
    "lora_A_attn_out": "two_step.out",
    "lora_A_query_up": "two_step.up",
}
PUBLISHED = {
    "e_split": {"two_step": "before"},
    "e_enc_split": {"two_step": "before"},
    "e_split_merge": {"two_step": "after"},
    "e_split_merge_res": {"two_step": "residual"},
    "e_split_attn": {"routing": "attention"},
}


def ours(name: str) -> str:
    stem, dot, part = name.partition(".")
    return f"{NAMES[stem]}{dot}{part}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    """Outputs and gradients of the published variant, which is the bottleneck's output alone, to 1e-10."""
    case = VARIANT_CASES[name]
    tensors, init = Tensors(case), case["init"]
    options = {"routing": "vllora", "alpha": init["lora_alpha"], "relu": init.get("add_relu", False)} | PUBLISHED[name]
    if "heads" in init or "num_heads" in init:
        options["heads"] = init["num_heads"]
    widths, third = (init["in_features"], init["out_features"]), init["out_features"] // 3
    if "Merged" in case["class"]:
        base: nn.Module = Conv1D(*widths[::-1])
        options["slices"] = [(0, third), (2 * third, 3 * third)]
    else:
        base = nn.Linear(*widths)
    layer = layers.RoutedLoRALinear(base, init["r"], **options).double()
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    layer.weight.requires_grad_(False)
    layer.bias.requires_grad_(False)
    missing, unexpected = layer.load_state_dict(
        {ours(key): value for key, value in tensors.under("param").items()}, strict=False
    )
    assert sorted(missing) == ["bias", "weight"]
    assert not unexpected
    x, v = (tensors[f"input/{key}"].requires_grad_() for key in ("x", "vis_feat"))
    y = layer(x, v)
    loss = (y * tensors["input/cotangent"]).sum()
    loss.backward()
    assert loss.item() == pytest.approx(case["loss_value"], rel=1e-10)
    found = {"output/y": y, "grad_input/x": x.grad, "grad_input/vis_feat": v.grad}
    parameters = dict(layer.named_parameters())
    found |= {f"grad/{key}": parameters[ours(key)].grad for key in case["trainable"]}
    assert {ours(key) for key in case["trainable"]} == {key for key, p in parameters.items() if p.requires_grad}
    for key, value in found.items():
        # Of attention over one token, all that leads to its weights has a gradient of 0.
        error = (value - tensors[key]).abs().max() / tensors[key].abs().max().clamp_min(1e-300)
        assert error <= 1e-10, (key, error)


def drawn(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for parameter in layer.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2
    return layer


def make(kind: str, context: VisualContext | None = None, **options) -> layers.RoutedLayer:
    options = {"context": context, "image_width": WIDE, **options}
    if kind == "adapter":
        return drawn(layers.RoutedAdapter(K, RANK, **options))
    if kind == "beside":
        return drawn(RoutedLoRABeside(nn.Linear(K, 9), RANK, **options))
    places = {"slices": {"slices": [(0, 3), (6, 9)]}, "parts": {"parts": [(0, 2, 4, 5), (7,)]}}
    return drawn(layers.RoutedLoRALinear(nn.Linear(K, 9), RANK, **places.get(kind, {}), **options))


def some(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_the_formula(kind, form):
    layer = make(kind, **FORMS[form], **({} if kind == "adapter" else {"alpha": 2 * RANK}))
    x, v = some(ROWS, TOKENS, K), some(ROWS, 1, WIDE, seed=2)
    step = {name.removesuffix(".weight"): weight for name, weight in layer.two_step.named_parameters()}
    t, u = x @ step["text"].T, v @ step["image"].T
    route = (lambda t, u: t * u) if "mul" in form else (lambda t, u: (t @ u.mT) @ u)
    if form.startswith("before"):
        z = route(t @ step["text_up"].T, u @ step["image_up"].T)
    elif form == "attention":  # one visual token: its value, whatever the query is
        z = (u @ step["value"].T @ step["out"].T @ step["up"].T).expand(-1, TOKENS, -1)
    else:
        z = route(t, u)
        if form == "residual":
            z = nn.functional.layer_norm(z + t, z.shape[-1:], step["norm"], step["norm.bias"], 1e-5)
        z = z @ step["up"].T
    if kind == "adapter":
        up = layer.up_sampler
        want = x + nn.functional.gelu(z) @ up.weight.T + up.bias
    else:
        base = getattr(layer, "base_layer", layer)
        want, start = nn.functional.linear(x, base.weight, base.bias), 0
        columns = {"slices": [(0, 1, 2), (6, 7, 8)], "parts": [(0, 2, 4, 5), (7,)]}.get(kind, [range(9)])
        for group, of_group in enumerate(columns):
            up = layer.lora_B[start : start + len(of_group)]
            start += len(of_group)
            delta = 2 * z[..., group * RANK : (group + 1) * RANK] @ up.T
            want = want.index_add(-1, torch.tensor(list(of_group)), delta)
    torch.testing.assert_close(layer(x, v=v), want)


def test_attention_over_several_tokens_is_torchs():
    layer = make("linear", routing="attention", heads=2)
    x, v = some(ROWS, TOKENS, K), some(ROWS, 5, WIDE, seed=2)
    step = layer.two_step
    other = nn.MultiheadAttention(RANK // 4, 2, bias=False, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([step.query.weight, step.key.weight, step.value.weight]))
        other.out_proj.weight.copy_(step.out.weight)
    t, u = step.text(x), step.image(v)
    z = step.up(other(t, u, u, need_weights=False)[0])
    base = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x, v=v), base + z @ layer.lora_B.T)


@pytest.mark.parametrize("form", ["after", "residual", "before, mul", "attention"])
@pytest.mark.parametrize("kind", ["linear", "adapter"])
def test_bound_images(kind, form):
    """Padding is not read; beams, texts without an image and tokens that name theirs are as if alone."""
    context = VisualContext()
    layer = make(kind, context, **FORMS[form])
    x, padded, counts = some(ROWS, TOKENS, K), some(ROWS, 5, WIDE, seed=2), (2, 5, 0)
    mask = torch.arange(5) < torch.tensor(counts)[:, None]
    x.requires_grad_()
    with context.bind(padded, mask=mask, text_only="skip"):
        got = layer(x)
    base = x if kind == "adapter" else nn.functional.linear(x, layer.weight, layer.bias)
    for row, count in enumerate(counts[:2]):
        own = padded[row, :count]
        own = own[None] if layer.routing.max_visual_tokens is None else own.mean(0)[None, None]
        torch.testing.assert_close(got[row], layer(x[row : row + 1], v=own)[0])
    assert torch.equal(got[2], base[2])
    assert torch.autograd.grad(got.sum(), x)[0].isfinite().all()
    one = padded[:, :1]
    with torch.no_grad(), context.bind(one, beams=2, decoding=True):
        torch.testing.assert_close(layer(x.repeat_interleave(2, 0))[::2], layer(x, v=one))
    index = torch.tensor([[2, 2, 0, 1], [1, 1, 0, 1], [0, 2, 2, 2]])
    with context.bind(one, image_index=index):
        got = layer(x)
    for row in range(ROWS):
        for token in range(TOKENS):
            image = int(index[row, token])
            alone = layer(x[row : row + 1, token : token + 1], v=one[image : image + 1])
            torch.testing.assert_close(got[row, token], alone[0, 0])


@pytest.mark.parametrize("form", FORMS)
def test_copies_autocast_and_start(form):
    layer = layers.RoutedLoRALinear(nn.Linear(K, 9), RANK, **FORMS[form], image_width=WIDE)
    x, v = some(ROWS, TOKENS, K).float(), some(ROWS, 1, WIDE, seed=2).float()
    assert torch.equal(layer(x, v), nn.functional.linear(x, layer.weight, layer.bias))  # B is 0
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.routing is layer.routing
        assert torch.equal(copied(x, v), layer(x, v))
    layer = drawn(layer).float()
    want = layer(x, v)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x, v)
    torch.testing.assert_close(half.float(), want, rtol=0, atol=0.05 * want.abs().max().item())
    torch.testing.assert_close(layer(x.bfloat16(), v).float(), want, rtol=0, atol=0.05 * want.abs().max().item())
    layer.train().dropout = 0.5
    layer(x, v).square().sum().backward()
    trained = {name: p.grad for name, p in layer.named_parameters() if "two_step" in name or name == "lora_B"}
    unread = ("query", "key") if form == "attention" else ()  # of a single token
    assert all(grad is not None and grad.any() for name, grad in trained.items() if not any(n in name for n in unread))


BAD = [
    ({"two_step": "twice"}, "two_step='twice' is not one of None, 'before', 'after', 'residual'"),
    ({"two_step": "after", "routing": "none"}, "two_step='after' is for a routing function of the image, not 'none'"),
    ({"two_step": "after", "routing": "attention"}, "two_step='after' is for a routing function"),
    ({"two_step": "after", "placement": "output"}, "placement='output': two steps and attention are in the bottleneck"),
    ({"routing": "attention", "heads": 3}, "heads=3 must divide the width of attention, 4 at rank=16"),
    ({"two_step": "after", "rank": 3}, "rank=3: two steps go down to a quarter"),
    ({"two_step": "after", "routing": "mul", "tokens": 2}, "routing 'mul' takes 1 visual token per image, got L=2"),
    ({"routing": "attention", "v": (ROWS, 1, 5)}, r"v must have shape \[B, L, 8\]"),
]


@pytest.mark.parametrize(("options", "words"), BAD)
def test_bad_layers(options, words):
    rank, tokens, shape = options.pop("rank", RANK), options.pop("tokens", 1), options.pop("v", ())
    v = torch.ones(*(shape or (ROWS, tokens, K)))
    with pytest.raises(ValueError, match=words):
        layers.RoutedLoRALinear(nn.Linear(K, K), rank, **options)(torch.ones(ROWS, TOKENS, K), v)


# ------------------------------------------------------------------------------------------------------ whole models

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
SETTINGS = [{"two_step": "residual", "routing": "mul"}, {"routing": "attention", "heads": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["routing"])
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_injected_models_and_their_files(method, settings, tmp_path):
    model, context = small_gpt2().eval(), VisualContext()
    config = RoutingConfig(rank=8, method=method, **settings)
    report = inject(model, config, context, image_width=20, backend="eager")
    assert {layer.backend for layer in report.layers} == {"eager"}
    assert "no Triton kernel" in str(report)
    assert sum(".two_step." in name for name in report.names) > 4
    randomise(model)
    images = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(2))
    with context.bind(images):
        logits = model(IDS).logits
    logits.square().mean().backward()
    routingvl.save_adapter(model, tmp_path)
    fresh = small_gpt2().eval()
    routingvl.load_adapter(fresh, tmp_path)
    with routingvl.bind_image(fresh, images):
        torch.testing.assert_close(fresh(IDS).logits, logits, rtol=0, atol=0)
    other = small_gpt2()
    changed = {"heads": 1} if "heads" in settings else {"two_step": "after"}
    inject(other, RoutingConfig(rank=8, method=method, **{**settings, **changed}), image_width=20)
    (key,) = changed
    with pytest.raises(CheckpointError, match=f"{key} is {settings[key]!r}, this model was injected with"):
        routingvl.load_adapter(other, tmp_path)
    remove(model)
    assert not any("two_step" in name for name in model.state_dict())


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["routing"])
@pytest.mark.parametrize("build", [captioner, answerer])
def test_ready_made_models(build, settings, tmp_path):
    model = randomise(build(RoutingConfig(rank=8, **settings), vit_width=16, visual_prefix=False)).eval()
    assert model.visual_projection is None
    inputs = batch()
    model(**inputs).logits.square().mean().backward()
    model.save_pretrained(tmp_path)
    text = small_gpt2() if build is captioner else small_roberta()
    again = type(model).from_pretrained(tmp_path, vision=copy.deepcopy(model.vit), text=text)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    if build is captioner:
        options = {"pixel_values": inputs["pixel_values"], "num_beams": 2, "max_new_tokens": 3}
        assert torch.equal(model.generate(**options), again.generate(**options))


def test_attention_reads_all_tokens_of_an_image():
    model = randomise(captioner(RoutingConfig(rank=8, routing="attention", heads=1), vision_features="tokens")).eval()
    inputs = batch()
    features = model.encode_images(inputs.pop("pixel_values"))
    assert features.shape[1] > 1
    changed = features.clone()
    changed[:, -1] += 1
    got, other = (model(vision_features=f, **inputs).logits for f in (features, changed))
    assert not torch.allclose(got, other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"routing": "attend"}, "routing='attend' is not one of .*'attention'"),
        ({"routing": "attention", "relu": True}, "relu=True is defined for routing vllora, not for 'attention'"),
        ({"routing": "mul", "heads": 2}, "heads=2 is defined for routing='attention' only"),
        ({"routing": "attention", "two_step": "after"}, "attention has its own way down"),
        ({"routing": "none", "two_step": "after"}, "projects the image, which routing 'none' does not read"),
        ({"two_step": "after", "image_projection": "linear"}, "leave image_projection='linear' out"),
        ({"two_step": "after", "placement": "output"}, "placement='output' is not defined for it"),
        ({"routing": "attention", "rank_pattern": {"q": 2}}, "rank=2 must be at least 4"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ConfigError, match=words):
        RoutingConfig(**settings)


def test_heads_that_do_not_divide_are_an_error_of_the_place():
    with pytest.raises(SurgeryError, match=r"attn.c_attn: heads=3 must divide the width of attention, 4 at rank=8"):
        inject(small_gpt2(), RoutingConfig(rank=8, routing="attention", heads=3))
    assert RoutingConfig(routing="attention").function is ATTENTION
