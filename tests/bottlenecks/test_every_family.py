"""Every row of the table of families, on tiny random models: LoRA and adapters train, and see the image."""

import copy
import dataclasses
from pathlib import Path

import peft
import pytest
import torch
from text_zoo import LAYERS, TARGETS, generates, text_batch, text_model, vision_language_model
from tiny import WIDTH, randomise
from torch import nn

from routingvl import RoutingConfig, VisualContext, bind_image, inject, load_adapter, save_adapter
from routingvl.bottlenecks.families import FAMILIES, Family, Projection
from routingvl.bottlenecks.inject import SurgeryError, remove
from routingvl.bottlenecks.layers import RoutedAdapter, RoutedLayer, RoutedLoRA
from routingvl.bottlenecks.peft_format import export_peft, import_peft
from routingvl.bottlenecks.places import adapter_places, is_norm, lora_places, text_models

INSIDE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")  # language models that come in another only
POSITIONS = ("post_module", "pre_norm", "post_norm")
STACKS = ("bart", "mbart", "t5", "mt5")  # encoder, and decoder with cross-attention
# How many LoRAs a layer gets, and how many adapters behind and around: those with cross-attention have both kinds.
LORAS = {"gpt2": 1, "gpt_neox": 1, "deberta": 1, "modernbert": 1, "phi3": 1} | dict.fromkeys(STACKS, 2 + 4)
PLACES = {"opt": 1} | dict.fromkeys(STACKS, 2 + 3)


def images(rows: int = 3, tokens: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(9))


def logits(model: nn.Module, context: VisualContext, batch: dict, features: torch.Tensor) -> torch.Tensor:
    with context.bind(features), torch.no_grad():
        return model(**batch).logits


def check_learns(kind: str, **settings: object) -> None:
    """Inject, three steps, and look at what trains, what the image does, and what is left when all is taken out."""
    model, batch, features, context = text_model(kind), text_batch(kind), images(), VisualContext()
    plain = logits(model, context, batch, features)
    types = [type(module) for module in model.modules()]
    inject(model, RoutingConfig(routing="mul", rank=4, alpha=8, **settings), context)
    if settings.get("method") != "adapter":
        assert torch.equal(logits(model, context, batch, features), plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        with context.bind(features):
            loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(word in name for name in moved for word in ("classifier", "score", "pooler", "embed", "lm_head"))
    model.eval()
    randomise(model)
    seen = logits(model, context, batch, features)
    assert (seen - logits(model, context, batch, features.flip(0))).abs().max() > 1e-4
    one = {key: value[:1] for key, value in batch.items()}
    assert torch.allclose(logits(model, context, one, features[:1]), seen[:1], atol=1e-4)
    if generates(kind):
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        texts = []
        for cache in (True, False):
            with context.bind(features, decoding=True):
                texts.append(model.generate(**inputs, use_cache=cache, **options))
        assert torch.equal(*texts)
    remove(model)
    assert [type(module) for module in model.modules()] == types


def test_the_tests_and_the_page_know_every_row():
    assert sorted([*TARGETS, *INSIDE]) == sorted(FAMILIES)
    page = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| `")]
    assert table == rows(), "write these rows into docs/families.md"


def rows() -> list[str]:
    """The lines of the table in docs/families.md: families with the same names share one."""
    alike: dict[Family, list[str]] = {}
    for kind, family in FAMILIES.items():
        alike.setdefault(dataclasses.replace(family, model_type=""), []).append(f"`{kind}`")
    return [_row(", ".join(kinds), family) for family, kinds in alike.items()]


def _row(kinds: str, family: Family) -> str:
    loras = [f"`{p.name}`{_parts(p)}{_unrouted(p)}" for p in family.projections if p.default]
    cells = [kinds, f"`{family.layer}`", ", ".join(loras)]
    cells.append(", ".join(f"`{sublayer.output}`" for sublayer in family.sublayers))
    cells.append(", ".join(dict.fromkeys(f"`{sublayer.norm}`" for sublayer in family.sublayers)))
    cells.append("yes" if family.adapter_residual else "no")
    return f"| {' | '.join(cells)} |"


def _parts(projection: Projection) -> str:
    if projection.parts == 1:
        return ""
    return " (v)" if projection.adapted == (1,) else " (q, v)"


def _unrouted(projection: Projection) -> str:
    return " (no image)" if projection.unrouted else ""


@pytest.mark.parametrize("kind", TARGETS)
def test_lora_on_query_and_value(kind):
    model = text_model(kind)
    places = lora_places(model, RoutingConfig())
    assert len(places) == LAYERS * LORAS.get(kind, 2)
    first = lora_places(model, RoutingConfig(layers=(1,)))
    assert len(first) == len(places) // LAYERS
    check_learns(kind)


@pytest.mark.parametrize("kind", TARGETS)
def test_adapters_behind_sublayers(kind):
    assert len(adapter_places(text_model(kind), RoutingConfig(method="adapter"))) == LAYERS * PLACES.get(kind, 2)
    check_learns(kind, method="adapter")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TARGETS)
def test_several_visual_tokens_and_beams(kind):
    model, batch, features, context = text_model(kind), text_batch(kind), images(tokens=4), VisualContext()
    inject(model, RoutingConfig(routing="vllora", rank=4), context)
    randomise(model)
    seen = logits(model, context, batch, features)
    assert (seen - logits(model, context, batch, features.flip(0))).abs().max() > 1e-4
    if generates(kind):
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 3}
        texts = []
        for cache in (True, False):
            with context.bind(features, beams=None, decoding=True):
                texts.append(model.generate(**inputs, use_cache=cache, **options))
        assert torch.equal(*texts)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("gpt_neox", "phi3") else pytest.mark.slow) for kind in TARGETS]
)
def test_plain_lora_runs_in_peft_and_comes_back(kind, tmp_path):
    batch, context = text_batch(kind), VisualContext()
    model, again = text_model(kind), text_model(kind)
    for each in (model, again):
        inject(each, RoutingConfig(routing="none", rank=4, alpha=6), context)
    randomise(model)
    want = logits(model, context, batch, images())
    export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(text_model(kind), tmp_path).eval()
    assert (logits(theirs, context, batch, images()) - want).abs().max() < 1e-4 * want.abs().max()
    import_peft(again, tmp_path)
    assert torch.equal(logits(again, context, batch, images()), want)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("kind", TARGETS)
def test_saved_loaded_copied_and_in_half_precision(kind, method, tmp_path):
    batch, features, context = text_batch(kind), images(), VisualContext()
    config = RoutingConfig(routing="mul", rank=4, method=method)
    model, again, half = (text_model(kind) for _ in range(3))
    inject(model, config, context)
    randomise(model)
    want = logits(model, context, batch, features)
    save_adapter(model, tmp_path)
    load_adapter(again, tmp_path)
    copied = copy.deepcopy(model)
    for other in (again, copied):
        with bind_image(other, features), torch.no_grad():
            assert torch.equal(other(**batch).logits, want)
    inject(half.bfloat16(), config, context)
    with context.bind(features.bfloat16()):
        half(**batch).loss.backward()
    trained = [parameter for parameter in half.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in trained)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LoRA on")
@pytest.mark.parametrize("kind", TARGETS)
def test_every_projection_with_the_image_projected_to_its_width(kind):
    model, batch, context = text_model(kind), text_batch(kind), VisualContext()
    inject(model, RoutingConfig(rank=4, targets="all-linear", image_projection="linear"), context, image_width=24)
    features = torch.randn(3, 1, 24, generator=torch.Generator().manual_seed(9))
    randomise(model)
    seen = logits(model, context, batch, features)
    assert (seen - logits(model, context, batch, features.flip(0))).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("position", POSITIONS[1:])
@pytest.mark.parametrize("kind", TARGETS)
def test_adapters_around_norms(kind, position):
    check_learns(kind, method="adapter", position=position)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LoRA on")
@pytest.mark.parametrize("targets", ["explicit", "all-linear"])
@pytest.mark.parametrize("kind", TARGETS)
def test_lora_on_named_targets(kind, targets):
    if targets == "explicit":
        check_learns(kind, targets=TARGETS[kind])
        model, own = text_model(kind), text_model(kind)
        inject(model, RoutingConfig(rank=4, targets=TARGETS[kind]))
        inject(own, RoutingConfig(rank=4))
        assert [name for name, _ in model.named_modules()] == [name for name, _ in own.named_modules()]
    else:
        places = lora_places(text_model(kind), RoutingConfig(targets=("all-linear",), exclude=(".*norm.*",)))
        linear = [name for name, m in text_model(kind).named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
        inside = [name for name in linear if any(part.isdigit() for part in name.split("."))]
        assert [place.name for place in places] == inside


@pytest.mark.parametrize("kind", ["llama", "t5", "modernbert", "gemma3_text"])
def test_every_norm_inside_the_layers_trains(kind):
    model = text_model(kind)
    inject(model, RoutingConfig(rank=4))
    norms = {
        name for name, module in model.named_modules() if is_norm(module) and any(p.isdigit() for p in name.split("."))
    }
    assert {
        name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and "lora" not in name
    } == norms


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("kind", ["llama", "t5", "phi3", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_recomputation_gives_the_same_gradients(kind, method):
    gradients = []
    for recompute in (False, True):
        model, context = text_model(kind), VisualContext()
        inject(model, RoutingConfig(routing="mul", rank=4, method=method), context)
        randomise(model).train().double()  # what is left then is no rounding
        if recompute:
            model.gradient_checkpointing_enable()
        with context.bind(images().double()):
            loss = model(**text_batch(kind)).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name in plain:
        assert plain[name].any()
        assert (again[name] - plain[name]).abs().max() <= 1e-9 * plain[name].abs().max(), name


@pytest.mark.parametrize("kind", ["gpt_neox", "phi3", "modernbert"])
def test_fused_projections_change_query_and_value_alone(kind):
    model, context = text_model(kind), VisualContext()
    inject(model, RoutingConfig(rank=4, routing="add"), context)
    (layer, *_) = (module for module in model.modules() if isinstance(module, RoutedLoRA))
    x = torch.randn(3, 6, WIDTH)
    with context.bind(images()), torch.no_grad():
        plain = layer(x)
        nn.init.normal_(layer.lora_B)
        changed = (layer(x) != plain).any(dim=0).any(dim=0)
    want = {
        "phi3": [True] * 32 + [False] * 16 + [True] * 16,  # 4 heads of q, 2 of k, 2 of v
        "gpt_neox": [part != 1 for _ in range(4) for part in range(3) for _ in range(8)],  # q, k and v of each head
        "modernbert": [True] * 32 + [False] * 32 + [True] * 32,
    }[kind]
    assert changed.tolist() == want


def test_deberta_leaves_the_image_out_where_positions_pass():
    model, batch, context = text_model("deberta-v2"), text_batch("deberta-v2"), VisualContext()
    inject(model, RoutingConfig(rank=4, routing="mul"), context)
    routings = {
        name.rpartition(".")[2]: m.routing.name for name, m in model.named_modules() if isinstance(m, RoutedLayer)
    }
    assert routings == {"query_proj": "none", "value_proj": "mul"}
    with pytest.warns(UserWarning, match="query_proj.* leaves the image out"):
        inject(text_model("deberta-v2"), RoutingConfig(rank=4, targets=("query_proj", "key_proj")))
    apart = text_model("deberta-v2")
    apart.config.share_att_key = False
    assert not any(place.unrouted for place in lora_places(apart, RoutingConfig()))
    assert torch.equal(logits(model, context, batch, images()), text_model("deberta-v2")(**batch).logits)


VISION_LANGUAGE = {
    "llava": ("model.language_model.", 4),
    "paligemma": ("model.language_model.", 4),
    "qwen2_vl": ("model.language_model.", 4),
    "qwen2_5_vl": ("model.language_model.", 4),
    "qwen3_vl": ("model.language_model.", 4),
    "blip-2-opt": ("language_model.", 4),
    "blip-2-t5": ("language_model.", 12),
    "vit-gpt2": ("decoder.", 6),
    "vit-bert": ("decoder.", 8),
}


@pytest.mark.parametrize("kind", VISION_LANGUAGE)
def test_the_text_model_inside_another_is_found(kind):
    model, (prefix, count) = vision_language_model(kind), VISION_LANGUAGE[kind]
    assert [f"{name}." for name in text_models(model)] == [prefix]
    report = inject(model, RoutingConfig(rank=4))
    assert len(report.layers) == count
    assert all(name.startswith(prefix) for name in report.names)
    remove(model)
    adapters = inject(model, RoutingConfig(rank=4, method="adapter"))
    assert adapters.layers
    assert all(name.startswith(prefix) for name in adapters.names)


def test_a_vision_tower_is_left_alone_unless_named():
    def names(kind: str, target: str) -> list[str]:
        return [place.name for place in lora_places(vision_language_model(kind), RoutingConfig(targets=(target,)))]

    for target, count in (("q_proj", 2), ("all-linear", 14)):
        found = names("llava", target)
        assert len(found) == count
        assert all(name.startswith("model.language_model.") for name in found)
    towers = [f"model.vision_tower.encoder.layers.{n}.self_attn.q_proj" for n in range(2)]
    assert names("llava", r".*vision_tower.*\.q_proj") == towers
    assert names("llava", "lm_head") == ["lm_head"]
    config = RoutingConfig(targets=(".*vision_tower.*q_proj",), layers=(1,))
    assert [place.name for place in lora_places(vision_language_model("llava"), config)] == towers[1:]
    with pytest.raises(SurgeryError, match="match no projection"):
        names("blip-2-opt", "query")


def test_a_tower_beside_a_text_model_of_no_row_is_left_alone():
    class Stranger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision_model, self.texts = (nn.ModuleList([nn.ModuleDict({"q": nn.Linear(4, 4)})]) for _ in range(2))

    assert [place.name for place in lora_places(Stranger(), RoutingConfig(targets=("q",)))] == ["texts.0.q"]
    found = lora_places(Stranger(), RoutingConfig(targets=("vision_model.0.q",)))
    assert [place.name for place in found] == ["vision_model.0.q"]


def test_targets_and_exclude_by_pattern():
    def names(**options: object) -> list[str]:
        return [
            place.name.removeprefix("model.layers.")
            for place in lora_places(text_model("llama"), RoutingConfig(**options))
        ]

    assert names(targets=(r".*layers\.1.*\.[qk]_proj",)) == ["1.self_attn.q_proj", "1.self_attn.k_proj"]
    assert names(targets=("q_proj",), layers=(0,)) == ["0.self_attn.q_proj"]
    assert names(targets=("q_proj",), exclude=(r".*layers\.0.*",)) == ["1.self_attn.q_proj"]
    assert names(exclude=("v_proj",)) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]
    skipped = []
    lora_places(text_model("llama"), RoutingConfig(targets=("q_proj", "embed_tokens", "self_attn")), skipped)
    assert skipped == [("model.embed_tokens", "LoRA stands beside linear projections, not a Embedding")]


def test_a_shared_norm_has_one_adapter():
    model = text_model("phi")
    inject(model, RoutingConfig(method="adapter", rank=4, position="pre_norm"))
    assert len([module for module in model.modules() if isinstance(module, RoutedAdapter)]) == LAYERS
