"""attach(image_pooling="nearest"): every token of the text reads the nearest image before it, within its own text."""

import pytest
import torch
from test_attach import image_of, routed
from vlms import IMAGE, VLMS, batch_for

import routingvl
from routingvl.bottlenecks.nearest import nearest_images
from routingvl.bottlenecks.rows import BindingError, refuse_packed_rows

NAMES = ["llava", "paligemma", "qwen2_vl"]


def by_hand(name, model, batch):
    """The mean of each image [I, 1, d], and the index of each token, by a loop over the text."""
    tokens = image_of(name, model, batch).flatten(0, -2)
    means, index, past = [], torch.full_like(batch["input_ids"], -1), 0
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for place, token in enumerate(ids):
            if token == IMAGE and (place == 0 or ids[place - 1] != IMAGE):
                length = next(n for n in range(len(ids)) if ids[place + n] != IMAGE)
                means.append(tokens[past : past + length].mean(0, keepdim=True))
                past += length
            seen = any(token == IMAGE for token in ids[: place + 1])
            index[row, place] = len(means) - 1 if seen else -1
    return torch.stack(means), index


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    model, batch = routed(request.param), batch_for(request.param, (2, 0, 1))
    return request.param, model, batch, *by_hand(request.param, model, batch)


def test_it_is_the_index_bound_by_hand(case):
    name, model, batch, features, index = case
    with torch.no_grad():
        with routingvl.bind_image(model, features, image_index=index, text_only="skip"):
            want = model(**batch).logits
        handle = routingvl.attach(model, VLMS[name].image_from, image_pooling="nearest")
        got = model(**batch).logits
        handle.remove()
        handle = routingvl.attach(model, VLMS[name].image_from)
        mean = model(**batch).logits
        handle.remove()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got[0] - mean[0]).abs().max() > 1e-3  # a row of two images is another


def test_it_trains(case):
    name, model, batch, features, index = case
    with routingvl.bind_image(model, features, image_index=index, text_only="skip"):
        want = torch.autograd.grad(model(**batch).loss, [p for p in model.parameters() if p.requires_grad])
    handle = routingvl.attach(model, VLMS[name].image_from, image_pooling="nearest")
    found = torch.autograd.grad(model(**batch).loss, [p for p in model.parameters() if p.requires_grad])
    handle.remove()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("beams", "cache"), [(1, True), (3, True), (1, False)])
def test_generate(case, beams, cache):
    name, model, batch, features, index = case
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "use_cache": cache}
    with routingvl.bind_image(model, features, image_index=index, text_only="skip", decoding=True):
        want = model.generate(**inputs, **options)
    handle = routingvl.attach(model, VLMS[name].image_from, image_pooling="nearest")
    got = model.generate(**inputs, **options)
    handle.remove()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", NAMES)
def test_generate_with_and_without_a_cache_is_the_same(name):
    model, batch = routed(name), batch_for(name, (2, 1))
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    handle = routingvl.attach(model, VLMS[name].image_from, image_pooling="nearest")
    cached, uncached = (model.generate(**inputs, **options, use_cache=cache) for cache in (True, False))
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, **options, prefill_chunk_size=4)
    handle.remove()
    torch.testing.assert_close(uncached.logits, cached.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [0, 1, 7])
def test_texts_packed_into_a_row_are_the_texts_apart(first):
    model = routed("llava")
    batch = batch_for("llava", (1, 2))
    texts = [ids[ids != 0][None] for ids in batch["input_ids"]]
    pixels = batch["pixel_values"].split([1, 2])
    packed = {
        "input_ids": torch.cat(texts, 1),
        "position_ids": torch.cat([first + torch.arange(text.shape[1]) for text in texts])[None],
        "pixel_values": batch["pixel_values"],
        "use_cache": False,  # with a cache transformers does not keep packed texts apart
    }
    handle = routingvl.attach(model, VLMS["llava"].image_from, image_pooling="nearest")
    with torch.no_grad():
        apart = []
        for ids, images in zip(texts, pixels, strict=True):
            positions = first + torch.arange(ids.shape[1])[None]
            apart.append(model(input_ids=ids, pixel_values=images, position_ids=positions).logits)
        got = model(**packed).logits
    handle.remove()
    torch.testing.assert_close(got, torch.cat(apart, 1), rtol=1e-4, atol=1e-4)


class Config:
    image_token_id, video_token_id = 9, 8


def index_of(ids, outputs, **batch):
    return nearest_images(outputs, torch.tensor(ids), batch, Config, "it")


def test_where_texts_begin():
    ids, tokens = [[1, 9, 9, 2, 3, 9, 4]], [torch.arange(3.0)[:, None]]
    features, index = index_of(ids, tokens)
    assert features.flatten().tolist() == [0.5, 2.0]
    assert index.tolist() == [[-1, 0, 0, 0, 0, 1, 1]]
    begins = {
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
        "cu_seq_lens_q": torch.tensor([0, 4, 7], dtype=torch.int32),
        "seq_idx": torch.tensor([[0, 0, 0, 0, 1, 1, 1]]),
    }
    for key, value in begins.items():
        assert index_of(ids, tokens, **{key: value})[1].tolist() == [[-1, 0, 0, 0, -1, 1, 1]], key
    positions, padded = begins["position_ids"], torch.tensor([0, 4, 7, 7])
    for same in (
        {"position_ids": positions + 1},
        {"position_ids": torch.stack([positions, *torch.zeros(3, 1, 7).long()])},  # text, then Qwen2-VL's three
        {"cu_seq_lens_q": padded},
    ):
        assert index_of(ids, tokens, **same)[1].tolist() == [[-1, 0, 0, 0, -1, 1, 1]], same
        with pytest.raises(BindingError, match="packed into one row"):
            refuse_packed_rows(same)
    rows = index_of(ids * 2, tokens * 2, position_ids=positions)[1]  # one row of positions for all
    assert rows.tolist() == [[-1, 0, 0, 0, -1, 1, 1], [-1, 2, 2, 2, -1, 3, 3]]


def test_rows_that_are_one_text_are_not_packed():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 1]])
    counted = mask.cumsum(1) - 1
    for positions in (counted, counted.masked_fill(mask == 0, 0), counted.masked_fill(mask == 0, 1)):
        refuse_packed_rows({"position_ids": positions, "attention_mask": mask})
        ids, tokens = (
            torch.where(mask == 0, 0, torch.tensor([[5, 5, 9, 5, 5], [9, 5, 5, 5, 5], [5, 9, 5, 5, 5]])),
            [torch.ones(3, 1)],
        )
        index = nearest_images(tokens, ids, {"position_ids": positions, "attention_mask": mask}, Config, "it")[1]
        assert [index[0, 2:].tolist(), index[1, :3].tolist(), index[2, [0, 1, 4]].tolist()] == [
            [0] * 3,
            [1] * 3,
            [-1, 2, 2],
        ]
    refuse_packed_rows({"position_ids": torch.arange(4)[None] + 2, "attention_mask": torch.ones(2, 4)})


def test_what_an_image_is():
    side_by_side = [[9, 9, 9, 9, 1]]
    features, index = index_of(side_by_side, [torch.arange(4.0).view(2, 2, 1)])  # two entries
    assert (features.flatten().tolist(), index.tolist()) == ([0.5, 2.5], [[0, 0, 1, 1, 1]])
    features, index = index_of(side_by_side, [torch.arange(4.0)[:, None]])  # nothing says that they are two
    assert (features.flatten().tolist(), index.tolist()) == ([1.5], [[0] * 5])
    features, index = index_of([[9, 1, 8, 8], [1, 9, 9, 1]], [torch.arange(3.0)[:, None], torch.arange(2.0)[:, None]])
    assert (features.flatten().tolist(), index.tolist()) == ([0.0, 1.5, 0.5], [[0, 0, 2, 2], [-1, 1, 1, 1]])


def test_what_does_not_fit_is_an_error():
    with pytest.raises(BindingError, match=r"gave \[3, 1\], and input_ids have 2 places.*'nearest' needs a module"):
        index_of([[9, 9]], [torch.zeros(3, 1)])
    with pytest.raises(BindingError, match="have no places"):
        index_of([[1, 2]], [torch.zeros(3, 1)])
    model = routed("blip2_t5")
    handle = routingvl.attach(model, VLMS["blip2_t5"].image_from, image_pooling="nearest")
    with pytest.raises(BindingError, match="a decoder behind an encoder has a text of its own"):
        model(**batch_for("blip2_t5"))
    handle.remove()
    model, batch = routed("llava"), batch_for("llava")
    features = torch.zeros(2, 1, 32)
    handle = routingvl.attach(model, lambda batch: features, image_pooling="nearest")
    with pytest.raises(BindingError, match="a function says by itself which image each token reads"):
        model(**batch)
    handle.remove()


def test_a_function_may_name_the_image_of_each_token():
    model, batch = routed("llava"), batch_for("llava")
    features, index = torch.randn(3, 1, 32), torch.randint(-1, 3, batch["input_ids"].shape)
    with torch.no_grad():
        with routingvl.bind_image(model, features, image_index=index, text_only="skip"):
            want = model(**batch).logits
        for pooling in ("mean", "nearest"):
            handle = routingvl.attach(model, lambda batch: (features, None, index), image_pooling=pooling)
            assert torch.equal(model(**batch).logits, want)
            handle.remove()
