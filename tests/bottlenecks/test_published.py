"""State dicts of the published code, loaded into models of ours."""

import pytest
import torch
from tiny import answerer, batch, captioner, randomise

from routingvl import load_reference_state_dict
from routingvl.bottlenecks.checkpoint import CheckpointError


def test_reference_state_dict_accepts_ddp_names_and_tied_heads():
    model, other = randomise(captioner()), captioner()
    state = {f"module.{k}": v for k, v in model.state_dict().items() if not k.startswith("vit.")}
    assert "module.gpt.lm_head.weight" in state
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
