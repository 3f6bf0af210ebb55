"""The routing table: hand-computed values, gradients, the forms that must agree, and the errors."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from routingvl.kernels import routing
from routingvl.kernels.routing import ROUTINGS, find_routing, gram_is_cheaper, routing_table

T = torch.tensor([[[1.0, -2.0], [3.0, 4.0]]], dtype=torch.float64)  # two rows of text, R = 2
U = torch.tensor([[[5.0, -6.0]]], dtype=torch.float64)  # one visual token

# By hand. expand: row sums -1 and 7. vllora: inner products 17 and -9. relu: relu(t) . relu(u) is 5 and 15.
BY_HAND = {
    ("none", False): [[1.0, -2.0], [3.0, 4.0]],
    ("add", False): [[6.0, -8.0], [8.0, -2.0]],
    ("mul", False): [[5.0, 12.0], [15.0, -24.0]],
    ("expand", False): [[-5.0, 6.0], [35.0, -42.0]],
    ("vllora", False): [[85.0, -102.0], [-45.0, 54.0]],
    ("vllora", True): [[25.0, -30.0], [75.0, -90.0]],
}
# Each routing function, with and without ReLU where that is defined, and each number of visual tokens it takes.
FORMS = [(name, relu) for name, row in ROUTINGS.items() for relu in (False, True)[: 1 + row.supports_relu]]
CASES = [
    (*form, tokens) for form in FORMS for tokens in ((1, 2, 9) if ROUTINGS[form[0]].max_visual_tokens is None else (1,))
]


def naive_inner_product(t: Tensor, u: Tensor, relu: bool) -> Tensor:
    """The formula with loops over text rows and visual tokens."""
    z = torch.zeros_like(t)
    for b in range(t.shape[0]):
        for i in range(t.shape[1]):
            for j in range(u.shape[1]):
                left, right = (t[b, i].relu(), u[b, j].relu()) if relu else (t[b, i], u[b, j])
                z[b, i] += (left * right).sum() * u[b, j]
    return z


def test_every_form_has_a_hand_computed_value() -> None:
    assert sorted(BY_HAND) == sorted(FORMS)


@pytest.mark.parametrize(("name", "relu"), FORMS)
def test_value_by_hand(name: str, relu: bool) -> None:
    assert ROUTINGS[name].route(T, U, relu).tolist() == [BY_HAND[name, relu]]


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_backward_is_the_gradient(name: str, relu: bool, tokens: int) -> None:
    row = ROUTINGS[name]
    torch.manual_seed(tokens)
    t = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    u = torch.randn(3, tokens, 4, dtype=torch.float64, requires_grad=True)
    dz = torch.randn(3, 5, 4, dtype=torch.float64)
    want_t, want_u = torch.autograd.grad(row.route(t, u, relu), (t, u), dz, allow_unused=True)
    with torch.no_grad():
        dt, du = row.route_backward(dz, t, u, relu)
    torch.testing.assert_close(dt, want_t)
    if row.uses_image:
        torch.testing.assert_close(du, want_u)
    else:
        assert du is None
        assert want_u is None


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("text", "tokens", "rank"), [(5, 1, 4), (3, 7, 5), (40, 30, 4), (1, 6, 3)])
@pytest.mark.parametrize("name", [name for name, row in ROUTINGS.items() if row.inner_product])
def test_inner_product_for_any_number_of_tokens(name: str, text: int, tokens: int, rank: int, relu: bool) -> None:
    torch.manual_seed(0)
    t, u = torch.randn(2, text, rank, dtype=torch.float64), torch.randn(2, tokens, rank, dtype=torch.float64)
    torch.testing.assert_close(ROUTINGS[name].route(t, u, relu), naive_inner_product(t, u, relu))


@pytest.mark.parametrize("name", [name for name, row in ROUTINGS.items() if row.image_factor is not None])
def test_image_factor_is_all_that_the_image_adds(name: str) -> None:
    row = ROUTINGS[name]
    torch.testing.assert_close(row.route(T, U if row.uses_image else None, False), T + row.image_factor * U)


@pytest.mark.parametrize("name", [name for name, row in ROUTINGS.items() if row.elementwise])
def test_components_of_an_elementwise_function_may_be_taken_alone(name: str) -> None:
    row = ROUTINGS[name]
    whole, parts = row.route(T, U, False), [row.route(T[..., i : i + 1], U[..., i : i + 1], False) for i in range(4)]
    torch.testing.assert_close(torch.cat(parts, -1), whole)


@pytest.mark.parametrize("name", [name for name, row in ROUTINGS.items() if row.probe_backward])
def test_probe_backward_is_the_gradient(name: str) -> None:
    u, dp = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    p = ROUTINGS[name].probe(u)
    found = ROUTINGS[name].probe_backward(dp, u.detach())
    want = torch.autograd.grad(p, u, dp)[0] if p.requires_grad else None
    assert (found is None) == (want is None)
    if want is not None:
        torch.testing.assert_close(found, want)


def test_the_cheaper_order_is_taken() -> None:
    # 197 ViT tokens, rank 128: the two orders cost the same at L r / (2 L - r) = 94.8 rows of text.
    assert not gram_is_cheaper(94, 197, 128)
    assert gram_is_cheaper(95, 197, 128)
    assert not gram_is_cheaper(10_000, 1, 2)


@pytest.mark.parametrize("backward", [False, True])
def test_gram_is_summed_in_float32(backward: bool) -> None:
    torch.manual_seed(0)
    t, u = torch.randn(1, 300, 8).half(), torch.randn(1, 4000, 8).half()
    assert gram_is_cheaper(300, 4000, 8)
    row = ROUTINGS["vllora"]
    t, u = t / 64, u / 64
    got = row.route_backward(t, t, u, False)[0] if backward else row.route(t, u, False)
    wide_t, wide_u = t.double(), u.double()
    want = wide_t @ (wide_u.mT @ wide_u)
    # One rounding at the end and nothing else: half a unit in the last place.
    torch.testing.assert_close(got.double(), want, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize(("name", "relu"), [form for form in FORMS if ROUTINGS[form[0]].probe])
def test_rank_one_form(name: str, relu: bool) -> None:
    row = ROUTINGS[name]
    p = row.probe(U)
    left, right = (T.relu(), p.relu()) if relu else (T, p)
    torch.testing.assert_close((left @ right.mT) * U, row.route(T, U, relu))


def test_codes_are_distinct() -> None:
    codes = [row.code for row in ROUTINGS.values() if row.code is not None]
    assert len(codes) == len(set(codes))
    assert all(name == row.name for name, row in ROUTINGS.items())
    with pytest.raises(ValueError, match="two routing functions have one code"):
        routing._by_name([ROUTINGS["add"], replace(ROUTINGS["mul"], code=ROUTINGS["add"].code)])


def test_table_in_markdown_has_a_line_for_each() -> None:
    lines = routing_table().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(ROUTINGS)
    assert "| vllora | `z = t uᵀ u` | any | yes |" in lines


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown routing 'vlora'.*did you mean 'vllora'\?"):
        find_routing("vlora")
    with pytest.raises(ValueError, match=f"known are {', '.join(map(repr, ROUTINGS))}$"):
        find_routing("")


@pytest.mark.parametrize("name", [name for name, row in ROUTINGS.items() if row.max_visual_tokens == 1])
def test_one_visual_token_only(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' takes 1 visual token per image, got L=7: mean-pool first"):
        ROUTINGS[name].check(7, relu=False)
    ROUTINGS[name].check(1, relu=False)


def test_missing_image_and_relu_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"'mul' needs the visual tokens v \[B, L, K\], got v=None"):
        ROUTINGS["mul"].check(None, relu=False)
    with pytest.raises(ValueError, match="needs at least one visual token"):
        ROUTINGS["vllora"].check(0, relu=False)
    with pytest.raises(ValueError, match=r"relu=True is defined for routing vllora.*, not for 'add'"):
        ROUTINGS["add"].check(1, relu=True)
    ROUTINGS["none"].check(None, relu=False)
