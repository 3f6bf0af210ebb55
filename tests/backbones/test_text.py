"""Language models by their rows: the class that is loaded, what is unwrapped and refused, and their positions."""

import pytest
import torch
from tiny import small_gpt2, small_vit, write_tiny
from transformers import GPT2LMHeadModel, GPT2Model, RobertaConfig, RobertaForMaskedLM, RobertaModel

from routingvl.backbones.loading import BackboneError
from routingvl.backbones.text import READ, WRITE, fuse_gelu, load_text, position_limit, text_body

SHAPE = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": 12, "pad_token_id": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("use", "kind", "cls"),
    [(READ, "roberta", RobertaModel), (WRITE, "gpt2", GPT2LMHeadModel), (READ, "gpt2", GPT2Model)],
)
def test_loaded_in_float32_as_the_class_of_its_use(tiny, use, kind, cls):
    model = load_text(use, str(tiny / kind))
    assert type(model) is cls
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert text_body(use, model) is model


def test_a_model_with_another_head_holds_the_body():
    with_head = RobertaForMaskedLM(RobertaConfig(**SHAPE))
    with pytest.raises(BackboneError, match="needs its pooler: load RobertaModel with add_pooling_layer=True"):
        text_body(READ, with_head)
    with_head.roberta = RobertaModel(with_head.config)
    assert text_body(READ, with_head) is with_head.roberta
    with pytest.raises(BackboneError, match="type 'roberta' is an encoder, which cannot write: give a decoder"):
        text_body(WRITE, with_head)
    with pytest.raises(BackboneError, match="needs its language modelling head: load GPT2LMHeadModel"):
        text_body(WRITE, small_gpt2().base_model)
    with pytest.raises(BackboneError, match="is of type 'vit', which is no language model"):
        text_body(READ, small_vit())


def test_as_many_tokens_as_fit_run(tiny):
    roberta = RobertaModel(RobertaConfig(**SHAPE))
    assert position_limit(roberta) == 10  # two of the twelve belong to the padding and what is before it
    roberta(input_ids=torch.full((1, 10), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=torch.full((1, 11), 5))
    assert position_limit(load_text(WRITE, str(tiny / "gpt2"))) == 40


def test_fused_gelu_is_the_same_function(tiny):
    model, tokens = load_text(WRITE, str(tiny / "gpt2")), torch.arange(6)[None]
    want = model(tokens).logits
    fuse_gelu(model)
    assert type(model.transformer.h[0].mlp.act) is torch.nn.GELU
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-5, atol=1e-6)
