"""The paper's ablations as layers: the published code's numbers, and where they may stand."""

import dataclasses

import pytest
import torch
from golden_cases import VARIANT_CASES, Tensors
from test_golden import assert_equals
from text_zoo import text_model
from transformers.pytorch_utils import Conv1D

from routingvl import RoutingConfig, inject
from routingvl.bottlenecks.layers import RoutedLoRALinear
from routingvl.bottlenecks.places import SurgeryError
from routingvl.kernels.routing import find_routing

TRAINED = ["bias", "lora_A", "lora_B"]


def built(case: dict, routing: str, parameters: dict[str, torch.Tensor]) -> RoutedLoRALinear:
    init = case["init"]
    third = init["out_features"] // 3
    layer = RoutedLoRALinear(
        Conv1D(init["out_features"], init["in_features"]),
        init["r"],
        routing=routing,
        alpha=init["lora_alpha"],
        slices=[(0, third), (2 * third, 3 * third)],
    ).double()
    layer.load_state_dict(parameters)
    layer.weight.requires_grad_(False)
    return layer


def gradients(y: torch.Tensor, given: dict[str, torch.Tensor], cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad((y * cotangent).sum(), list(given.values()))
    return {"y": y} | {f"d{name}": value for name, value in zip(given, found, strict=True)}


def ours(case: dict, tensors: Tensors, routing: str) -> dict[str, torch.Tensor]:
    layer = built(case, routing, tensors.under("param"))
    x, v = tensors["input/x"].requires_grad_(), tensors["input/vis_feat"].requires_grad_()
    given = {"x": x, "v": v, **{name: layer.get_parameter(name) for name in TRAINED}}
    return gradients(layer(x, v), given, tensors["input/cotangent"])


def published(tensors: Tensors) -> dict[str, torch.Tensor]:
    names = {"y": "output/y", "dx": "grad_input/x", "dv": "grad_input/vis_feat"}
    return {key: tensors[name] for key, name in (names | {f"d{name}": f"grad/{name}" for name in TRAINED}).items()}


def assert_same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, value in want.items():
        assert_equals(name, found[name], value)


@pytest.mark.parametrize(
    ("name", "routing"), [("e_beforeB_ones", "vllora_ones"), ("e_beforeB_xt", "text_by_text_reshaped")]
)
def test_layers_are_the_published_codes(name, routing):
    case = VARIANT_CASES[name]
    assert_same(ours(case, Tensors(case), routing), published(Tensors(case)))


@pytest.mark.parametrize("method", ["lora", "adapter"])
@pytest.mark.parametrize("routing", ["vllora", "vllora_ones"])
def test_padding_among_several_tokens_counts_nothing(method, routing):
    torch.manual_seed(0)
    model = text_model("roberta")
    inject(model, RoutingConfig(routing=routing, routed_by="text_tokens", rank=4, method=method))
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.3)
    alone, plain = model.eval()(torch.tensor([[3, 4]]))[0], torch.tensor([[3, 4, 5], [3, 4, 1]])
    padded = model(plain, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))[0]
    torch.testing.assert_close(padded[1:], alone)
    assert not torch.allclose(model(plain)[0][1:], alone, atol=1e-3)


def test_a_function_that_padding_changes_is_refused_where_there_is_some(monkeypatch):
    changed = dataclasses.replace(find_routing("vllora_ones"), takes_padding=False)
    monkeypatch.setattr("routingvl.bottlenecks.routed_layer.find_function", lambda name: changed)
    model = text_model("roberta")
    inject(model, RoutingConfig(routing="vllora_ones", routed_by="text_tokens", rank=4))
    ids = torch.tensor([[3, 4, 5], [3, 4, 1]])
    with pytest.raises(ValueError, match="may read something in zero padding: use routed_by='text', the mean"):
        model(ids, attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))


def test_text_by_text_is_refused_in_causal_models():
    for name in ("text_by_text", "text_by_text_reshaped"):
        for kind, settings in (("gpt2", {}), ("bart", {"method": "adapter"})):
            with pytest.raises(SurgeryError, match=rf"routing='{name}': .* is in a causal model"):
                inject(text_model(kind), RoutingConfig(routing=name, rank=4, **settings))
        report = inject(text_model("roberta"), RoutingConfig(routing=name, rank=4))
        assert {layer.routing for layer in report.layers} == {name}
