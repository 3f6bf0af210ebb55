"""routed_adapter against the definition: values, gradients, dtypes, shapes, what is computed, errors."""

from functools import partial

import pytest
import torch
from routed_cases import CASES, DTYPES, ShapeRecorder
from tolerances import assert_as_good_as, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routingvl.kernels import ACTIVATIONS, routed_adapter
from routingvl.kernels.reference import reference_adapter


def tensors(
    tokens: int = 1, *, sizes: tuple[int, ...] = (3, 5, 6, 4), biases: bool = True, seed: int = 0
) -> dict[str, Tensor | None]:
    """The operands in float64; sizes are B, T, K, R."""
    torch.manual_seed(seed)
    batch, text, width, rank = sizes
    return {
        "x": torch.randn(batch, text, width, dtype=torch.float64),
        "v": torch.randn(batch, tokens, width, dtype=torch.float64),
        "down_weight": torch.randn(rank, width, dtype=torch.float64) / width**0.5,
        "down_bias": torch.randn(rank, dtype=torch.float64) if biases else None,
        "up_weight": torch.randn(width, rank, dtype=torch.float64) / rank**0.5,
        "up_bias": torch.randn(width, dtype=torch.float64) if biases else None,
    }


def pair(name: str, relu: bool, **more):
    """The op and its definition with the same options."""
    kwargs = {"routing": name, "relu": relu, **more}
    return partial(routed_adapter, **kwargs), partial(reference_adapter, **kwargs)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_is_the_definition(name: str, relu: bool, tokens: int, activation: str, residual: bool) -> None:
    for biases in (True, False):
        assert_as_good_as(*pair(name, relu, activation=activation, residual=residual), tensors(tokens, biases=biases))


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_gradcheck(name: str, relu: bool, tokens: int) -> None:
    given = tensors(tokens, sizes=(2, 3, 4, 2), seed=1)
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    assert torch.autograd.gradcheck(pair(name, relu)[0], leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_errs_no_more_than_the_plain_composition(name: str, relu: bool, tokens: int, dtype: torch.dtype) -> None:
    given = tensors(tokens, sizes=(3, 17, 96, 13))
    # An image code of about unit length: vllora multiplies by its square, and where the activation saturates no
    # composition in half precision comes near the caps.
    for key in ("v", "down_bias"):
        given[key] *= (13 * tokens) ** -0.5
    for residual in (True, False):
        assert_as_good_as(*pair(name, relu, activation="gelu_new", residual=residual), given, dtype)


@pytest.mark.parametrize("sizes", [(1, 1, 8, 1), (4, 1, 7, 6), (1, 9, 2, 3), (0, 5, 6, 3), (3, 0, 6, 3)])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_odd_and_empty_shapes(name: str, relu: bool, tokens: int, sizes: tuple[int, ...]) -> None:
    assert_as_good_as(*pair(name, relu), tensors(tokens, sizes=sizes))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_non_contiguous_text(name: str, relu: bool, tokens: int, residual: bool) -> None:
    given = tensors(tokens)
    op, plain = pair(name, relu, residual=residual)
    want = run(plain, given, torch.ones(3, 5, 6, dtype=torch.float64))
    leaf = torch.stack([given["x"]] * 2, -1).requires_grad_()
    y = op(**{**given, "x": leaf[..., 1]})
    y.sum().backward()  # sends back a gradient of stride 0
    torch.testing.assert_close(y, want["y"])
    torch.testing.assert_close(leaf.grad[..., 1], want["dx"])


@pytest.mark.parametrize("needed", ["x", "v", "down_weight", "down_bias", "up_weight", "up_bias"])
@pytest.mark.parametrize(("name", "relu", "tokens"), [case for case in CASES if case[2] != 9])
def test_each_gradient_alone(name: str, relu: bool, tokens: int, needed: str) -> None:
    given = tensors(tokens)
    op, plain = pair(name, relu)
    if (needed, name) == ("v", "none"):
        given["v"].requires_grad_()
        assert not op(**given).requires_grad
        return
    dy = torch.randn(3, 5, 6, dtype=torch.float64)
    only = {key: key == needed for key in given}
    torch.testing.assert_close(run(op, given, dy, only), run(plain, given, dy, only))


@pytest.mark.parametrize("name", ["expand", "vllora"])
def test_one_visual_token_needs_no_down_projection_of_the_text(name: str) -> None:
    """In place of the product with the down-projection, one inner product a row: only z, h and their gradients are [T,
    R].
    """
    given = tensors(1, sizes=(3, 5, 23, 7))
    for tensor in given.values():
        tensor.requires_grad_()
    with ShapeRecorder() as forward:
        y = routed_adapter(**given, routing=name)
    with ShapeRecorder() as dense:
        routed_adapter(**given, routing="mul")
    assert forward.shapes.count((3, 5, 7)) + forward.shapes.count((15, 7)) == 2  # z and h
    assert dense.shapes.count((3, 5, 7)) + dense.shapes.count((15, 7)) == 3  # t, z and h
    with ShapeRecorder() as backward:
        y.backward(torch.ones_like(y))
    assert not {(7, 7), (3, 7, 7)} & {*forward.shapes, *backward.shapes}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "relu", "tokens"), [case for case in CASES if case[2] != 9])
def test_autocast_over_float32_weights(name: str, relu: bool, tokens: int, dtype: torch.dtype) -> None:
    op = pair(name, relu, residual=False)[0]
    given = {key: tensor.float() for key, tensor in tensors(tokens).items()}
    dy = torch.randn(3, 5, 6).to(dtype)

    def autocast(**leaves: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return op(**leaves)

    got = run(autocast, given, dy)
    want = run(op, {key: tensor.to(dtype) for key, tensor in given.items()}, dy)
    assert got["y"].dtype == dtype
    assert all(got[f"d{key}"].dtype == torch.float32 for key in given)
    torch.testing.assert_close(got, want, check_dtype=False)


@pytest.mark.parametrize("name", ["mul", "vllora"])
def test_autocast_keeps_the_precision_of_the_residual(name: str) -> None:
    given = {key: tensor.float() for key, tensor in tensors().items()}
    op = pair(name, False)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(**given)
        delta = op(**given, residual=False)
        low = op(**{**given, "x": given["x"].bfloat16()})
    assert y.dtype == torch.float32
    assert torch.equal(y, given["x"] + delta)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "relu", "tokens"), [("mul", False, 1), ("vllora", False, 1), ("vllora", True, 3)])
def test_compiles_without_a_graph_break(name: str, relu: bool, tokens: int) -> None:
    torch._dynamo.reset()
    given = {key: tensor.float() for key, tensor in tensors(tokens).items()}
    op = pair(name, relu)[0]

    def layer(x, v, down_weight, down_bias, up_weight, up_bias) -> Tensor:
        return op(x, v, down_weight, down_bias, up_weight, up_bias)

    dy = torch.randn(3, 5, 6)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, given, dy), run(layer, given, dy))


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_activation_checkpointing_repeats_the_bits(name: str, relu: bool, tokens: int) -> None:
    given = tensors(tokens)
    op = pair(name, relu)[0]
    dy = torch.randn(3, 5, 6, dtype=torch.float64)

    def checkpointed(**leaves: Tensor) -> Tensor:
        return checkpoint(op, use_reentrant=False, **leaves)

    got, want = run(checkpointed, given, dy), run(op, given, dy)
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("name", ["none", "mul", "vllora"])
def test_result_may_be_modified_and_input_is_not(name: str, residual: bool) -> None:
    given = tensors()
    kept = given["x"].clone()
    given["up_weight"].requires_grad_()
    y = routed_adapter(**given, routing=name, residual=residual)
    y += 1
    y.sum().backward()
    assert given["up_weight"].grad is not None
    assert torch.equal(given["x"], kept)


def test_errors_say_what_is_wrong() -> None:
    def error(match: str, **changes) -> None:
        with pytest.raises(ValueError, match=match):
            routed_adapter(**{**tensors(), "routing": "mul", **changes})

    given = tensors()
    error(r"unknown routing 'add_'.*did you mean 'add'\?", routing="add_")
    error(r"unknown activation 'relu6'.*did you mean 'relu'\?", activation="relu6")
    error(r"x must have shape \[B, T, K\], got \[5, 6\]", x=given["x"][0])
    error("v has batch 2, x has batch 3", v=given["v"][:2])
    error("needs the visual tokens", v=None)
    error("got L=2: mean-pool first", v=given["v"].expand(3, 2, 6))
    error(r"down_weight must have shape \[R, 6\], got \[4, 5\]", down_weight=given["down_weight"][:, :5])
    error(r"up_weight must have shape \[6, 4\], got \[6, 3\]", up_weight=given["up_weight"][:, :3])
    error(r"down_bias must have shape \[4\], got \[3\]", down_bias=given["down_bias"][1:])
    error(r"up_bias must have shape \[6\], got \[5\]", up_bias=given["up_bias"][1:])
    error("relu=True is defined for routing vllora.*, not for 'mul'", relu=True)
    error("x is torch.float64 and up_bias is torch.float32", up_bias=given["up_bias"].float())
