"""Encoder-decoders that read images and a text and write another: loss, generation, several images, both backends."""

import pytest
import torch
from task_texts import KINDS, SEQ2SEQ, WIDTH, text_model
from tiny import SIZE, randomise, small_gpt2, small_vit

from routingvl import RoutingConfig, VisionTextForGeneration
from routingvl.config import ConfigError
from routingvl.models import load_pretrained


def writer(kind="bart", vision=None, routing="mul", **options):
    config = RoutingConfig(rank=4, alpha=8, routing=routing, targets=KINDS[kind][4])
    return VisionTextForGeneration.from_backbones(vision, text_model(kind), config, **options).eval()


def texts(rows=3, read=6, written=4):
    """What is read, its mask, and labels; the last rows are padded."""
    generator = torch.Generator().manual_seed(5)
    ids, labels = (torch.randint(10, 60, (rows, n), generator=generator) for n in (read, written))
    mask = torch.ones_like(ids)
    mask[-1, read // 2 :] = 0
    labels[-1, written // 2 :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def features(*shape):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_the_loss_is_transformers_own(kind):
    text, inputs, images = text_model(kind), texts(), features(3, 2)
    behind = torch.cat([images, text.get_input_embeddings()(inputs["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(3, 2, dtype=torch.long), inputs["attention_mask"]], dim=1)
    want = text(inputs_embeds=behind, attention_mask=mask, labels=inputs["labels"])
    model = writer(kind, routing="vllora")  # its bottlenecks add nothing yet
    got = model(vision_features=images, **inputs)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-5)
    alone = model(vision_features=images, **inputs, return_logits=False)
    assert alone.logits is None
    torch.testing.assert_close(alone.loss, want.loss)
    blind = writer(kind, routing="vllora", visual_prefix=False)(vision_features=images, **inputs)
    torch.testing.assert_close(blind.loss, text(**inputs).loss)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_generation_with_a_cache_is_the_forward_pass(kind):
    model, inputs, images = randomise(writer(kind)), texts(), features(3, 1)
    read = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    got = model.generate(vision_features=images, **read, max_new_tokens=5, eos_token_id=None)
    written = torch.full((3, 1), model.start_token)
    for _ in range(5):
        logits = model(vision_features=images, **read, decoder_input_ids=written).logits
        written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(got, written[:, 1:])
    begun = model.generate(vision_features=images, **read, decoder_input_ids=written[:, :3], max_new_tokens=3)
    assert torch.equal(begun[:, :1], written[:, 3:4])
    other = model(vision_features=images, **read, decoder_input_ids=written).logits
    assert not torch.allclose(other, model(vision_features=-images, **read, decoder_input_ids=written).logits)
    assert not torch.allclose(other, model(vision_features=images, decoder_input_ids=written).logits)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_beams_keep_their_own_image_and_text(kind):
    model, inputs, images = randomise(writer(kind)), texts(), features(3, 1)
    read = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    together = model.generate(vision_features=images, **read, num_beams=3, max_new_tokens=5)
    for i, row in enumerate(together):
        one = {key: value[i : i + 1] for key, value in read.items()}
        alone = model.generate(vision_features=images[i : i + 1], **one, num_beams=3, max_new_tokens=5)[0]
        assert torch.equal(row[: len(alone)], alone)
    several = model.generate(
        vision_features=images, **read, num_beams=3, num_return_sequences=2, max_new_tokens=5, labels=inputs["labels"]
    )
    assert torch.equal(several[::2], together)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(("routing", "pooling"), [("mul", "mean"), ("vllora", None), ("vllora", "mean")])
def test_an_image_that_is_not_there_changes_nothing(kind, routing, pooling):
    """Texts with one image and with two share a batch."""
    model, inputs = randomise(writer(kind, routing=routing, image_pooling=pooling)), texts()
    images, mask = features(3, 2, 4), torch.tensor([[True, True], [True, False], [True, True]])
    together = model(vision_features=images, **inputs, image_mask=mask).logits
    other = images.clone()
    other[1, 1] = 9.0
    assert torch.equal(model(vision_features=other, **inputs, image_mask=mask).logits, together)
    for i, n in enumerate([2, 1, 2]):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        alone = model(vision_features=images[i : i + 1, :n], **one).logits
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_pixels_of_several_images_are_their_features():
    model = randomise(writer(vision=small_vit(), image_pooling="mean"))
    pixels, inputs = torch.randn(3, 2, 3, SIZE, SIZE), texts()
    encoded = model.encode_images(pixels)
    assert encoded.shape == (3, 2, 1, WIDTH)
    assert torch.equal(encoded[:, 1], model.encode_images(pixels[:, 1]))
    want = model(vision_features=encoded, **inputs).loss
    assert torch.equal(model(pixel_values=pixels, **inputs).loss, want)
    assert torch.equal(model(vision_features=encoded.flatten(1, 2), **inputs).loss, want)


def test_pooling_leaves_the_prefix_all_tokens():
    inputs, images = texts(), features(3, 4)
    with pytest.raises(ConfigError, match=r"image_pooling='mean' for the bottlenecks alone"):
        writer("bart")(vision_features=images, **inputs)
    pooled, plain = writer(image_pooling="mean"), writer(routing="none")
    assert torch.equal(pooled(vision_features=images, **inputs).loss, plain(vision_features=images, **inputs).loss)
    assert pooled.language_model.model.encoder.layers[0].self_attn.q_proj.pooled
    again = images.flip(1)  # another order: another prefix, the same mean
    assert not torch.equal(pooled(vision_features=again, **inputs).loss, plain(vision_features=images, **inputs).loss)


def test_a_projection_may_stand_where_widths_agree(tmp_path):
    model = randomise(writer(vision=small_vit(), project_features=True))
    assert model.visual_projection.weight.shape == (WIDTH, WIDTH)
    assert model.visual_projection.weight.requires_grad
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, vision=small_vit(), text=text_model("bart"))
    assert isinstance(again, VisionTextForGeneration)
    pixels, inputs = torch.randn(3, 3, SIZE, SIZE), texts()
    assert torch.equal(again(pixel_values=pixels, **inputs).logits, model(pixel_values=pixels, **inputs).logits)
    assert writer(vision=small_vit()).visual_projection is None


@pytest.mark.parametrize("routing", ["none", "mul"])
@pytest.mark.parametrize("visual_prefix", [False, True])
def test_whatever_trains_gets_a_gradient(routing, visual_prefix):
    """Several processes wait for the gradient of each parameter that trains."""
    model = randomise(writer(vision=small_vit(24), routing=routing, visual_prefix=visual_prefix))
    assert (model.visual_projection is None) == (routing == "none" and not visual_prefix)
    model(pixel_values=torch.randn(3, 3, SIZE, SIZE), **texts()).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_projection_that_nothing_reads_is_refused():
    for settings, why in (
        ({"routing": "none"}, "a routing that reads no image"),
        ({"image_projection": "own"}, "image_projection='own'"),
    ):
        config = RoutingConfig(rank=4, targets=KINDS["bart"][4], **settings)
        with pytest.raises(ConfigError, match=f"project_features: {why} without a visual prefix has no use for it"):
            VisionTextForGeneration.from_backbones(
                small_vit(), text_model("bart"), config, visual_prefix=False, project_features=True
            )


@pytest.mark.parametrize(("kind", "routing"), [("t5", "vllora"), ("bart", "mul")])
def test_both_backends_compute_the_same(kind, routing):
    inputs, images = texts(), features(3, 1)
    found = {}
    for backend in ("eager", "triton"):
        model = randomise(writer(kind, routing=routing, backend=backend)).train()
        loss = model(vision_features=images, **inputs).loss
        loss.backward()
        found[backend] = loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found["triton"][0], found["eager"][0])
    assert any("decoder" in name for name in found["eager"][1])
    for name, gradient in found["eager"][1].items():
        torch.testing.assert_close(found["triton"][1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"pass labels= \(or decoder_input_ids=\)"),
        ({"labels": torch.zeros(2, 4, dtype=torch.long)}, "labels have batch 2, the images 3"),
        ({"labels": torch.zeros(3, 41, dtype=torch.long)}, "labels of 41 tokens exceed the text model's 40"),
        (
            {"labels": torch.zeros(3, 4, dtype=torch.long), "image_mask": torch.ones(3, 2, dtype=torch.bool)},
            r"image_mask must be torch.bool \[3, 1\]",
        ),
        ({"labels": torch.full((3, 4), 999)}, "labels must be from 0 to"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        writer("bart")(vision_features=features(3, 1), **arguments)


def test_a_decoder_is_refused():
    with pytest.raises(ConfigError, match=r"generated answers need an encoder-decoder, such as BART or T5, .*'gpt2'"):
        VisionTextForGeneration.from_backbones(None, small_gpt2(), RoutingConfig(rank=4))


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize(("routed_by", "routing"), [("encoder", "mul"), ("encoder_tokens", "vllora")])
def test_the_decoder_may_be_routed_by_the_encoders_states(kind, routed_by, routing):
    """Beams, padding and the image in the encoder as before; the decoder's bottlenecks read no image of their own."""
    config = RoutingConfig(rank=4, alpha=8, routing=routing, targets=KINDS[kind][4], routed_by=routed_by)
    model = VisionTextForGeneration.from_backbones(None, text_model(kind), config).eval()
    model, inputs, images = randomise(model), texts(), features(3, 1)
    read = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    written = model.generate(vision_features=images, **read, num_beams=3, max_new_tokens=5, eos_token_id=None)
    for i, row in enumerate(written):
        length = int(read["attention_mask"][i].sum())
        one = {key: value[i : i + 1, :length] for key, value in read.items()}
        alone = model.generate(
            vision_features=images[i : i + 1], **one, num_beams=3, max_new_tokens=5, eos_token_id=None
        )
        assert torch.equal(row, alone[0])
    model.train()
    model(vision_features=images, **inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
