"""attach: whole vision-language models bind their own image, and their numbers are those of binding by hand."""

import copy

import pytest
import torch
from transformers import DynamicCache
from vlms import VLMS, WIDTH, batch_for, make

import routingvl
from routingvl import RoutingConfig, VisualContext, inject
from routingvl.bottlenecks.rows import BindingError

ROUTINGS = {name: "vllora" if name == "qwen2_vl" else "mul" for name in VLMS}


def routed(name: str, routing: str = "mul"):
    """The model with bottlenecks that do something, and nothing else that trains."""
    model = make(name).requires_grad_(False)
    config = RoutingConfig(routing=routing, rank=4, alpha=8, targets=VLMS[name].targets, train_bias=False)
    inject(model.get_submodule(VLMS[name].language), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module", params=VLMS)
def case(request):
    """Name, model, and a module's image by hand: for tests that leave the model as it was."""
    return request.param, routed(request.param)


@pytest.fixture
def attached():
    """attach, undone when the test ends."""
    handles = []

    def attach(*args, **options):
        handles.append(routingvl.attach(*args, **options))
        return handles[-1]

    yield attach
    for handle in handles:
        handle.remove()


def image_of(name, model, batch) -> torch.Tensor:
    """What the module ``image_from`` puts out in a forward pass without bottlenecks, as one tensor of tokens."""
    seen = []
    module = model.get_submodule(VLMS[name].image_from)
    hook = module.register_forward_hook(lambda module, args, output: seen.append(output))
    context = next(m.context for m in model.modules() if isinstance(getattr(m, "context", None), VisualContext))
    with torch.no_grad(), context.bind(None, text_only="skip"):
        model(**batch)
    hook.remove()
    (output,) = seen
    return output[0] if not isinstance(output, torch.Tensor) else output


def by_hand(name, model, batch, pooling="mean"):
    """features and mask, row by row."""
    tokens = image_of(name, model, batch)
    if name == "vision_encoder_decoder":
        rows = list(tokens)
    else:
        counts = (batch["input_ids"] == 99).sum(1).tolist()
        rows = list(tokens.flatten(0, -2).split(counts))
    if pooling == "mean":
        rows = [row.mean(0, keepdim=True) if len(row) else row.new_zeros(1, row.shape[1]) for row in rows]
        return torch.stack(rows), None
    mask = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.bool)
    for own, row in zip(mask, rows, strict=True):
        own[: len(row)] = True
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask


@pytest.mark.parametrize(("routing", "pooling"), [("mul", "mean"), ("mul", "tokens"), ("vllora", "tokens")])
def test_forward_is_that_of_binding_by_hand(case, attached, routing, pooling):
    name, _ = case
    model, batch = routed(name, routing), batch_for(name)
    features, mask = by_hand(name, model, batch, pooling)
    with torch.no_grad():
        with routingvl.bind_image(model, features, mask=mask):
            want = model(**batch).logits
        with routingvl.bind_image(model, features.flip(0), mask=None if mask is None else mask.flip(0)):
            other = model(**batch).logits
        handle = attached(model, VLMS[name].image_from, image_pooling=pooling)
        got = model(**batch).logits
        handle.remove()
        with pytest.raises(RuntimeError, match="no visual features bound"):
            model(**batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (want - other).abs().max() > 1e-3  # the image matters


def trained(model, bind, batches):
    """The losses of a step with each batch."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        with bind(batch):
            loss = model(**batch).loss
        loss.backward()  # outside
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_three_steps(case, attached, checkpointing):
    name, model = case
    start, batches = copy.deepcopy(model.state_dict()), [batch_for(name, seed=seed) for seed in (1, 2, 3)]
    want = trained(model, lambda batch: routingvl.bind_image(model, by_hand(name, model, batch)[0]), batches)
    model.load_state_dict(start)
    handle = attached(model, VLMS[name].image_from)
    model.train()
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        # A reentrant checkpoint needs an input that takes gradients; transformers sees to it where that is input_ids.
        model.get_submodule(VLMS[name].language).enable_input_require_grads()
    got = trained(model, lambda batch: torch.enable_grad(), batches)
    if checkpointing is not None:
        model.activation_checkpointing_disable()
    handle.remove()
    model.eval().load_state_dict(start)
    assert got == pytest.approx(want, rel=1e-5)
    assert len(set(got)) == 3


@pytest.mark.parametrize("beams", [1, 3])
def test_generate(case, attached, beams):
    """With and without cache, and by hand: the same tokens; another image gives others."""
    name, model = case
    batch = {key: value for key, value in batch_for(name).items() if key != "labels"}
    features, _ = by_hand(name, model, batch_for(name))
    options = {"num_beams": beams, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["suppress_tokens"] = [96, 97, 98, 99]  # those of images
    with routingvl.bind_image(model, features, decoding=True):
        want = model.generate(**batch, **options)
    with routingvl.bind_image(model, 3 * features.flip(0), decoding=True):
        other = model.generate(**batch, **options)
    handle = attached(model, VLMS[name].image_from)
    found = [model.generate(**batch, **options, use_cache=cache) for cache in (True, False)]
    handle.remove()
    assert torch.equal(found[0], want)
    assert torch.equal(found[1], want)
    assert want.shape == other.shape
    assert "generate" not in vars(model)


WITH_TEXT_ALONE = [name for name in VLMS if name not in ("vision_encoder_decoder", "blip2_opt", "blip2_t5")]


@pytest.mark.parametrize("name", WITH_TEXT_ALONE)
def test_two_images_a_row_a_text_alone_and_a_batch_of_texts(name, attached):
    model = routed(name, "vllora")
    for pooling in ("mean", "tokens"):
        batch = batch_for(name, (2, 0, 1))
        features, mask = by_hand(name, model, batch, pooling)
        mask = torch.tensor([[True], [False], [True]]) if mask is None else mask
        with torch.no_grad():
            with routingvl.bind_image(model, features, mask=mask, text_only="skip"):
                want = model(**batch).logits
            handle = attached(model, VLMS[name].image_from, image_pooling=pooling)
            torch.testing.assert_close(model(**batch).logits, want, rtol=1e-5, atol=1e-5)
            texts = batch_for(name, (0, 0))
            alone = model(**texts).logits
            handle.remove()
            with routingvl.bind_image(model, None, text_only="skip"):
                assert torch.equal(model(**texts).logits, alone)
    handle = attached(model, VLMS[name].image_from)
    model(**texts).loss.backward()  # a batch of texts alone trains on
    handle.remove()
    handle = attached(model, VLMS[name].image_from, text_only=None)
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        model(**batch)
    handle.remove()


def test_features_are_as_wide_as_the_text(case):
    name, model = case
    assert image_of(name, model, batch_for(name)).shape[-1] == WIDTH


def test_embeddings_find_their_places_as_ids_do(attached):
    model, batch = routed("llava"), batch_for("llava", (2, 0))
    attached(model, VLMS["llava"].image_from)
    with torch.no_grad():
        want = model(**batch).logits
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        torch.testing.assert_close(model(inputs_embeds=embeds, **batch).logits, want)


def test_qwen2_vl_finds_them_when_it_is_told_its_positions(attached):
    """Which it takes from input_ids otherwise, so that the base model too is another one by embeddings."""
    model, batch = routed("qwen2_vl"), batch_for("qwen2_vl", (2, 0))
    attached(model, VLMS["qwen2_vl"].image_from)
    with torch.no_grad():
        want = model(**batch).logits
        known = {name: batch[name] for name in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")}
        positions, _ = model.model.get_rope_index(**known)
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        model.model.rope_deltas = None
        got = model(inputs_embeds=embeds, position_ids=positions, **batch).logits
    torch.testing.assert_close(got, want)


def test_generate_refuses_features_of_another_number_of_rows(attached):
    model, batch = routed("llava"), batch_for("llava", (1, 1))
    attached(model, lambda call: call.pop("features"))
    with pytest.raises(BindingError, match="gives features of 1 rows, and the prompt of generate has 2"):
        model.generate(**batch, features=torch.randn(1, 1, WIDTH), max_new_tokens=2)


def test_generate_that_goes_on_without_its_image_is_an_error(attached):
    model, batch = routed("llava"), batch_for("llava", (1, 1))
    attached(model, VLMS["llava"].image_from)
    cache = DynamicCache()
    model.generate(**batch, past_key_values=cache, max_new_tokens=2, do_sample=False)
    words = torch.full((2, 3), 5)
    mask = torch.ones(2, cache.get_seq_length() + 3, dtype=torch.long)
    with pytest.raises(BindingError, match="goes on from past_key_values"):
        model.generate(input_ids=words, attention_mask=mask, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("use", ["forward", "module"])
def test_another_use_of_the_model_in_generate_leaves_its_image_alone(use, cached, attached):
    model, batch, other = routed("llava"), batch_for("llava", (1, 1)), batch_for("llava", (1,))
    other["pixel_values"] = other["pixel_values"] + 3
    attached(model, VLMS["llava"].image_from)
    how = {"max_new_tokens": 4, "do_sample": False, "use_cache": cached, "return_dict_in_generate": True}
    seen = []

    def criterion(ids, scores, **_):
        seen.append(model(**other).logits if use == "forward" else model.get_image_features(other["pixel_values"]))
        return torch.zeros(len(ids), dtype=torch.bool)

    with torch.no_grad():
        alone = model(**other).logits
        want = model.generate(**batch, **how, output_logits=True).logits
        found = model.generate(**batch, **how, output_logits=True, stopping_criteria=[criterion]).logits
    assert len(seen) == 4
    for step, wanted in zip(found, want, strict=True):
        torch.testing.assert_close(step, wanted)
    if use == "forward":
        torch.testing.assert_close(seen[-1], alone)
