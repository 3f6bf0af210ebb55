"""State dicts of the published code, loaded into models of ours."""

import pytest
import torch
from tiny import answerer, batch, captioner, randomise

from routingvl import load_reference_state_dict
from routingvl.bottlenecks.checkpoint import CheckpointError


def test_reference_state_dict_accepts_ddp_names_and_tied_heads():
    model, other = randomise(captioner()), captioner()
    state = {f"module.{k}": v for k, v in model.state_dict().items() if not k.startswith("vit.")}
    state["module.gpt.lm_head.weight"] = state["module.gpt.transformer.wte.weight"]  # as the published code saves it
    names = load_reference_state_dict(other, state)
    assert names["module.gpt.transformer.wte.weight"] == "gpt.transformer.wte.weight"
    assert torch.equal(other.eval()(**batch()).logits, model.eval()(**batch()).logits)


def test_reference_state_dict_is_strict():
    model = answerer()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("vit.")}
    before = model.classifier[0].weight.clone()
    bad = state | {"classifier.0.weight": before + 1}
    removed = bad.pop("roberta.encoder.layer.1.output.dense.bias")
    with pytest.raises(CheckpointError, match=r"missing roberta.encoder.layer.1.output.dense.bias"):
        load_reference_state_dict(model, bad)
    assert torch.equal(model.classifier[0].weight, before)
    bad["roberta.encoder.layer.1.output.dense.bias"] = removed
    with pytest.raises(CheckpointError, match=r"unexpected roberta.surprise"):
        load_reference_state_dict(model, bad | {"roberta.surprise": removed})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, key: {key: None}, "is of type NoneType"),
        (lambda state, key: {key: state[key].numpy()}, "is of type float32; weights must be"),
        (lambda state, key: {key: state[key].to_sparse()}, "must be dense"),
        (lambda state, key: {key: state[key].to("meta")}, "must be dense and hold data"),
        (lambda state, key: {key: state[key].long()}, "is of type torch.int64"),
        (lambda state, key: {key: state[key] * float("inf")}, "holds NaN or infinity"),
        (lambda state, key: {f"module.{key}": state[key] + 1}, "the same parameter under several names"),
        (
            lambda state, key: {"gpt.lm_head.weight": state["gpt.transformer.wte.weight"] + 1},
            "differs from the token embedding",
        ),
        (lambda state, key: {7: state[key]}, "a dict of names and tensors"),
    ],
)
def test_reference_state_dict_refuses_before_the_model_changes(change, message):
    model, other = captioner(), randomise(captioner())
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("vit.")}
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_reference_state_dict(other, state | change(state, "gpt.transformer.h.1.ln_1.weight"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(CheckpointError, match="a dict of names and tensors"):
        load_reference_state_dict(other, None)
