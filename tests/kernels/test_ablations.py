"""The routing functions of the paper's ablations: values by hand, gradients, both operations, what is refused."""

from functools import partial

import pytest
import torch
from routed_cases import defined_linear, options, tensors
from tolerances import assert_as_good_as

from routingvl.kernels import ABLATIONS, ROUTINGS, find_routing, routed_adapter, routed_lora_linear, select_backend
from routingvl.kernels.reference import reference_adapter
from routingvl.kernels.routing import routing_table

T = torch.tensor([[[1.0, -2.0], [3.0, 4.0]]], dtype=torch.float64)  # two rows of text, R = 2
U = torch.tensor([[[5.0, -6.0]]], dtype=torch.float64)  # one visual token

# By hand. vllora_ones: inner products 17 and -9; with ReLU 5 and 15. text_by_text: the sum of the text is [4, 2],
# inner products with it 0 and 20. Reshaped: rows of the same numbers, which come to -1 and 7, and -15 and 25.
BY_HAND = {
    ("vllora_ones", False): [[17.0, 17.0], [-9.0, -9.0]],
    ("vllora_ones", True): [[5.0, 5.0], [15.0, 15.0]],
    ("text_by_text", False): [[0.0, 0.0], [100.0, -120.0]],
    ("text_by_text_reshaped", False): [[-75.0, 90.0], [125.0, -150.0]],
}
FORMS = [(name, relu) for name, row in ABLATIONS.items() for relu in (False, True)[: 1 + row.supports_relu]]
CASES = [(*form, tokens) for form in FORMS for tokens in ((1, 4) if form[0] == "vllora_ones" else (1,))]


def test_every_form_has_a_hand_computed_value():
    assert sorted(BY_HAND) == sorted(FORMS)


@pytest.mark.parametrize(("name", "relu"), FORMS)
def test_value_by_hand(name, relu):
    assert ABLATIONS[name].route(T, U, relu).tolist() == [BY_HAND[name, relu]]


def test_several_visual_tokens_by_the_definition():
    t, u = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    ones = torch.ones(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(find_routing("vllora_ones").route(t, u, False), t @ u.mT @ ones)
    torch.testing.assert_close(find_routing("vllora_ones").route(t, u, True), t.relu() @ u.relu().mT @ ones)
    one = u[:, :1]
    for name, s in (("text_by_text", t.mT), ("text_by_text_reshaped", t.reshape(2, 4, 3))):
        torch.testing.assert_close(find_routing(name).route(t, one, False), t @ s @ one.expand(2, 3, 4))


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_backward_is_the_gradient(name, relu, tokens):
    row = ABLATIONS[name]
    t = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    u = torch.randn(3, tokens, 4, dtype=torch.float64, requires_grad=True)
    dz = torch.randn(3, 5, 4, dtype=torch.float64)
    want = torch.autograd.grad(row.route(t, u, relu), (t, u), dz)
    with torch.no_grad():
        torch.testing.assert_close(row.route_backward(dz, t, u, relu), want)


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
@pytest.mark.parametrize("placement", ["bottleneck", "output"])
@pytest.mark.parametrize("layout", ["plain", "c_attn"])
def test_lora(name, relu, tokens, placement, layout):
    chosen = options(name, relu, layout, placement=placement)
    op, plain = (partial(f, **chosen) for f in (routed_lora_linear, defined_linear))
    assert_as_good_as(op, plain, tensors(tokens, layout))


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_adapter(name, relu, tokens):
    sizes = {"x": (3, 5, 6), "v": (3, tokens, 6), "down_weight": (4, 6), "down_bias": (4,), "up_weight": (6, 4)}
    given = {key: torch.randn(*size, dtype=torch.float64) for key, size in (sizes | {"up_bias": (6,)}).items()}
    op, plain = (partial(f, routing=name, relu=relu) for f in (routed_adapter, reference_adapter))
    assert_as_good_as(op, plain, given)


def test_they_run_eagerly_and_stand_in_no_table():
    for name in ABLATIONS:
        assert name not in ROUTINGS
        assert f"| {name} " not in routing_table()
        backend, why = select_backend("cpu", "triton", routing=name, visual_tokens=1)
        assert (backend, "no branch in the Triton kernels" in why) == ("eager", True)


def test_text_by_text_takes_each_text_whole():
    given, chosen = tensors(), options("text_by_text", False)
    with pytest.raises(ValueError, match="takes each text whole, and beams of one image are not one text"):
        routed_lora_linear(**given | {"v": given["v"][:1]}, **chosen)
    with pytest.raises(ValueError, match="takes each text whole: there is no image_index for it"):
        routed_lora_linear(**given, **chosen, image_index=torch.zeros(3, 5, dtype=torch.long))
