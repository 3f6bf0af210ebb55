"""Both models end to end on small backbones: inputs, prefixes, losses, generation, checkpointing, compilation."""

import copy
import threading

import pytest
import torch
from tiny import WIDTH, WORDS, answerer, batch, captioner, randomise, small_gpt2, small_roberta, small_vit
from torch import nn

from routingvl import RoutingConfig, ViTGPT2ForCaptioning, ViTRobertaForClassification, ViTRobertaForVQA
from routingvl.config import ConfigError
from routingvl.kernels import ROUTINGS

BUILDERS = [captioner, answerer]
METHODS = [{"method": "lora"}, {"method": "adapter"}]


def labels_of(model, inputs):
    if isinstance(model, ViTGPT2ForCaptioning):
        return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return torch.rand(inputs["input_ids"].shape[0], 7, generator=torch.Generator().manual_seed(6))


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=labels_of(model, inputs)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("build", BUILDERS)
def test_features_once_equal_images_each_time(build):
    model, inputs = randomise(build()).eval(), batch()
    features = model.encode_images(inputs["pixel_values"])
    assert features.shape == (3, 1, WIDTH)
    assert not features.requires_grad
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model(vision_features=features, **text).logits, model(**inputs).logits)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(("kind", "tokens"), [("pooler", 1), ("cls", 1), ("mean", 1), ("tokens", 5)])
def test_feature_kinds(build, kind, tokens):
    model = randomise(build(RoutingConfig(rank=4, routing="vllora"), vision_features=kind))
    inputs = batch()
    assert model.encode_images(inputs["pixel_values"]).shape == (3, tokens, WIDTH)
    _, grads = gradients(model, inputs)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert all(grad.any() for name, grad in grads.items() if "lora" in name)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("routing", ["add", "mul", "expand"])
def test_one_token_routings_refuse_many_tokens(build, routing):
    with pytest.raises(ConfigError, match="mean"):
        build(RoutingConfig(rank=4, routing=routing), vision_features="tokens")


@pytest.mark.parametrize("build", BUILDERS)
def test_without_prefix_the_image_acts_through_routing_alone(build):
    inputs = batch()
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    for routing, blind in (("none", True), ("add", False)):
        model = randomise(build(RoutingConfig(rank=4, routing=routing), visual_prefix=False)).eval()
        assert torch.equal(model(**inputs).logits, model(**other).logits) == blind


def test_lora_at_initialisation_leaves_logits_bit_for_bit_unchanged():
    inputs = batch()
    for routing in ROUTINGS:
        model = captioner(RoutingConfig(rank=4, routing=routing), visual_prefix=False).eval()
        text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        logits, plain = model(**inputs).logits, small_gpt2().eval()
        # Up to transformers' own form of the activation, which the model replaces by torch's.
        torch.testing.assert_close(logits, plain(**text, use_cache=False).logits)
        for block in plain.transformer.h:
            block.mlp.act = nn.GELU(approximate="tanh")
        assert torch.equal(logits, plain(**text, use_cache=False).logits)


def test_text_embeddings_published_and_single_differ():
    inputs = batch()
    logits = {
        kind: randomise(answerer(text_embedding=kind)).eval()(**inputs).logits for kind in ("published", "single")
    }
    assert not torch.allclose(logits["published"], logits["single"])
    bare = [
        randomise(answerer(text_embedding=kind, visual_prefix=False)).eval()(**inputs).logits
        for kind in ("published", "single")
    ]
    assert torch.equal(*bare)


def test_labels_and_answers_share_the_model_and_differ_in_the_loss():
    inputs, labels = batch(), torch.tensor([4, 0, 6])
    answers = randomise(answerer()).eval()
    backbones = small_vit(), small_roberta(), answers.routing
    model = randomise(ViTRobertaForClassification.from_backbones(*backbones, num_labels=7)).eval()
    loss, logits = model(**inputs, labels=labels)
    assert torch.equal(logits, answers(**inputs).logits)
    assert loss.item() == pytest.approx(-logits.log_softmax(-1)[range(3), labels].mean().item(), rel=1e-6)
    chances = model.probabilities(logits)
    torch.testing.assert_close(chances.sum(dim=1), torch.ones(3))
    assert torch.equal(answers.probabilities(logits), logits.sigmoid())
    scores = torch.rand(3, 7)
    want = nn.functional.binary_cross_entropy(logits.sigmoid(), scores)
    assert answers(**inputs, labels=scores).loss.item() == pytest.approx(want.item(), rel=1e-5)
    with pytest.raises(ConfigError, match="num_labels=0 must be at least 1"):
        ViTRobertaForClassification.from_backbones(small_vit(), small_roberta(), answers.routing)
    published = ViTRobertaForVQA.from_backbones(small_vit(), small_roberta(), answers.routing)
    assert published.num_labels == published.classifier[-1].out_features == 3129


@pytest.mark.parametrize("prefix", [True, False])
def test_sound_caption_loss_is_the_mean_over_labelled_tokens(prefix):
    model, inputs = randomise(captioner(visual_prefix=prefix)).eval(), batch()
    labels = labels_of(model, inputs)
    loss, logits = model(**inputs, labels=labels)
    logp = logits.log_softmax(-1)
    first = 0 if prefix else 1  # without a prefix nothing predicts the first token
    terms = [
        -logp[row, column if prefix else column - 1, labels[row, column]]
        for row in range(3)
        for column in range(first, 6)
        if labels[row, column] != -100
    ]
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


def test_reference_caption_loss_never_supervises_the_first_token():
    model, inputs = randomise(captioner(caption_loss="reference")).eval(), batch()
    inputs["input_ids"][0, 2] = 0
    loss, logits = model(**inputs, labels=inputs["input_ids"])
    terms = [
        -logits.log_softmax(-1)[row, column, inputs["input_ids"][row, column]]
        for row in range(3)
        for column in range(1, 6)
        if inputs["input_ids"][row, column] != 0
    ]
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


@pytest.mark.parametrize("build", BUILDERS)
def test_different_widths_get_a_trainable_projection_and_only_then(build):
    assert build().visual_projection is None
    model = build(vit_width=16)
    assert model.visual_projection.weight.requires_grad
    _, grads = gradients(randomise(model), batch())
    assert grads["visual_projection.weight"].any()


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_gradients_bit_for_bit(build, method):
    model = randomise(build(RoutingConfig(rank=4, routing="mul", **method))).train()
    inputs = batch()
    loss, plain = gradients(model, inputs)
    model.gradient_checkpointing_enable()
    again, recomputed = gradients(model, inputs)
    assert torch.equal(loss, again)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_beams_in_a_batch_equal_one_by_one(prefix, method):
    config = RoutingConfig(rank=4, routing="mul", **method)
    model = randomise(captioner(config, visual_prefix=prefix), 0.2).eval()
    # Tied to the input embedding, a random model repeats its last token whatever the image.
    generator = torch.Generator().manual_seed(7)
    model.gpt.lm_head.weight = torch.nn.Parameter(torch.randn(50, WIDTH, generator=generator))
    features = 2 * torch.randn(4, 1, WIDTH, generator=generator)
    options = {"num_beams": 3, "max_new_tokens": 6}
    together = model.generate(vision_features=features, **options)
    assert together.shape[0] == 4
    assert len({tuple(row.tolist()) for row in together}) > 1
    for row, image in zip(together, features, strict=True):
        alone = model.generate(vision_features=image[None], **options)[0]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_greedy_generation_follows_the_logits_without_a_cache():
    model = randomise(captioner(), 0.2).eval()
    pixels = batch(2)["pixel_values"]
    tokens = model.generate(pixel_values=pixels, max_new_tokens=5)
    assert tokens.shape[1] <= 5
    for row in range(2):
        ids = torch.zeros(1, 0, dtype=torch.long)
        for expected in tokens[row].tolist():
            logits = model(pixel_values=pixels[row : row + 1], input_ids=ids).logits
            assert logits[0, -1].argmax().item() == expected
            if expected == 49:
                break
            ids = torch.cat([ids, torch.tensor([[expected]])], dim=1)


def test_generation_from_a_prompt_and_several_candidates():
    model = randomise(captioner(), 0.2).eval()
    pixels = batch(2)["pixel_values"]
    free = model.generate(pixel_values=pixels, max_new_tokens=4)
    prompted = model.generate(pixel_values=pixels, input_ids=free[:, :2], max_new_tokens=2)
    assert torch.equal(prompted, free[:, 2:4])
    many = model.generate(pixel_values=pixels, num_beams=3, num_return_sequences=2, max_new_tokens=4)
    assert many.shape[0] == 4


@pytest.mark.parametrize("build", BUILDERS)
def test_the_vit_is_frozen_and_stays_in_evaluation_mode(build):
    model = build().train()
    assert not model.vit.training
    assert model.language_model.training
    assert not any(p.requires_grad for p in model.vit.parameters())


@pytest.mark.parametrize("build", BUILDERS)
def test_clear_errors_of_a_call(build):
    model, inputs = build(), batch()
    text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"either pixel_values= .* or vision_features="):
        model(**text)
    with pytest.raises(ValueError, match=r"\[batch, visual tokens, 32\], not \[3, 32\]"):
        model(vision_features=torch.zeros(3, WIDTH), **text)
    with pytest.raises(ValueError, match="features have batch 2, text has batch 3"):
        model(vision_features=torch.zeros(2, 1, WIDTH), **text)
    with pytest.raises(ValueError, match="adds the visual prefix's columns itself"):
        model(**inputs | {"attention_mask": torch.ones(3, 7)})
    with pytest.raises(ValueError, match="positions"):
        model(pixel_values=inputs["pixel_values"], input_ids=torch.ones(3, 40, dtype=torch.long))


def test_clear_errors_of_construction():
    config = RoutingConfig(rank=4)
    with pytest.raises(ConfigError, match="'roberta' is an encoder, which cannot write"):
        ViTGPT2ForCaptioning.from_backbones(small_vit(), small_roberta(), config)
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel is of model type 'gpt2', .*known here \('vit', "):
        ViTRobertaForVQA.from_backbones(small_gpt2(), small_roberta(), config)
    with pytest.raises(ConfigError, match="unknown key 'num_lables'; did you mean 'num_labels'"):
        ViTRobertaForVQA.from_backbones(small_vit(), small_roberta(), config, num_lables=4)
    with pytest.raises(ConfigError, match=r"classifier_layers=3"):
        answerer(classifier_layers=3)
    with pytest.raises(ConfigError, match=r"vision_features='poler'.*did you mean 'pooler'"):
        answerer(vision_features="poler")
    model = ViTGPT2ForCaptioning.from_backbones(None, small_gpt2(), config)
    with pytest.raises(ValueError, match="without a ViT"):
        model(pixel_values=torch.zeros(1, 3, 16, 16), input_ids=torch.ones(1, 2, dtype=torch.long))


@pytest.mark.parametrize("build", BUILDERS)
def test_deepcopy_runs_on_its_own(build):
    model, inputs = randomise(build()).eval(), batch()
    want = model(**inputs).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(**inputs).logits, want)
    assert twin.context is not model.context


@pytest.mark.parametrize("build", BUILDERS)
def test_two_threads_share_one_model(build):
    model = randomise(build()).eval()
    inputs = [batch(), batch() | {"pixel_values": batch()["pixel_values"].flip(0)}]
    want = [model(**item).logits for item in inputs]
    got: dict[tuple[int, int], torch.Tensor] = {}

    def work(index: int) -> None:
        for turn in range(10):
            got[index, turn] = model(**inputs[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 20
    assert all(torch.allclose(logits, want[index], atol=1e-6) for (index, _), logits in got.items())


@pytest.mark.parametrize(("build", "method"), [(captioner, "lora"), (answerer, "adapter")])
def test_full_graph_capture(build, method):
    model = randomise(build(RoutingConfig(method=method, rank=4, routing="vllora"))).train()
    inputs = batch()
    features = model.encode_images(inputs.pop("pixel_values"))
    labels = labels_of(model, inputs)
    inputs = inputs | {"vision_features": features, "labels": labels}
    model.zero_grad()
    model(**inputs).loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", BUILDERS)
def test_bfloat16_autocast_trains(build):
    model, inputs = randomise(build(), 0.05), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, labels=labels_of(model, inputs)).loss
    loss.backward()
    reference, _ = gradients(copy.deepcopy(model), inputs)
    assert loss.item() == pytest.approx(reference.item(), rel=0.05)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


OUTSIDE = {
    "a token id beyond the vocabulary": (
        {"input_ids": [[3, WORDS]]},
        f"input_ids must be from 0 to {WORDS - 1}, not from 3 to",
    ),
    "a negative token id": ({"input_ids": [[3, -100]]}, "input_ids must be from 0 to .*, not from -100 to 3"),
    "NaN pixels": ({"pixel_values": float("nan")}, "pixel_values must be finite"),
    "infinite features": ({"vision_features": float("inf")}, "vision_features must be finite"),
    "NaN features": ({"vision_features": float("nan")}, "vision_features must be finite"),
    "no image": ({"vision_features": None}, "the batch is empty: there is no image in vision_features"),
    "no pixels": ({"pixel_values": None}, "the batch is empty: there is no image in pixel_values"),
    "no token": ({"input_ids": [[]]}, "with a token at least"),
}


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(("changes", "message"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_lies_outside_of_the_inputs_is_named(build, changes, message):
    model = build(visual_prefix=message != "with a token at least")
    inputs = batch(1)
    for name, value in changes.items():
        if name == "input_ids":
            inputs |= {"input_ids": torch.tensor(value, dtype=torch.long), "attention_mask": None}
        elif name == "pixel_values" and value is None:
            inputs = {key: tensor[:0] for key, tensor in inputs.items()}
        elif name == "pixel_values":
            inputs[name][0, 0, 0, 0] = value
        else:
            del inputs["pixel_values"]
            inputs[name] = torch.zeros(0, 1, WIDTH) if value is None else torch.full((1, 1, WIDTH), value)
            inputs |= {key: inputs[key][: len(inputs[name])] for key in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("input_ids", torch.Tensor.float, "input_ids must hold integers, not torch.float32"),
        ("input_ids", torch.Tensor.tolist, "input_ids must be a tensor, not a list"),
        ("attention_mask", lambda mask: mask * 2, "attention_mask must hold nothing but 0 and 1"),
        ("attention_mask", lambda mask: mask * 0.5, "attention_mask must hold nothing but 0 and 1"),
        ("pixel_values", torch.Tensor.tolist, "pixel_values must be a tensor, not a list"),
        ("pixel_values", lambda pixels: pixels[0], "pixel_values must have 4 dimensions, not the shape"),
    ],
)
def test_inputs_of_another_kind_are_named(build, name, change, message):
    model, inputs = build(), batch()
    with pytest.raises(ValueError, match=message):
        model(**inputs | {name: change(inputs[name])})


def test_labels_outside_are_named():
    inputs, captions, answers = batch(), captioner(), answerer()
    labels = labels_of(captions, inputs)
    for value, message in ((WORDS, f"labels must be from 0 to {WORDS - 1}"), (-1, "not from -1 to")):
        for logits in (True, False):
            with pytest.raises(ValueError, match=message):
                captions(**inputs, labels=labels.clone().index_fill_(0, torch.tensor(1), value), return_logits=logits)
    with pytest.raises(ValueError, match=r"labels .* must have the shape of input_ids"):
        captions(**inputs, labels=labels[:, 1:])
    for scores, message in (
        (torch.full((3, 7), 10.0), "labels must be from 0 to 1, not from 10.0 to 10.0"),
        (torch.full((3, 7), float("nan")), "labels must be from 0 to 1, not from nan"),
        (torch.full((3, 7), -0.1), "labels must be from 0 to 1"),
        (torch.zeros(3, 6), r"labels \[3, 6\] must have the shape of the logits, \[3, 7\]"),
    ):
        with pytest.raises(ValueError, match=message):
            answers(**inputs, labels=scores)
    model = ViTRobertaForClassification.from_backbones(
        small_vit(), small_roberta(), RoutingConfig(rank=4), num_labels=7
    )
    for numbers, message in (
        (torch.tensor([0, 7, 1]), "labels must be from 0 to 6, not from 0 to 7"),
        (torch.tensor([0, -100, 1]), "not from -100 to 1"),
        (torch.tensor([0, 1]), "one number for each of 3 examples"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**inputs, labels=numbers)


@pytest.mark.parametrize("prefix", [True, False])
def test_generation_refuses_what_does_not_fit(prefix):
    model, images = captioner(visual_prefix=prefix).eval(), batch()["pixel_values"]
    # One position for the image or for the start token; the last new token needs none.
    assert model.generate(pixel_values=images, max_new_tokens=40, min_new_tokens=40).shape == (3, 40)
    with pytest.raises(
        ValueError, match=r"max_new_tokens=41 behind 1 positions .* needs 41, and the text model has 40"
    ):
        model.generate(pixel_values=images, max_new_tokens=41)
    for wrong in ({"max_new_tokens": 0}, {"num_beams": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            model.generate(pixel_values=images, **wrong)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_dictionary_of_generated_tokens(prefix):
    model, images = captioner(visual_prefix=prefix).eval(), batch()["pixel_values"]
    want = model.generate(pixel_values=images, max_new_tokens=4)
    out = model.generate(pixel_values=images, max_new_tokens=4, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, want)
    assert len(out.scores) == want.shape[1]


def test_the_backbones_own_generation_settings_change_nothing():
    images, plain, text = batch()["pixel_values"], randomise(captioner()).eval(), small_gpt2()
    want = plain.generate(pixel_values=images, num_beams=2)
    text.generation_config.update(repetition_penalty=9.0, min_new_tokens=9, eos_token_id=3, no_repeat_ngram_size=2)
    text.generation_config.suppress_tokens = want.unique().tolist()
    model = ViTGPT2ForCaptioning.from_backbones(small_vit(), text, plain.routing)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.eval().generate(pixel_values=images, num_beams=2), want)
    # what a caller asks for does
    assert not set(want.unique().tolist()) & set(
        model.generate(pixel_values=images, num_beams=2, suppress_tokens=want.unique().tolist()).unique().tolist()
    )


@pytest.mark.parametrize("end", [None, []])
def test_a_text_model_needs_an_end_token_of_its_own(end):
    text = small_gpt2()
    text.config.eos_token_id = end
    with pytest.raises(ConfigError, match="config must name an end token"):
        ViTGPT2ForCaptioning.from_backbones(small_vit(), text, RoutingConfig(rank=4))


@pytest.mark.parametrize("tied", [True, False])
def test_the_state_holds_a_tied_head_once(tied):
    model = randomise(captioner())
    if not tied:
        model.gpt.lm_head.weight = nn.Parameter(model.gpt.lm_head.weight.detach() + 1, requires_grad=False)
    state = model.state_dict()
    assert ("gpt.lm_head.weight" in state) is not tied
    pointers = [tensor.data_ptr() for tensor in state.values()]
    assert len(set(pointers)) == len(pointers)
    twin = captioner()
    if not tied:
        twin.gpt.lm_head.weight = nn.Parameter(torch.zeros(WORDS, WIDTH), requires_grad=False)
    twin.load_state_dict(state)
    assert torch.equal(twin.eval()(**batch()).logits, model.eval()(**batch()).logits)
