"""Agreement with the published code: outputs, losses, every gradient, trainable names and counts, to 1e-10."""

from __future__ import annotations

import pytest
import torch
from golden_cases import LAYER_CASES, MODEL_CASES, Tensors, build_layer, build_model

from routingvl import load_reference_state_dict

TOLERANCE = 1e-10  # relative to the tensor's largest value


def assert_equals(name: str, got: torch.Tensor | None, want: torch.Tensor) -> None:
    assert got is not None, f"{name}: no value"
    assert got.shape == want.shape, f"{name}: shape {list(got.shape)}, published {list(want.shape)}"
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-300)
    assert error <= TOLERANCE, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case["id"])
def test_layer(case):
    tensors = Tensors(case)
    layer = build_layer(case, tensors.under("param"))
    x = tensors["input/x"].requires_grad_()
    v = tensors["input/vis_feat"].requires_grad_() if "input/vis_feat" in tensors else None
    y = layer(x, v)
    loss = (y * tensors["input/cotangent"]).sum()
    loss.backward()
    # With several visual tokens the published code reshapes where a transpose is meant; ours is the formula.
    want = tensors if case["reference_equals_true_transpose_formula"] else Tensors.under(tensors, "true_transpose")
    assert_equals("y", y, want["output/y"])
    assert_equals("loss", loss, want["output/loss"])
    assert_equals("dx", x.grad, want["grad_input/x"])
    if "grad_input/vis_feat" in want and case["routing"] != "none":
        assert_equals("dv", v.grad, want["grad_input/vis_feat"])
    parameters = dict(layer.named_parameters())
    trainable = [name for name, parameter in parameters.items() if parameter.requires_grad]
    assert sorted(trainable) == sorted(case["trainable"])
    for name in trainable:
        assert_equals(name, parameters[name].grad, want[f"grad/{name}"])
    assert sum(parameters[name].numel() for name in trainable) == case["n_trainable"]
    assert sum(parameter.numel() for parameter in parameters.values()) == case["n_total"]


@pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: case["id"])
def test_model(case):
    tensors = Tensors(case)
    model = build_model(case)
    names = load_reference_state_dict(model, tensors.under("param"))
    ids, mask = tensors["input/input_ids"], tensors["input/mask"].long()
    features = tensors["input/vision_hidden_states"].requires_grad_()
    if model.visual_prefix:
        assert bool((mask[:, 0] == 1).all())
        mask = mask[:, 1:]
    labels = ids if "gpt" in case["loss"] else tensors["input/target"]
    loss, logits = model(vision_features=features, input_ids=ids, attention_mask=mask, labels=labels)
    loss.backward()
    assert_equals("logits", logits, tensors["output/logits"])
    assert_equals("loss", loss, tensors["output/loss"])
    assert loss.item() == pytest.approx(case["loss_value"], rel=TOLERANCE)
    if "vision_hidden_states" not in case.get("inputs_without_grad", []):
        assert_equals("vision", features.grad, tensors["grad_input/vision_hidden_states"])
    parameters = dict(model.named_parameters())
    for published in case["trainable"]:
        assert_equals(published, parameters[names[published]].grad, tensors[f"grad/{published}"])
    assert sorted(model.report.names) == sorted(names[name] for name in case["trainable"])
    assert model.report.trainable == case["n_trainable"]
    assert model.report.total == case["n_total"]
