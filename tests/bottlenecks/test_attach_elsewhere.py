"""attach and bind_image with other programs: Trainer, PEFT, copies, threads, encoder-decoders; what they refuse."""

import contextlib
import copy
import threading

import pytest
import torch
import transformers as hf
from test_attach import by_hand, routed
from torch import nn
from vlms import VLMS, WIDTH, batch_for

import routingvl
from routingvl import RoutingConfig, inject
from routingvl.bottlenecks.attach import BindingError

PROJECTOR = VLMS["llava"].image_from
GENERATION = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
GENERATION |= {"suppress_tokens": [96, 97, 98, 99]}


@pytest.fixture(scope="module")
def llava():
    return routed("llava")


@contextlib.contextmanager
def attached(model, *args, **options):
    handle = routingvl.attach(model, *args, **options)
    try:
        yield handle
    finally:
        handle.remove()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(found, want) -> None:
    assert found.keys() == want.keys()
    assert len(found) > 3
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


# -------------------------------------------------------------------------------------------------- recomputation


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "nearest"])
def test_two_passes_before_one_backward_pass(llava, reentrant, trained, pooling):
    """Each is recomputed with its own image, though another is bound by then; the projector's gradients too."""
    model = llava
    model.get_submodule(PROJECTOR).requires_grad_(trained)
    batches = [batch_for("llava", seed=seed) for seed in (1, 2)]

    def passes():
        (model(**batches[0]).loss + 2 * model(**batches[1]).loss).backward()

    with attached(model, PROJECTOR, image_pooling=pooling):
        model.train()
        passes()
        want = gradients(model)
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        with routingvl.bind_image(model, torch.randn(2, 1, WIDTH)):
            pass  # one that is over
        one, two = (model(**batch).loss for batch in batches)
        with routingvl.bind_image(model, torch.randn(2, 1, WIDTH)):
            (one + 2 * two).backward()
        assert_same(gradients(model), want)
        model.activation_checkpointing_disable()
    assert any("projector" in name for name in want) == trained
    model.get_submodule(PROJECTOR).requires_grad_(False)
    model.eval()


# -------------------------------------------------------------------------------------------------------- Trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_trainer_with_nothing_bound_by_hand(tmp_path, checkpointing):
    """Seven rows in batches of two, one row a text alone: the weights after an epoch are those of a loop by hand."""
    rows = [batch_for("llava", (0,) if seed == 3 else (1,), seed=seed) for seed in range(7)]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    def collate(items):
        longest = max(item["input_ids"].shape[1] for item in items)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        pad = lambda x, value: nn.functional.pad(x, (longest - x.shape[1], 0), value=value)  # noqa: E731
        batch = {name: torch.cat([pad(item[name], value) for item in items]) for name, value in fill.items()}
        return {**batch, "pixel_values": torch.cat([item["pixel_values"] for item in items if "pixel_values" in item])}

    model, other = routed("llava"), routed("llava")
    batches = [collate([rows[i] for i in range(start, min(start + 2, 7))]) for start in range(0, 7, 2)]
    optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    other.train()
    for batch in batches:
        features, _ = by_hand("llava", other, batch)
        mask = (batch["input_ids"] == 99).any(1, keepdim=True)
        optimizer.zero_grad()
        with routingvl.bind_image(other, features, mask=mask, text_only="skip"):
            other(**batch).loss.backward()
        optimizer.step()
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, num_train_epochs=1, learning_rate=0.1, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], save_strategy="no", use_cpu=True,
        remove_unused_columns=False, train_sampling_strategy="sequential", logging_steps=1, disable_tqdm=True,
        gradient_checkpointing=checkpointing is not None, gradient_checkpointing_kwargs=checkpointing,
    )  # fmt: skip
    with attached(model, PROJECTOR):
        hf.Trainer(model, arguments, train_dataset=Rows(), data_collator=collate).train()
    model.to("cpu")
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=name)


# ------------------------------------------------------------------------------------------- who calls the model


def test_a_copy_binds_its_own_image(llava):
    batch, other = batch_for("llava"), batch_for("llava", seed=2)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with attached(llava, PROJECTOR), torch.no_grad():
        twin = copy.deepcopy(llava)
        want, tokens = llava(**batch).logits, llava.generate(**inputs, **GENERATION)
        for parameter in llava.parameters():
            parameter.data = parameter.data.clone()
    for parameter in twin.parameters():
        assert parameter.shape is not None
    with torch.no_grad():
        assert torch.equal(twin(**batch).logits, want)
        assert torch.equal(twin.generate(**inputs, **GENERATION), tokens)
        assert not torch.allclose(twin(**other).logits[:, -1], want[:, -1], atol=1e-3)
        with pytest.raises(RuntimeError, match="no visual features bound"):
            llava(**batch)
    assert twin.generate.__self__.model is twin


def test_generate_of_a_model_around_it(llava):
    """PEFT's models call generate of what they wrap."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(llava)
    inputs = {key: value for key, value in batch_for("llava").items() if key != "labels"}
    with attached(model, PROJECTOR):
        want = model.generate(**inputs, **GENERATION)
        around = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))
        assert torch.equal(around.generate(**inputs, **GENERATION), want)
        assert torch.equal(around(**inputs).logits, model(**inputs).logits)


def test_threads_have_their_own_image(llava):
    batches = {seed: batch_for("llava", seed=seed) for seed in (1, 2)}
    found, barrier = {}, threading.Barrier(2)

    def work(seed):
        with torch.no_grad():
            for _ in range(3):
                barrier.wait()
                found[seed] = llava(**batches[seed]).logits

    with attached(llava, PROJECTOR):
        with torch.no_grad():
            want = {seed: llava(**batch).logits for seed, batch in batches.items()}
        threads = [threading.Thread(target=work, args=(seed,)) for seed in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[seed], want[seed]) for seed in batches)


def test_an_image_bound_by_hand_goes_first(llava):
    batch, image = batch_for("llava"), torch.randn(2, 1, WIDTH)
    with torch.no_grad(), routingvl.bind_image(llava, image):
        want = llava(**batch).logits
        with attached(llava, PROJECTOR):
            assert torch.equal(llava(**batch).logits, want)


def test_errors_leave_nothing_bound(llava):
    batch = batch_for("llava")
    with attached(llava, PROJECTOR):
        for call in (llava, llava.generate):
            with pytest.raises(Exception, match=r"."):
                call(**{**batch, "input_ids": batch["input_ids"].float()})
        with torch.no_grad():
            assert torch.isfinite(llava(**batch).loss)
    with pytest.raises(RuntimeError, match="no visual features bound"):
        llava(**batch)


# ----------------------------------------------------------------------------------------------- a function's image


def text_model(name: str):
    torch.manual_seed(0)
    ends = {"eos_token_id": 2, "pad_token_id": 0}
    if name == "t5":
        shape = {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        model = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=64, decoder_start_token_id=0, **shape, **ends))
        targets = ("q", "v")
    else:
        shape = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.0}
        shape |= {f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in SIZES.items()}
        config = hf.BartConfig(vocab_size=64, decoder_start_token_id=2, forced_eos_token_id=None, **shape, **ends)
        model, targets = hf.BartForConditionalGeneration(config), ("q_proj", "v_proj")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    inject(model.eval(), RoutingConfig(routing="mul", rank=4, alpha=8, targets=targets, train_bias=False))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.3)
    return model


SIZES = {"attention_heads": 4, "ffn_dim": 48}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_find_their_beams(name):
    """The encoder runs on the texts, the decoder on their beams: the features serve both, each row as if alone."""
    model = text_model(name)
    ids = torch.randint(3, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    image = torch.randn(3, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "min_new_tokens": 6}
    found = []
    for cache in (True, False):
        with routingvl.bind_image(model, image, decoding=True):
            found.append(model.generate(input_ids=ids, use_cache=cache, **options))
    with attached(model, lambda batch: batch.pop("image")):
        found.append(model.generate(input_ids=ids, image=image, **options))
        found.append(model.generate(ids, image=image, **options))
        with torch.no_grad():
            logits = model(ids, labels=ids, image=image).logits
            with pytest.raises(KeyError, match="image"):
                model(ids, labels=ids)
    with torch.no_grad(), routingvl.bind_image(model, image):
        assert torch.equal(model(ids, labels=ids).logits, logits)
    assert all(torch.equal(found[0], other) for other in found[1:])
    for row in range(3):
        with routingvl.bind_image(model, image[row : row + 1], decoding=True):
            assert torch.equal(model.generate(input_ids=ids[row : row + 1], **options)[0], found[0][row])
    with routingvl.bind_image(model, -3 * image, decoding=True):
        assert not torch.equal(model.generate(input_ids=ids, **options), found[0])


def test_a_function_may_give_a_mask_and_no_image():
    model = text_model("bart")
    ids = torch.randint(3, 64, (2, 6))
    features, mask = torch.randn(2, 3, WIDTH), torch.tensor([[True, True, False], [False] * 3])
    with attached(model, lambda batch: batch.pop("image", None)), torch.no_grad():
        got = model(ids, labels=ids, image=(features, mask)).logits
        text = model(ids, labels=ids).logits
    with torch.no_grad(), routingvl.bind_image(model, features[:1, :2]):
        torch.testing.assert_close(got[:1], model(ids[:1], labels=ids[:1]).logits)
    torch.testing.assert_close(got[1], text[1])
    assert not torch.allclose(got[0], text[0])


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["model.projector"], {}, r"no sub-module.*model\.multi_modal_projector"),
        (["linear_1x"], {}, "no sub-module"),
        (["q_proj"], {}, "more than one sub-module"),
        ([3], {}, "image_from must be"),
        ([PROJECTOR], {"image_pooling": "max"}, "image_pooling='max'"),
        ([PROJECTOR], {"text_only": "drop"}, "text_only='drop'"),
    ],
)
def test_arguments_that_fit_nothing(llava, arguments, options, message):
    with pytest.raises(BindingError, match=message):
        routingvl.attach(llava, *arguments, **options)
    assert not llava._forward_pre_hooks


def test_attached_once_only(llava):
    with attached(llava, PROJECTOR), pytest.raises(BindingError, match="already"):
        routingvl.attach(llava, PROJECTOR)
    assert "generate" not in vars(llava)


def test_a_model_without_routed_layers():
    with pytest.raises(BindingError, match="no routed layers"), routingvl.bind_image(nn.Linear(2, 2), None):
        pass


def test_tokens_that_find_no_place(llava):
    """The tower gives five tokens an image, one more than the text has places for."""
    with attached(llava, "model.vision_tower"), pytest.raises(BindingError, match=r"\[3, 5, 24\].*places for \[8, 4\]"):
        llava(**batch_for("llava", (2, 1)))
    with pytest.raises(BindingError, match="ModuleList, which has no output"):
        routingvl.attach(llava, "model.vision_tower.encoder.layers")


def test_an_image_that_does_not_come(llava):
    batch = batch_for("llava")
    unused = copy.deepcopy(llava)
    unused.model.unused = nn.Linear(2, 2)
    with attached(unused, "model.unused"), pytest.raises(BindingError, match=r"did not run"):
        unused(**batch)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    following = torch.full((2, 1), 7)
    with attached(llava, PROJECTOR), torch.no_grad():
        cache = llava(**inputs, use_cache=True).past_key_values
        with pytest.raises(BindingError, match="bind the prompt's image around the whole loop"):
            llava(input_ids=following, past_key_values=cache)
        texts = batch_for("llava", (0, 0))
        llava(**texts, use_cache=True)


def test_packed_texts_are_refused(llava):
    batch = batch_for("llava", (2,))
    length = batch["input_ids"].shape[1]
    positions = torch.cat([torch.arange(7), torch.arange(length - 7)])[None]
    with attached(llava, PROJECTOR):
        with pytest.raises(BindingError, match="packed into one row"):
            llava(**batch, position_ids=positions)
        with pytest.raises(BindingError, match="packed into one row"):
            llava(**batch, cu_seq_lens_q=torch.tensor([0, 7, length]))
        llava(**batch, position_ids=torch.arange(length)[None])


def test_an_image_after_its_layers_is_an_error(llava):
    model = copy.deepcopy(llava)
    inject(model.model.vision_tower, RoutingConfig(routing="mul", rank=4, targets=("q_proj",)))
    with attached(model, PROJECTOR), pytest.raises(BindingError, match="before image_from"):
        model(**batch_for("llava"))
