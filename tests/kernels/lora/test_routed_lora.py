"""routed_lora and routed_lora_linear against the definition: values, gradients, dtypes, shapes, what is computed,
errors.
"""

import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from routed_cases import CASES, DTYPES, FORMS, LAYOUTS, ShapeRecorder, defined_linear, options, tensors
from tolerances import assert_as_good_as, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routingvl.kernels import linear as products
from routingvl.kernels import routed_lora, routed_lora_linear
from routingvl.kernels.reference import reference_lora


@pytest.mark.parametrize("placement", ["bottleneck", "output"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_fused_linear_is_the_definition(name: str, relu: bool, tokens: int, layout: str, placement: str) -> None:
    given = tensors(tokens, layout)
    kwargs = options(name, relu, layout, placement=placement)
    assert_as_good_as(partial(routed_lora_linear, **kwargs), partial(defined_linear, **kwargs), given)
    given |= {"weight": given["weight"].t().contiguous(), "bias": None}
    kwargs["weight_layout"] = "kn"
    assert_as_good_as(partial(routed_lora_linear, **kwargs), partial(defined_linear, **kwargs), given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_with_a_given_base_is_the_definition(name: str, relu: bool, tokens: int, layout: str) -> None:
    given = tensors(tokens, layout)
    given["base"] = torch.randn(3, 5, given.pop("weight").shape[0], dtype=torch.float64)
    del given["bias"]
    kwargs = options(name, relu, layout)
    assert_as_good_as(partial(routed_lora, **kwargs), partial(reference_lora, **kwargs), given)


@pytest.mark.parametrize("layout", ["plain", "grouped"])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_alone_is_the_definition(name: str, relu: bool, tokens: int, layout: str) -> None:
    given = {key: tensor for key, tensor in tensors(tokens, layout).items() if key not in ("weight", "bias")}
    kwargs = options(name, relu, layout)
    assert_as_good_as(partial(routed_lora, **kwargs), partial(reference_lora, **kwargs), given)


@pytest.mark.parametrize("layout", ["plain", "c_attn"])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_gradcheck(name: str, relu: bool, tokens: int, layout: str) -> None:
    given = tensors(tokens, layout, sizes=(2, 3, 4, 2, 2), seed=1)
    leaves = [tensor.requires_grad_() for tensor in given.values()]
    op = partial(routed_lora_linear, **options(name, relu, layout, n=2))
    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_errs_no_more_than_the_plain_composition(name: str, relu: bool, tokens: int, dtype: torch.dtype) -> None:
    given = tensors(tokens, "c_attn", sizes=(3, 17, 96, 40, 13))
    given["v"] *= (26 * tokens) ** -0.5  # u of about unit length: no function may be ill-conditioned in half precision
    kwargs = options(name, relu, "c_attn", n=40)
    assert_as_good_as(partial(routed_lora_linear, **kwargs), partial(defined_linear, **kwargs), given, dtype)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 8, 8, 1), (1, 1, 8, 8, 3), (4, 1, 7, 5, 6), (1, 9, 3, 2, 1), (0, 5, 6, 4, 3), (3, 0, 6, 4, 3)]
)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_odd_and_empty_shapes(name: str, relu: bool, tokens: int, sizes: tuple[int, ...]) -> None:
    given = tensors(tokens, "c_attn", sizes=sizes)
    kwargs = options(name, relu, "c_attn", n=sizes[3])
    assert_as_good_as(partial(routed_lora_linear, **kwargs), partial(defined_linear, **kwargs), given)


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_non_contiguous_inputs(name: str, relu: bool, tokens: int) -> None:
    given = tensors(tokens)
    plain = reference_lora(given["x"], given["v"], given["a"], given["b"], routing=name, relu=relu)
    strided = {}
    for key in ("x", "v", "a", "b"):
        tensor = given[key]
        strided[key] = torch.stack([tensor, tensor], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]
        assert not strided[key].is_contiguous()
    got = routed_lora(**strided, routing=name, relu=relu)
    torch.testing.assert_close(got, plain)
    # The gradient that .sum() sends back has stride 0.
    leaf = strided["x"].requires_grad_()
    routed_lora(**strided, routing=name, relu=relu).sum().backward()
    want = run(partial(reference_lora, routing=name, relu=relu), {k: given[k] for k in strided}, torch.ones_like(plain))
    torch.testing.assert_close(leaf.grad, want["dx"])


@pytest.mark.parametrize("needed", ["x", "v", "weight", "bias", "a", "b"])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_each_gradient_alone(name: str, relu: bool, tokens: int, needed: str) -> None:
    given = tensors(tokens)
    kwargs = options(name, relu)
    dy = torch.randn(3, 5, 4, dtype=torch.float64)
    only = {key: key == needed for key in given}
    got = run(partial(routed_lora_linear, **kwargs), given, dy, only) if (needed, name) != ("v", "none") else None
    if got is None:
        # Plain LoRA does not read the image, so nothing here needs a gradient.
        given["v"].requires_grad_()
        assert not routed_lora_linear(**given, **kwargs).requires_grad
        return
    want = run(partial(defined_linear, **kwargs), given, dy, only)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_frozen_inputs_cost_no_gradient(name: str, relu: bool, tokens: int) -> None:
    """The backward pass makes nothing for the image and the frozen weight, which need no gradient in training."""

    def made_in_backward(*needed: str) -> list[tuple[int, ...]]:
        given = tensors(tokens, sizes=(3, 5, 23, 29, 7))
        for key in needed:
            given[key].requires_grad_()
        y = routed_lora_linear(**given, **options(name, relu, n=29))
        with ShapeRecorder() as recorder:
            y.backward(torch.ones_like(y))
        return recorder.shapes

    trained = made_in_backward("x", "bias", "a", "b")
    assert (29, 23) not in trained
    assert (29, 23) in made_in_backward("x", "bias", "a", "b", "weight")
    if name != "none":
        assert len(trained) < len(made_in_backward("x", "bias", "a", "b", "v"))
    if tokens == 1:
        assert (15, 23) not in made_in_backward("bias", "a", "b")  # dx


@pytest.mark.parametrize("name", ["expand", "vllora"])
@pytest.mark.parametrize("layout", ["plain", "c_attn"])
def test_one_visual_token_is_rank_one(name: str, layout: str) -> None:
    """No code of the text [B, T, G*R], no [R, R] and no [T, R] is ever made, forward or backward."""
    groups = LAYOUTS[layout][0]
    given = tensors(1, layout, sizes=(3, 5, 23, 29, 7))
    for tensor in given.values():
        tensor.requires_grad_()
    with ShapeRecorder() as recorder:
        y = routed_lora_linear(**given, **options(name, False, layout, n=29))
        y.backward(torch.ones_like(y))
    rank = groups * 7
    for shape in recorder.shapes:
        assert shape not in ((3, 5, rank), (15, rank), (3, rank, rank), (rank, rank)), shape


@pytest.mark.parametrize(("name", "relu"), FORMS)
def test_the_output_is_made_once(name: str, relu: bool) -> None:
    """Scale and addition cost no pass: one tensor of the output's size in the fused op, one copy of a given base."""
    given = tensors(1, "c_attn", sizes=(3, 5, 23, 29, 7))
    kwargs = options(name, relu, "c_attn", n=29)
    with torch.no_grad(), ShapeRecorder() as recorder:
        y = routed_lora_linear(**given, **kwargs)
    assert sum(torch.Size(shape).numel() == y.numel() for shape in recorder.shapes) == 1
    base = torch.randn_like(y)
    with torch.no_grad(), ShapeRecorder() as recorder:
        routed_lora(given["x"], given["v"], given["a"], given["b"], base=base, **kwargs)
    assert sum(torch.Size(shape).numel() == y.numel() for shape in recorder.shapes) == 1


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_base_is_never_modified(name: str, relu: bool, tokens: int) -> None:
    given = tensors(tokens)
    base = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    kept = base.detach().clone()
    with torch.no_grad():
        routed_lora(given["x"], given["v"], given["a"], given["b"], base=base, **options(name, relu))
    assert torch.equal(base, kept)
    # A producer that saved its output (exp) still finds it: an in-place change would raise here.
    routed_lora(given["x"], given["v"], given["a"], given["b"], base=base.exp(), **options(name, relu)).sum().backward()
    torch.testing.assert_close(base.grad, kept.exp())


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_result_may_be_modified_in_place(name: str, relu: bool, tokens: int) -> None:
    given = tensors(tokens)
    given["a"].requires_grad_()
    y = routed_lora_linear(**given, **options(name, relu))
    y += 1
    y.sum().backward()
    assert given["a"].grad is not None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_zero_up_projection_leaves_the_bits(
    name: str, relu: bool, tokens: int, layout: str, dtype: torch.dtype
) -> None:
    given = {key: tensor.to(dtype) for key, tensor in tensors(tokens, layout, sizes=(3, 17, 64, 40, 8)).items()}
    given["b"].zero_()
    kwargs = options(name, relu, layout, n=40)
    x, weight, bias = given["x"], given["weight"], given["bias"]
    assert torch.equal(routed_lora_linear(**given, **kwargs), F.linear(x, weight, bias))
    given |= {"x": x.transpose(0, 1), "v": torch.randn(17, tokens, 64).to(dtype)}
    assert torch.equal(routed_lora_linear(**given, **kwargs), F.linear(given["x"], weight, bias))
    given |= {"x": x, "v": torch.randn(3, tokens, 64).to(dtype), "weight": weight.t().contiguous()}
    conv1d = torch.addmm(bias, x.view(-1, 64), given["weight"]).view(3, 17, -1)
    assert torch.equal(routed_lora_linear(**given, **kwargs, weight_layout="kn"), conv1d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_autocast_over_float32_weights(name: str, relu: bool, tokens: int, dtype: torch.dtype) -> None:
    given = {key: tensor.float().requires_grad_() for key, tensor in tensors(tokens).items()}
    low = {key: tensor.detach().to(dtype).requires_grad_() for key, tensor in given.items()}
    dy = torch.randn(3, 5, 4).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        y = routed_lora_linear(**given, **options(name, relu))
        # Backward inside the context must not cast the float32 sums of the backward pass either.
        y.backward(dy)
    plain = routed_lora_linear(**low, **options(name, relu))
    plain.backward(dy)
    assert y.dtype == dtype
    assert torch.equal(y, plain)
    for key, tensor in given.items():
        if (key, name) == ("v", "none"):
            continue
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, low[key].grad.float())


@pytest.mark.parametrize("layout", ["plain", "c_attn"])
def test_autocast_keeps_the_precision_of_a_given_base(layout: str) -> None:
    given = {key: tensor.float() for key, tensor in tensors(1, layout).items() if key not in ("weight", "bias")}
    base = torch.randn(3, 5, 4 * LAYOUTS[layout][2])
    kwargs = options("mul", False, layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed_lora(**given, base=base, **kwargs)
        delta = routed_lora(**given, base=torch.zeros_like(base).bfloat16(), **kwargs)
    assert (y.dtype, delta.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(y, base + delta)


def test_autocast_leaves_float64_alone() -> None:
    given = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = routed_lora_linear(**given, **options("mul", False))
    assert torch.equal(y, routed_lora_linear(**given, **options("mul", False)))


COMPILED = [(*case, False) for case in CASES if case[2] != 9] + [("mul", False, 1, True), ("vllora", False, 1, True)]


@pytest.mark.parametrize(("name", "relu", "tokens", "autocast"), COMPILED)
def test_compiles_without_a_graph_break(
    name: str, relu: bool, tokens: int, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "measured", lambda: False)  # compiled, products are torch's own
    torch._dynamo.reset()
    given = {key: tensor.float() for key, tensor in tensors(tokens, "c_attn").items()}
    base = torch.randn(3, 5, 12)
    kwargs = options(name, relu, "c_attn")

    def layer(x, v, weight, bias, a, b) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return routed_lora_linear(x, v, weight, bias, a, b, **kwargs) + routed_lora(x, v, a, b, base=base, **kwargs)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    dy = torch.randn(3, 5, 12)
    got, want = run(compiled, given, dy), run(layer, given, dy)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {}
    torch.testing.assert_close(got, want, **tolerance)


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_activation_checkpointing_repeats_the_bits(name: str, relu: bool, tokens: int) -> None:
    given = tensors(tokens)
    kwargs = options(name, relu)
    dy = torch.randn(3, 5, 4, dtype=torch.float64)

    def checkpointed(**leaves: Tensor) -> Tensor:
        return checkpoint(partial(routed_lora_linear, **kwargs), use_reentrant=False, **leaves)

    got, want = run(checkpointed, given, dy), run(partial(routed_lora_linear, **kwargs), given, dy)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_two_threads() -> None:
    given = [tensors(seed=seed) for seed in range(2)]
    op = partial(routed_lora_linear, **options("mul", False))
    dy = torch.randn(3, 5, 4, dtype=torch.float64)
    want = [run(op, each, dy) for each in given]
    same: list[bool] = []

    def work(index: int) -> None:
        for _ in range(20):
            got = run(op, given[index], dy)
            same.append(all(torch.equal(got[key], want[index][key]) for key in got))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 40


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_two_backward_passes_give_the_same_bits(name: str, relu: bool, tokens: int) -> None:
    given = {key: tensor.float() for key, tensor in tensors(tokens).items()}
    op = partial(routed_lora_linear, **options(name, relu))
    first, second = run(op, given, torch.ones(3, 5, 4)), run(op, given, torch.ones(3, 5, 4))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_second_derivative_is_refused() -> None:
    given = tensors()
    given["x"].requires_grad_()
    y = routed_lora_linear(**given, **options("mul", False))
    (dx,) = torch.autograd.grad(y.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_dropout_draws_text_and_image_apart() -> None:
    """With a = b = 1 and one component, y is the dropped text plus the dropped image: both masks can be read."""
    torch.manual_seed(0)
    x, v = torch.full((2000, 1, 1), 1.0), torch.full((2000, 1, 1), 10.0)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    y = routed_lora_linear(x, v, zero, None, one, one, routing="add", dropout=0.25).flatten()
    values, counts = torch.unique(y.round(decimals=4), return_counts=True)
    scale = 1 / 0.75
    torch.testing.assert_close(values, torch.tensor([0.0, scale, 10 * scale, 11 * scale]), rtol=0, atol=1e-3)
    expected = torch.tensor([0.25 * 0.25, 0.75 * 0.25, 0.25 * 0.75, 0.75 * 0.75]) * 2000
    assert (counts - expected).abs().max() < 80  # about four standard deviations


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_dropout_gradients_and_frozen_product(name: str, relu: bool, tokens: int) -> None:
    given = tensors(tokens)
    kwargs = options(name, relu)
    dy = torch.randn(3, 5, 4, dtype=torch.float64)

    def fused(**leaves: Tensor) -> Tensor:
        torch.manual_seed(5)
        return routed_lora_linear(**leaves, **kwargs, dropout=0.5)

    def defined(x, v, weight, bias, a, b) -> Tensor:
        torch.manual_seed(5)
        dropped_x, dropped_v = F.dropout(x, 0.5), F.dropout(v, 0.5)
        return reference_lora(dropped_x, dropped_v, a, b, base=F.linear(x, weight, bias), **kwargs)

    torch.testing.assert_close(run(fused, given, dy), run(defined, given, dy))


def expect_error(match: str, **changes) -> None:
    """routed_lora with these changes to a good call raises ValueError with this message."""
    given = {key: tensor for key, tensor in tensors().items() if key not in ("weight", "bias")}
    kwargs = {"routing": "mul"} | changes
    with pytest.raises(ValueError, match=match):
        routed_lora(
            **{**given, **{k: v for k, v in kwargs.items() if k in given}},
            **{k: v for k, v in kwargs.items() if k not in given},
        )


def test_errors_say_what_is_wrong() -> None:
    given = tensors()
    expect_error(r"unknown routing 'mull'.*did you mean 'mul'\?", routing="mull")
    expect_error(r"x must have shape \[B, T, K\], got \[5, 6\]", x=given["x"][0])
    expect_error(r"v must have shape \[B, L, 6\], got \[3, 1, 5\]", v=given["v"][..., :5])
    expect_error("v has batch 2, x has batch 3", v=given["v"][:2])
    expect_error("needs the visual tokens", v=None)
    expect_error("got L=7: mean-pool first", v=given["v"].expand(3, 7, 6))
    expect_error(r"a must have shape \[3, 6\], got \[2, 6\]", a=given["a"][:2])
    expect_error(r"b must have shape \[G\*n, R\]", b=given["b"][0])
    expect_error("groups=3 must be at least 1 and divide the 4 rows of b", groups=3)
    expect_error("groups=0 must be at least 1", groups=0)
    expect_error(r"base must have shape \[3, 5, 4\], got \[3, 5, 5\]", base=torch.zeros(3, 5, 5, dtype=torch.float64))
    expect_error("columns says where in base to add, so base must be given", columns=(0,))
    expect_error(
        "must name one start column for each of the 1 groups", columns=(0, 4), base=torch.zeros(3, 5, 8).double()
    )
    expect_error("overlap or leave the 8 columns", columns=(5,), base=torch.zeros(3, 5, 8).double())
    expect_error("overlap or leave the 8 columns", columns=(-1,), base=torch.zeros(3, 5, 8).double())
    expect_error("placement='input' is not one of 'bottleneck', 'output'", placement="input")
    expect_error("relu=True is defined for routing vllora.*, not for 'mul'", relu=True)
    expect_error(
        "x is torch.float64 and a is torch.float32: cast one, or run under torch.autocast", a=given["a"].float()
    )
    expect_error("base is torch.float32", base=torch.zeros(3, 5, 4))


def test_errors_of_the_fused_linear() -> None:
    given = tensors(1, "c_attn")
    with pytest.raises(ValueError, match="weight_layout='kk' is not one of 'nk' "):
        routed_lora_linear(**given, **options("mul", False, "c_attn"), weight_layout="kk")
    with pytest.raises(ValueError, match=r"weight must have shape \[6, N\], got \[12, 6\]"):
        routed_lora_linear(**given, **options("mul", False, "c_attn"), weight_layout="kn")
    with pytest.raises(ValueError, match=r"bias must have shape \[12\], got \[11\]"):
        routed_lora_linear(**{**given, "bias": given["bias"][1:]}, **options("mul", False, "c_attn"))
    with pytest.raises(ValueError, match="b has 8 rows and the projection 12 outputs: give columns"):
        routed_lora_linear(**given, routing="mul", groups=2)
    with pytest.raises(ValueError, match="overlap"):
        routed_lora_linear(**given, routing="mul", groups=2, columns=(0, 3))


def test_plain_lora_does_not_read_the_image() -> None:
    given = tensors()
    kept = routed_lora(given["x"], None, given["a"], given["b"], routing="none")
    assert torch.equal(
        routed_lora(given["x"], torch.full((1,), torch.nan), given["a"], given["b"], routing="none"), kept
    )


class _Quantised(torch.Tensor):
    """A weight of which only what a product returns can be relied on, as torchao's float8 ones."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "out" in (kwargs or {}) or function in (torch.mm, torch.addmm, torch.Tensor.mm, torch.Tensor.addmm_):
            raise NotImplementedError(f"{function} of a quantised weight")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("routing", ["none", "mul", "vllora"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_weights_that_are_no_plain_tensors_are_called_and_added_to(routing, layout):
    torch.manual_seed(0)
    x, v = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 1, 8)
    w, a, b = torch.randn(6, 8), torch.randn(3, 8), torch.randn(6, 3)
    weight = w if layout == "nk" else w.t().contiguous()
    found, wanted = (
        routed_lora_linear(x, v, wrapped, None, a, b, routing=routing, weight_layout=layout)
        for wrapped in (weight.as_subclass(_Quantised), weight)
    )
    assert torch.allclose(found, wanted, atol=1e-5)
    (found,), (wanted,) = (torch.autograd.grad(y.square().sum(), x, retain_graph=True) for y in (found, wanted))
    assert torch.allclose(found, wanted, atol=1e-3)
