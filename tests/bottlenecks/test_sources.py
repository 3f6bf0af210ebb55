"""Bottlenecks that are routed by something else than the image: their own text, or an encoder's states."""

import copy
import io
import json
import re

import pytest
import torch
from text_zoo import BART, GROUPED, T5, text_batch, text_model, vision_language_model
from tiny import WIDTH, captioner
from torch import nn
from transformers import (
    BlipTextConfig,
    NllbMoeConfig,
    NllbMoeModel,
    ProphetNetConfig,
    ProphetNetModel,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

import routingvl
from routingvl import RoutingConfig, inject
from routingvl.bottlenecks import layers
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.bottlenecks.inject import remove
from routingvl.bottlenecks.layers import RoutedAdapter, RoutedLayer, RoutedLoRALinear
from routingvl.bottlenecks.places import SurgeryError
from routingvl.bottlenecks.rows import BindingError
from routingvl.config import ConfigError

METHODS = [{"method": "lora"}, {"method": "adapter"}]
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])
FEATURES = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(5))


def routed(kind: str, routed_by: str, routing: str = "vllora", spread: float = 0.3, **settings) -> nn.Module:
    """A tiny model with bottlenecks of rank 4 that add something."""
    model = vision_language_model(kind) if kind.startswith("vit-") else text_model(kind)
    inject(model, RoutingConfig(routing=routing, routed_by=routed_by, rank=4, alpha=4, **settings))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for module in routed_layers(model).values():
            own = [module.lora_B] if isinstance(module, RoutedLoRALinear) else [module.up_sampler.weight]
            for weight in [*own, *([module.down_sampler.bias] if isinstance(module, RoutedAdapter) else [])]:
                weight.normal_(std=spread, generator=generator)
    return model.eval()


def routed_layers(model: nn.Module, part: str = "") -> dict[str, RoutedLayer]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}
    return {name: module for name, module in found.items() if part in name}


def masked_batch(kind: str) -> dict[str, torch.Tensor]:
    return text_batch(kind) | {"attention_mask": MASK}


def calls_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """(layer, its input, its output) of each call of a bottleneck in a forward pass."""
    seen, handles = [], []
    for layer in routed_layers(model).values():
        note = lambda module, args, output: seen.append((module, args[0], output))  # noqa: E731
        handles.append(layer.register_forward_hook(note))
    with torch.no_grad(), routingvl.bind_image(model, FEATURES) if needs_image(model) else torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def needs_image(model: nn.Module) -> bool:
    return any(layer.reads_image for layer in routed_layers(model).values())


def mean_of(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[real.bool()].mean(0, keepdim=True) for row, real in zip(states, mask, strict=True)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("kind", "routing"), [("bart", "vllora"), ("t5", "mul")])
def test_a_decoder_is_routed_by_the_mean_of_its_encoders_states(kind, routing, method):
    model, batch = routed(kind, "encoder", routing, **method), masked_batch(kind)
    states = model.get_encoder()
    keep = {}
    handle = states.register_forward_hook(lambda module, args, output: keep.update(states=output[0]))
    calls = calls_of(model, batch)
    handle.remove()
    by = {id(layer): layer.routed_by for layer in routed_layers(model, "decoder").values()}
    assert set(by.values()) == {"encoder"}
    assert {layer.routed_by for layer in routed_layers(model, "encoder.").values()} == {"image"}
    v = mean_of(keep["states"], MASK)
    for layer, x, y in calls:
        torch.testing.assert_close(y, layer(x, v if id(layer) in by else FEATURES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_is_routed_by_all_of_its_encoders_states(method):
    model, batch = routed("bart", "encoder_tokens", **method), masked_batch("bart")
    keep = {}
    handle = model.get_encoder().register_forward_hook(lambda module, args, output: keep.update(states=output[0]))
    calls = calls_of(model, batch)
    handle.remove()
    checked = 0
    for layer, x, y in calls:
        for row in range(3) if layer.routed_by != "image" else ():
            states = keep["states"][row : row + 1, MASK[row].bool()]
            torch.testing.assert_close(y[row : row + 1], layer(x[row : row + 1], states), rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked == 3 * len(routed_layers(model, "decoder"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["roberta", "deberta-v2"])
@pytest.mark.parametrize(("routed_by", "routing"), [("text", "vllora"), ("text", "add"), ("text_tokens", "vllora")])
def test_an_encoder_is_routed_by_its_own_text(kind, routed_by, routing, method):
    model, batch = routed(kind, routed_by, routing, **method), masked_batch(kind)
    for layer, x, y in calls_of(model, batch):
        if layer.routing.name == "none":
            continue
        for row in range(3):
            one = x[row : row + 1]
            own = one[:, MASK[row].bool()]
            v = own if routed_by == "text_tokens" else own.mean(1, keepdim=True)
            torch.testing.assert_close(y[row : row + 1], layer(one, v), rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing():
    for routed_by in ("text", "text_tokens"):
        model, batch = routed("roberta", routed_by), masked_batch("roberta")
        alone = {key: value[1:2] for key, value in batch.items()}
        short = {"input_ids": alone["input_ids"][:, :4]}  # without a mask all positions count
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits[1:2], model(**short).logits)


@pytest.mark.parametrize("kind", ["bart", "t5", "vit-gpt2"])
@pytest.mark.parametrize("routed_by", ["encoder", "encoder_tokens"])
def test_generation_projects_the_states_once(kind, routed_by, monkeypatch):
    """With a cache the layers make of the states once what they need, beams too, and write the same text."""
    model = routed(kind, routed_by, spread=0.1)
    seen, project = [], layers.project_lora_image
    monkeypatch.setattr(layers, "project_lora_image", lambda *args, **more: seen.append(1) or project(*args, **more))
    given = {"pixel_values": torch.randn(3, 3, 16, 16)} if kind.startswith("vit") else masked_batch(kind)
    given.pop("labels", None)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "bos_token_id": 1}
    options |= {"decoder_start_token_id": 1}
    for beams in (1, 3):
        seen.clear()
        with routingvl.bind_image(model, FEATURES, decoding=True) if needs_image(model) else torch.no_grad():
            tokens = model.generate(**given, num_beams=beams, **options)
            assert len(seen) == len(routed_layers(model))
            assert torch.equal(model.generate(**given, num_beams=beams, use_cache=False, **options), tokens)
    told = next(iter(routed_layers(model, "decoder").values())).context
    assert told.source == "encoder"
    assert not told.is_bound


@pytest.mark.parametrize("routed_by", ["encoder", "encoder_tokens"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_are_the_same_with_checkpointing(reentrant, routed_by):
    batch = masked_batch("bart")

    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        model.train()
        with routingvl.bind_image(model, FEATURES):
            model(**batch).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want = gradients(routed("bart", routed_by))
    model = routed("bart", routed_by)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model)
    assert found.keys() >= want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    assert any("encoder.layers.0" in name for name in want)


@pytest.mark.parametrize("routed_by", ["text", "text_tokens", "encoder", "encoder_tokens"])
def test_gradients_are_those_of_finite_differences(routed_by):
    """Through the text, or the encoder's states, too."""
    kind = "roberta" if routed_by.startswith("text") else "bart"
    model = routed(kind, routed_by).double()
    batch = masked_batch(kind)
    words = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    if kind == "bart":
        batch["decoder_input_ids"] = batch["labels"].clone()

    def loss(scale: torch.Tensor) -> torch.Tensor:
        with routingvl.bind_image(model, FEATURES.double()) if kind == "bart" else torch.enable_grad():
            return model(inputs_embeds=words * scale, **batch).loss

    scale = torch.rand(3, 1, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    scale.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(scale), scale)
    with torch.no_grad():
        direction = torch.randn(scale.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        difference = (loss(scale + 1e-6 * direction) - loss(scale - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "routed_by", "message"),
    [
        ("gpt2", "text", "h.0.attn.c_attn is in a causal model, where a token must not see those behind it"),
        ("llama", "text_tokens", "is in a causal model"),
        ("bart", "text", "model.decoder.layers.0.self_attn.* is in a causal model"),
        ("roberta", "encoder", "is for decoders that read an encoder's states.*none of the targets is in one"),
        ("llama", "encoder", "none of the targets is in one"),
    ],
)
def test_what_is_not_defined_is_refused_and_leaves_the_model(kind, routed_by, message):
    model = text_model(kind)
    before = {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()}
    with pytest.raises(SurgeryError, match=message):
        inject(model, RoutingConfig(routing="vllora", routed_by=routed_by, rank=4))
    assert {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()} == before
    assert not routed_layers(model)


@pytest.mark.parametrize("routed_by", ["encoder", "encoder_tokens"])
@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bart", {"targets": "fc2"}, r"decoder\.layers\.0\.fc2 takes 48 features and the encoder's states have 32"),
        (
            "bart",
            {"targets": "fc2", "image_projection": "linear"},
            "name targets that take 32 .*image_projection='own'",
        ),
        ("wide-t5", {"targets": r".*EncDecAttention\.o"}, "EncDecAttention.o takes 48 .* states have 32"),
        ("blip", {"targets": r".*\.query"}, r"layer\.0\.attention\.self\.query takes 32 .* states have 24"),
    ],
)
def test_states_of_another_width_are_refused_where_they_are_known(kind, settings, message, routed_by):
    """Not only at the first call; with a down-projection of their own they are read, whatever the widths."""
    build = {"bart": lambda: text_model("bart"), "wide-t5": t5_of_wide_heads, "blip": reader_of_narrow_states}[kind]
    model, settings = build(), {"routing": "vllora", "routed_by": routed_by, "rank": 4, **settings}
    with pytest.raises(SurgeryError, match=f"routed_by='{routed_by}': .*{message}"):
        inject(model, RoutingConfig(**settings))
    assert not routed_layers(model)
    inject(model, RoutingConfig(**settings | {"image_projection": "own"}))
    widths = {layer.image_width for layer in routed_layers(model).values() if layer.routed_by == routed_by}
    assert widths == {24 if kind == "blip" else WIDTH}
    states = {"encoder_hidden_states": torch.randn(3, 5, 24)} if kind == "blip" else {}
    with routingvl.bind_image(model, torch.randn(3, 1, 48)) if needs_image(model) else torch.no_grad():
        batch = text_batch("bart") if kind != "blip" else {"input_ids": text_batch("bart")["input_ids"]}
        model(**batch, **states)


def t5_of_wide_heads() -> nn.Module:
    """A T5 whose heads together are wider than its states."""
    return T5ForConditionalGeneration(T5Config(**T5 | {"d_kv": 12})).eval()


def reader_of_narrow_states() -> nn.Module:
    """A decoder of a kind that the table has no row for, which reads states of another width than its own."""
    shape = {"hidden_size": WIDTH, "encoder_hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BlipTextLMHeadModel(BlipTextConfig(vocab_size=64, intermediate_size=48, **shape)).eval()


def test_what_reads_the_states_takes_them_as_they_are():
    model = reader_of_narrow_states()
    settings = {"routing": "mul", "routed_by": "encoder", "targets": r".*crossattention\.self\.(key|value)"}
    inject(model, RoutingConfig(rank=4, **settings))
    layers = routed_layers(model)
    assert {layer.in_features for layer in layers.values()} == {24}
    model(input_ids=torch.ones(2, 3, dtype=torch.long), encoder_hidden_states=torch.randn(2, 5, 24))


@pytest.mark.parametrize("kind", ["prophetnet", "t5gemma", "nllb_moe"])
def test_decoders_of_kinds_without_a_row(kind):
    """What reads an encoder's states there is known by its name."""
    model = decoders_without_a_row(kind)
    inject(
        model, RoutingConfig(rank=4, routing="mul", routed_by="encoder", targets=r".*cross_att\w*\.(q_proj|query_proj)")
    )
    assert {layer.routed_by for layer in routed_layers(model).values()} == {"encoder"}
    ids = torch.full((2, 3), 4)
    model(input_ids=ids, decoder_input_ids=ids)


def decoders_without_a_row(kind: str) -> nn.Module:
    if kind == "prophetnet":
        sizes = {f"num_{stack}_{what}": 1 for stack in ("encoder", "decoder") for what in ("layers", "attention_heads")}
        shape = {"hidden_size": WIDTH, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
        return ProphetNetModel(ProphetNetConfig(vocab_size=64, **sizes, **shape)).eval()
    if kind == "nllb_moe":
        return NllbMoeModel(NllbMoeConfig(**BART | {"num_experts": 2, "encoder_layers": 1, "decoder_layers": 1})).eval()
    shape = GROUPED | {"num_hidden_layers": 1, "query_pre_attn_scalar": 8}
    return T5GemmaModel(T5GemmaConfig(encoder=shape, decoder=shape, vocab_size=64)).eval()


def test_encoders_inside_an_encoder_decoder_can_be_routed_by_text():
    model = routed("bart", "text", targets=(r".*\.encoder\.layers.*[qv]_proj",))
    assert all(name.startswith("model.encoder.") for name in routed_layers(model))
    with torch.no_grad():
        model(**masked_batch("bart"))


def test_a_model_of_an_unknown_kind_is_refused():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(8, 8)

        def forward(self, x, attention_mask=None):
            return self.query(x)

    config = RoutingConfig(routing="vllora", routed_by="text", rank=2, targets=("query",))
    with pytest.raises(SurgeryError, match=r"not known whether Reader.* lets every token of a text see every other"):
        inject(Reader(), config)
    with pytest.raises(SurgeryError, match="no module above query takes attention_mask="):
        inject(nn.ModuleDict({"query": nn.Linear(8, 8)}), config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"routed_by": "texts"}, "routed_by='texts'"),
        ({"routing": "none", "routed_by": "text"}, "routed_by='text': routing 'none' is routed by nothing"),
        ({"routing": "mul", "routed_by": "text_tokens"}, "gives several tokens and routing 'mul' takes one.*'text'"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ConfigError, match=message):
        RoutingConfig(**settings)


def test_other_places_and_other_masks_are_errors():
    model, batch = routed("roberta", "text"), masked_batch("roberta")
    (layer, x, _), *_ = calls_of(model, batch)
    with pytest.raises(RuntimeError, match="ran outside of the model whose attention_mask"):
        layer(x)
    with pytest.raises(ValueError, match=r"attention_mask \[3, 1, 6, 6\] must be \[texts, positions\]"):
        model(batch["input_ids"], attention_mask=(MASK[:, None] * MASK[:, :, None])[:, None].bool())
    with pytest.raises(RuntimeError, match="ran outside of the model"):  # nothing is left bound by the failed call
        layer(x)
    decoder = routed("bart", "encoder").get_decoder()
    with pytest.raises(RuntimeError, match="its decoder with encoder_hidden_states="):
        decoder(input_ids=batch["input_ids"])


def test_a_layer_alone_reads_all_of_its_text():
    layer = RoutedLoRALinear(nn.Linear(8, 8), 2, routing="vllora", routed_by="text")
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(layer(x), layer(x, x.mean(1, keepdim=True)))
    with pytest.raises(ValueError, match=r"routed_by='text' is for text \[B, T, K\], and the layer was given \[5, 8\]"):
        layer(x[0])
    with pytest.raises(ConfigError, match="routed_by='words'"):
        RoutedLoRALinear(nn.Linear(8, 8), 2, routed_by="words")
    assert "routed_by=text" in repr(layer)
    assert "routed_by" not in repr(RoutedLoRALinear(nn.Linear(8, 8), 2))


def test_no_image_is_bound_where_none_is_read():
    model = routed("roberta", "text")
    message = "are routed by text and read no image: call it without"
    with pytest.raises(BindingError, match=message), routingvl.bind_image(model, FEATURES):
        pass


def test_the_base_model_reads_the_mask_it_is_given():
    model, batch = routed("bert", "text"), masked_batch("bert")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        alone = model.base_model(**inputs).last_hidden_state
        whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(alone, whole)


def test_a_mask_that_says_nothing_of_padding_is_an_error_of_those_who_read_it():
    model, ids = routed("bert", "text"), masked_batch("bert")["input_ids"]
    mask = torch.ones(3, 1, 6, 6)
    with torch.no_grad(), routingvl.disable(model):
        model(ids, attention_mask=mask)
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask \[3, 1, 6, 6\] must be \[texts, positions"):
        model(ids, attention_mask=mask)


def test_a_copy_is_recomputed_with_its_own_text():
    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        model.train()(**masked_batch("bert")).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = routed("bert", "text")
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable({"use_reentrant": True})
    again.enable_input_require_grads()
    want, found = gradients(model), gradients(again)
    assert any("lora_A" in name for name in want)
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_saved_with_what_it_is_routed_by(tmp_path):
    model = routed("roberta", "text")
    routingvl.save_adapter(model, tmp_path)
    again = text_model("roberta")
    report = routingvl.load_adapter(again, tmp_path)
    assert {layer.routed_by for layer in report.layers} == {"text"}
    assert re.search("by text  (eager|triton)", str(report))
    batch = masked_batch("roberta")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    with pytest.raises(CheckpointError, match="routed_by is 'text', this model was injected with 'image'"):
        routingvl.load_adapter(routed("roberta", "image"), tmp_path)


def test_adapters_routed_by_the_image_are_saved_as_ever(tmp_path):
    captioner().save_pretrained(tmp_path)
    assert "routed_by" not in json.loads((tmp_path / "adapter_config.json").read_text())["routing"]


def test_copies_and_pickles_are_routed_by_their_own_text():
    model, batch = routed("roberta", "text"), masked_batch("roberta")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        want = model(**batch).logits
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert torch.equal(other(**batch).logits, want)
            contexts = {id(layer.context) for layer in routed_layers(other).values()}
            assert len(contexts) == 1
            assert contexts.isdisjoint(id(layer.context) for layer in routed_layers(model).values())


def test_taken_out_again_without_a_trace():
    model, plain = routed("bart", "encoder"), text_model("bart")
    remove(model)
    hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    assert not hooks
    batch = masked_batch("bart")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


def test_two_injections_share_what_they_are_routed_by():
    model = text_model("bart")
    for place in ("self_attn", "encoder_attn"):
        inject(
            model,
            RoutingConfig(routing="vllora", routed_by="encoder", rank=2, targets=(rf".*\.decoder\..*{place}\.q_proj",)),
        )
    assert len({id(layer.context) for layer in routed_layers(model).values()}) == 1
    assert len(model.get_decoder()._forward_pre_hooks) == 1
    with torch.no_grad():
        model(**masked_batch("bart"))
