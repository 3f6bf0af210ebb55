"""The published code's numbers through the Triton backend, in float32."""

from __future__ import annotations

import pytest
import torch
from golden_cases import LAYER_CASES, MODEL_CASES, Tensors, build_layer, build_model
from tolerances import relative_rms

from routingvl import load_reference_state_dict
from routingvl.kernels.optional_triton import interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="neither a GPU nor Triton's interpreter")

TOLERANCE = 1e-5  # relative RMS, after a layer's few products; a model's layers add up to TOLERANCE_OF_MODEL
TOLERANCE_OF_MODEL = 1e-4


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTINGVL_BACKEND", "triton")


@pytest.mark.parametrize("case", LAYER_CASES, ids=lambda case: case["id"])
def test_layer(case: dict) -> None:
    tensors = Tensors(case)
    layer = build_layer(case, tensors.under("param")).to(DEVICE, torch.float32)
    x, v, cotangent = (
        tensors[name].to(DEVICE, torch.float32) if name in tensors else None
        for name in ("input/x", "input/vis_feat", "input/cotangent")
    )
    y = layer(x.requires_grad_(), v)
    y.backward(cotangent)
    want = tensors if case["reference_equals_true_transpose_formula"] else tensors.under("true_transpose")
    found = {"output/y": y, "grad_input/x": x.grad}
    found |= {f"grad/{name}": p.grad for name, p in layer.named_parameters() if p.requires_grad}
    errors = {name: relative_rms(tensor.cpu(), want[name]) for name, tensor in found.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("case", MODEL_CASES[::6], ids=lambda case: case["id"])
def test_model(case: dict) -> None:
    tensors = Tensors(case)
    model = build_model(case)
    names = load_reference_state_dict(model, tensors.under("param"))
    model.to(DEVICE, torch.float32)
    ids, mask = tensors["input/input_ids"].to(DEVICE), tensors["input/mask"].long().to(DEVICE)
    labels = ids if "gpt" in case["loss"] else tensors["input/target"].to(DEVICE, torch.float32)
    features = tensors["input/vision_hidden_states"].to(DEVICE, torch.float32)
    mask = mask[:, 1:] if model.visual_prefix else mask
    loss, logits = model(vision_features=features, input_ids=ids, attention_mask=mask, labels=labels)
    loss.backward()
    assert relative_rms(logits.cpu(), tensors["output/logits"]) < TOLERANCE_OF_MODEL
    parameters = dict(model.named_parameters())
    errors = {
        name: relative_rms(parameters[names[name]].grad.cpu(), tensors[f"grad/{name}"]) for name in case["trainable"]
    }
    assert max(errors.values()) < TOLERANCE_OF_MODEL, errors
