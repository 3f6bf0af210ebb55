"""The task models over language models of every kind, against transformers' own losses, heads and generation."""

import json

import pytest
import torch
import transformers
from task_texts import DECODERS, ENCODERS, KINDS, SEQ2SEQ, WIDTH, text_body, text_model, tokenizer
from tiny import randomise, small_gpt2, small_roberta
from torch import nn
from torch.nn import functional as F

from routingvl import (
    RoutingConfig,
    VisionTextForCaptioning,
    VisionTextForClassification,
    VisionTextForVQA,
    load_adapter,
)
from routingvl.backbones.text import has_plain_head
from routingvl.bottlenecks.checkpoint import CheckpointError
from routingvl.config import ConfigError
from routingvl.models import ViTGPT2ForCaptioning, ViTRobertaForClassification, ViTRobertaForVQA, load_pretrained

WORD = 7


def routing(kind):
    return RoutingConfig(rank=4, alpha=8, routing="mul", targets=KINDS[kind][4])


def writer(kind, text=None, **options):
    """The captioning model, without a vision tower; its bottlenecks add nothing yet."""
    text = text_model(kind) if text is None else text
    return VisionTextForCaptioning.from_backbones(None, text, routing(kind), **options).eval()


def reader(kind, **options):
    """The classifier, whose logits are the state that its head reads."""
    model = VisionTextForClassification.from_backbones(None, text_body(kind), routing(kind), num_labels=3, **options)
    model.classifier = nn.Identity()
    return model.eval()


def texts(kind, rows=3, tokens=6):
    """input_ids and attention_mask, the last row padded, each text ending in an end token."""
    words = tokenizer(kind)
    ids = torch.randint(10, 60, (rows, tokens), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[-1, tokens // 2 :] = 0
    ids[torch.arange(rows), mask.sum(1) - 1] = words.eos_token_id if words.sep_token_id is None else words.sep_token_id
    return {"input_ids": ids.masked_fill(mask == 0, words.pad_token_id or 0), "attention_mask": mask}


def features(rows=3, tokens=1):
    return torch.randn(rows, tokens, WIDTH, generator=torch.Generator().manual_seed(6))


def check_loss(model, inputs, labels, want, keep):
    """Loss and the logits of real positions are those of transformers' output ``want``, with and without logits."""
    got = model(vision_features=features(), **inputs, labels=labels)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits[keep], want.logits[keep], rtol=1e-4, atol=1e-5)
    alone = model(vision_features=features(), **inputs, labels=labels, return_logits=False)
    assert alone.logits is None
    torch.testing.assert_close(alone.loss, want.loss)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoders_loss_is_transformers_own(kind):
    text, inputs = text_model(kind), texts(kind)
    mask = inputs["attention_mask"]
    labels = inputs["input_ids"].masked_fill(mask == 0, -100)
    check_loss(writer(kind, visual_prefix=False), inputs, labels, text(**inputs, labels=labels), mask == 1)
    behind = torch.cat([features(), text.get_input_embeddings()(inputs["input_ids"])], dim=1)
    mask, shifted = F.pad(mask, (1, 0), value=1), F.pad(labels, (1, 0), value=-100)
    want = text(inputs_embeds=behind, attention_mask=mask, labels=shifted)
    check_loss(writer(kind), inputs, labels, want, mask == 1)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_an_encoder_decoders_loss_is_transformers_own(kind):
    text, inputs = text_model(kind), texts(kind)
    keep = inputs["attention_mask"] == 1
    labels = inputs["input_ids"].masked_fill(~keep, -100)
    check_loss(writer(kind), inputs, labels, text(inputs_embeds=features(), labels=labels), keep)
    end = torch.full((3, 1), text.config.eos_token_id)
    want = text(input_ids=end, labels=labels)
    check_loss(writer(kind, visual_prefix=False), inputs, labels, want, keep)


@pytest.mark.parametrize("kind", [*DECODERS, *ENCODERS])
def test_an_image_that_is_a_words_embedding_is_that_word(kind):
    """Neither the prefix nor the text behind it is scaled once more or once less (Gemma scales embeddings)."""
    inputs, build = texts(kind), writer if kind in DECODERS else reader
    values = {"input_ids": WORD, "attention_mask": 1}
    with_word = {name: F.pad(tensor, (1, 0), value=values[name]) for name, tensor in inputs.items()}
    model, plain = build(kind), build(kind, visual_prefix=False)
    image = model.language_model.get_input_embeddings()(torch.full((3, 1), WORD)).detach()
    got, want = model(vision_features=image, **inputs).logits, plain(vision_features=image, **with_word).logits
    if kind in DECODERS:
        got, want = (logits[with_word["attention_mask"] == 1] for logits in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("opt", "score"),
        ("llama", "score"),
        *((kind, "classification_head") for kind in SEQ2SEQ),
        ("electra", "classifier"),
        ("modernbert", "head"),
    ],
)
def test_the_state_that_is_read_is_that_of_the_familys_own_classifier(kind, head):
    body = text_body(kind)
    own = transformers.AutoModelForSequenceClassification.from_config(body.config)
    own.base_model.load_state_dict(body.state_dict(), strict=False)
    if kind == "t5":
        own.transformer.load_state_dict(body.state_dict())
    inputs = texts(kind)
    if kind in SEQ2SEQ:  # they want as many end tokens in each text
        inputs = {name: tensor[:2] for name, tensor in inputs.items()}
    read = []
    getattr(own, head).register_forward_hook(lambda module, args, output: read.append(args[0]))
    own.config.pad_token_id = 0 if own.config.pad_token_id is None else own.config.pad_token_id
    own.eval()(**inputs)
    want = read[0]
    if kind in ("opt", "llama"):  # every state gets a score, of which that of the last token is taken
        want = want[torch.arange(3), inputs["attention_mask"].sum(1) - 1]
    if kind == "electra":
        want = want[:, 0]
    got = reader(kind, visual_prefix=False)(vision_features=features(len(want)), **inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
def test_padding_changes_nothing_that_is_read(kind):
    inputs, model = texts(kind), randomise(reader(kind))
    together = model(vision_features=features(), **inputs).logits
    short = {name: tensor[2:, :3] for name, tensor in inputs.items()}
    alone = model(vision_features=features()[2:], **short).logits
    torch.testing.assert_close(alone, together[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama", "bart"])
@pytest.mark.parametrize("prefix", [True, False])
def test_padding_in_front_is_refused_where_it_would_be_read(kind, prefix):
    """A decoder without a prefix reads it as transformers does: rotary positions are relative."""
    inputs, model = texts(kind), randomise(reader(kind, visual_prefix=prefix))
    in_front = {name: torch.cat([x[:2], x[2:].roll(3, 1)]) for name, x in inputs.items()}
    if kind == "llama" and not prefix:
        want = model(vision_features=features(), **inputs).logits
        torch.testing.assert_close(model(vision_features=features(), **in_front).logits, want, rtol=1e-3, atol=1e-4)
        return
    with pytest.raises(ValueError, match=r"begins with 0 in rows \[2\]: .*tokenizer.padding_side = 'right'"):
        model(vision_features=features(), **in_front)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "t5", "bart", "mbart"])
@pytest.mark.parametrize("prefix", [True, False])
def test_generation_with_a_cache_is_generation_without(kind, prefix):
    model, images = randomise(writer(kind, visual_prefix=prefix)), features(3)
    start = torch.zeros(3, 0, dtype=torch.long)
    if not model.written_behind:
        start = torch.full((3, 1), model.start_token)
    got, ids = model.generate(vision_features=images, max_new_tokens=6, eos_token_id=None), start
    for _ in range(6):  # an encoder-decoder's last position is written over: its input is one token behind
        given = ids if model.text_kind == "decoder" else F.pad(ids, (0, 1), value=model.end_token)
        ids = torch.cat([ids, model(vision_features=images, input_ids=given).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, ids[:, start.shape[1] :])
    begun = model.generate(vision_features=images, input_ids=got[:, :2], max_new_tokens=4, eos_token_id=None)
    assert torch.equal(begun, got[:, 2:])
    assert len({tuple(row) for row in got.tolist()}) > 1  # the image decides


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_beams_keep_their_own_image(kind):
    model, images = randomise(writer(kind)), features(3, 1)
    together = model.generate(vision_features=images, num_beams=3, max_new_tokens=5)
    for row, image in zip(together, images, strict=True):
        alone = model.generate(vision_features=image[None], num_beams=3, max_new_tokens=5)[0]
        assert torch.equal(row[: len(alone)], alone)
    several = model.generate(vision_features=images, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert torch.equal(several[::2], together)


def test_heads_that_are_more_than_a_product_compute_their_own_logits():
    plain = {kind: has_plain_head(text_model(kind)) for kind in DECODERS}
    assert plain == {kind: kind not in ("gemma2", "phi") for kind in DECODERS}  # a cap; a bias
    assert has_plain_head(small_gpt2())


def test_several_end_tokens_all_end_a_caption():
    text = text_model("llama", eos_token_id=[2, 9, 11])
    model = randomise(writer("llama", text))
    assert (model.end_tokens, model.end_token) == ([2, 9, 11], 2)
    free = model.generate(vision_features=features(), max_new_tokens=8, eos_token_id=None)
    stop = free[0, 2].item()
    again = randomise(writer("llama", text_model("llama", eos_token_id=[2, stop])))
    written = again.generate(vision_features=features(), max_new_tokens=8)[0].tolist()
    first = free[0].tolist().index(stop)
    assert written[: first + 1] == free[0, : first + 1].tolist()
    assert set(written[first + 1 :]) <= {2}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: writer("bert", text_model("bert")), "'bert' is an encoder, which cannot write: give a decoder"),
        (lambda: writer("llama", text_body("llama")), "needs its language modelling head: load LlamaForCausalLM"),
        (lambda: writer("t5", caption_loss="reference"), "caption_loss='reference' is of a decoder"),
        (lambda: reader("bert", text_embedding="published"), "'published' is RoBERTa's, and the text model is a bert"),
        (
            lambda: VisionTextForVQA.from_backbones(None, text_body("electra", embedding_size=16), routing("electra")),
            "embeds tokens in 16 numbers, not 32: set model.visual_prefix=false",
        ),
        (
            lambda: VisionTextForVQA.from_backbones(
                None, text_model("bert", pad_token_id=9).base_model, routing("bert")
            ),
            "needs its pooler: load BertModel with add_pooling_layer=True",
        ),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_a_model_that_scales_tokens_but_not_embeddings_takes_no_prefix():
    shape = {"vocab_size": 60, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1, "scale_embedding": True}
    shape |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    torch.manual_seed(0)
    text = transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**shape))
    config = RoutingConfig(rank=2, targets=["q_proj"])
    with pytest.raises(
        ConfigError, match=r"reads tokens and their embeddings differently: set model\.visual_prefix=false"
    ):
        VisionTextForCaptioning.from_backbones(None, text, config)
    assert (
        VisionTextForCaptioning.from_backbones(None, text, config, visual_prefix=False).text_kind == "encoder-decoder"
    )


def test_old_names_are_aliases_and_their_adapters_load(tmp_path):
    assert ViTGPT2ForCaptioning is VisionTextForCaptioning
    assert ViTRobertaForClassification is VisionTextForClassification
    assert ViTRobertaForVQA is VisionTextForVQA
    config = RoutingConfig(rank=2)
    for model, old in (
        (VisionTextForCaptioning.from_backbones(None, small_gpt2(), config), "ViTGPT2ForCaptioning"),
        (VisionTextForVQA.from_backbones(None, small_roberta(), config, num_labels=3), "ViTRobertaForVQA"),
    ):
        folder, build = tmp_path / old, type(model)
        randomise(model).save_pretrained(folder)
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["model_class"] == build.__name__
        (folder / "adapter_config.json").write_text(json.dumps(saved | {"model_class": old}))
        text = small_gpt2() if build is VisionTextForCaptioning else small_roberta()
        assert load_adapter(build.from_backbones(None, text, config, **model.options()), folder).trainable
        text = small_gpt2() if build is VisionTextForCaptioning else small_roberta()
        for load in (load_pretrained, build.from_pretrained):
            loaded = load(folder, text=text)
            assert type(loaded) is build
            text = small_gpt2() if build is VisionTextForCaptioning else small_roberta()
        with pytest.raises(CheckpointError, match=f"holds a {old}, not a VisionTextForClassification"):
            VisionTextForClassification.from_pretrained(folder, text=text)


def test_another_backbone_by_its_settings_alone_is_refused(tmp_path):
    writer("llama").save_pretrained(tmp_path)
    other = text_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with pytest.raises(CheckpointError, match="trained with another text backbone"):
        load_pretrained(tmp_path, text=other)


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_saves_and_loads(kind, tmp_path):
    model = randomise(writer(kind))
    inputs = {"vision_features": features(), **texts(kind)}
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, text=text_model(kind))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    state = model.state_dict()
    pointers = [tensor.data_ptr() for tensor in state.values() if tensor.numel()]
    assert len(set(pointers)) == len(pointers)  # tied weights stand once
    randomise(again, 1.0).load_state_dict(state)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
