"""The Adapter's Triton kernels against the definition: on a GPU where there is one, else in Triton's interpreter."""

from functools import partial

import pytest
import torch
from routed_cases import FORMS
from tolerances import assert_as_good_as, run
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from routingvl.kernels import ACTIVATIONS, ROUTINGS, routed_adapter
from routingvl.kernels.reference import reference_adapter

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from routingvl.kernels.activations import act_bwd, act_fwd  # noqa: E402
from routingvl.kernels.adapter import ops as triton_adapter_ops  # noqa: E402
from routingvl.kernels.adapter.options import AdapterOptions  # noqa: E402
from routingvl.kernels.triton_common import launch  # noqa: E402
from routingvl.kernels.triton_common.visual_tokens import Visual  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Routing, ReLU, visual tokens; 3 tokens take (t uᵀ) u and 40 take t (uᵀ u) at the sizes below.
CASES = [
    (name, relu, tokens)
    for name, relu in FORMS
    for tokens in (1, 3, 40)[: 3 if ROUTINGS[name].max_visual_tokens is None else 1]
]
FEW = [case for case in CASES if case[2] == 3 or (case[2] == 1 and not case[1])]
NAMES = ("x", "v", "down_weight", "down_bias", "up_weight", "up_bias")


def tensors(tokens: int = 1, sizes: tuple[int, ...] = (3, 5, 24, 6), seed: int = 0) -> dict[str, Tensor]:
    """The operands in float64; sizes are B, T, K, R. The image code has about unit length, so that no routing function
    drives the activation to where half precision is lost.
    """
    torch.manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64)
    batch, text, width, rank = sizes
    small = (rank * tokens) ** -0.5
    operands = {
        "x": draw(batch, text, width),
        "v": draw(batch, tokens, width) * small,
        "down_weight": draw(rank, width) / width**0.5,
        "down_bias": draw(rank) * small,
        "up_weight": draw(width, rank) / rank**0.5,
        "up_bias": draw(width),
    }
    return {name: operand.to(DEVICE) for name, operand in operands.items()}


def pair(name: str, relu: bool, **more):
    """The kernels and the definition with the same options."""
    options = {"routing": name, "relu": relu, **more}
    return partial(routed_adapter, backend="triton", **options), partial(reference_adapter, **options)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kinds of kernels launched during a test, so that no test passes through the eager backend."""
    kinds, original = [], launch.launch
    monkeypatch.setattr(launch, "launch", lambda kind, *rest: (kinds.append(kind), original(kind, *rest))[1])
    return kinds


@triton.jit
def activation_kernel(p_h, p_dz, p_z, p_dh, ACT: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    z = tl.load(p_z + i)
    tl.store(p_h + i, act_fwd(z, ACT))
    tl.store(p_dz + i, act_bwd(tl.load(p_dh + i), z, ACT))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_its_gradient(name: str) -> None:
    row = ACTIVATIONS[name]
    extremes = torch.tensor([-1e4, -90.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 90.0, 1e4])
    z = torch.cat([extremes, torch.linspace(-6, 6, 64 - len(extremes))]).to(DEVICE)
    dh = torch.linspace(-1, 2, 64, device=DEVICE)
    h, dz = torch.empty_like(z), torch.empty_like(z)
    activation_kernel[(1,)](h, dz, z, dh, row.code, 64)
    torch.testing.assert_close(h, row.forward(z.double()).float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dz, row.backward(dh.double(), z.double()).float(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_is_the_definition(poisoned_memory, launches, name: str, relu: bool, tokens: int, residual: bool) -> None:
    assert_as_good_as(*pair(name, relu, residual=residual), tensors(tokens), torch.float32)
    kernels = ROUTINGS[name].kernel_obstacle(tokens if ROUTINGS[name].uses_image else 0, relu, "bottleneck") is None
    assert launches == (["adapter_forward", "adapter_backward"] if kernels else [])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("name", "relu"), FORMS)
def test_every_activation(name: str, relu: bool, activation: str) -> None:
    operands = {**tensors(), "down_bias": None, "up_bias": None}
    assert_as_good_as(*pair(name, relu, activation=activation), operands, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_half_precision_errs_no_more_than_torch(name: str, relu: bool, tokens: int, dtype: torch.dtype) -> None:
    given = tensors(tokens, (3, 17, 96, 13))
    assert_as_good_as(*pair(name, relu, activation="gelu_new"), given, dtype)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 8, 1), (5, 1, 7, 6), (2, 70, 20, 17), (1, 3, 130, 33), (7, 20, 66, 5), (0, 5, 6, 3), (3, 0, 6, 3)],
    ids=str,
)
@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_shapes(poisoned_memory, name: str, relu: bool, tokens: int, sizes: tuple[int, ...]) -> None:
    assert_as_good_as(*pair(name, relu, activation="silu"), tensors(tokens, sizes), torch.float32)


def test_largest_rank() -> None:
    for name, tokens in (("mul", 1), ("vllora", 2)):
        assert_as_good_as(*pair(name, False), tensors(tokens, (2, 3, 40, 256)), torch.float32)


def test_float64_and_wide_codes_run_eagerly(launches) -> None:
    assert_as_good_as(*pair("mul", False), tensors(), torch.float64)
    assert_as_good_as(*pair("mul", False), tensors(1, (2, 3, 10, 257)), torch.float32)
    assert launches == []


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize(("name", "relu", "tokens"), FEW)
def test_shared_columns(monkeypatch, poisoned_memory, name: str, relu: bool, tokens: int, splits: int) -> None:
    """What fills a GPU when rows are few: several programs share the columns of y."""
    monkeypatch.setattr(launch, "column_splits", lambda *_: splits)
    assert_as_good_as(*pair(name, relu), tensors(tokens, (2, 5, 150, 6)), torch.float32)


@pytest.mark.parametrize("needed", NAMES)
@pytest.mark.parametrize(("name", "relu", "tokens"), FEW)
def test_each_gradient_alone(poisoned_memory, name: str, relu: bool, tokens: int, needed: str) -> None:
    if (needed, name) == ("v", "none"):
        return
    operands = {key: operand.float() for key, operand in tensors(tokens).items()}
    op, plain = pair(name, relu)
    dy = torch.randn(3, 5, 24).to(DEVICE)
    only = {key: key == needed for key in operands}
    torch.testing.assert_close(run(op, operands, dy, only), run(plain, operands, dy, only), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("name", "relu", "tokens"), CASES)
def test_equal_calls_give_equal_bits(name: str, relu: bool, tokens: int) -> None:
    operands = {key: operand.float() for key, operand in tensors(tokens, (4, 9, 40, 10)).items()}
    dy = torch.randn(4, 9, 40).to(DEVICE)
    op = pair(name, relu)[0]
    first, second = run(op, operands, dy), run(op, operands, dy)
    again = run(partial(checkpoint, op, use_reentrant=False), operands, dy)
    assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], again[key]) for key in first)


@pytest.mark.parametrize(("name", "relu", "tokens"), FEW)
def test_strided_operands(name: str, relu: bool, tokens: int) -> None:
    operands = {key: operand.float() for key, operand in tensors(tokens).items()}
    op, plain = pair(name, relu)
    want = run(plain, operands, torch.ones(3, 5, 24, device=DEVICE))
    spread = {key: torch.stack([operand] * 2, -1).requires_grad_() for key, operand in operands.items()}
    y = op(**{key: operand[..., 1] for key, operand in spread.items()})
    y.sum().backward()  # sends back a gradient of stride 0
    torch.testing.assert_close(y, want["y"])
    for key, operand in spread.items():
        if key == "v" and not ROUTINGS[name].uses_image:
            assert operand.grad is None
            continue
        torch.testing.assert_close(operand.grad[..., 1], want[f"d{key}"], rtol=1e-5, atol=1e-5)
    rows = torch.cat([operands["x"], operands["x"]], 2)[..., :24]  # rows apart, read in place
    torch.testing.assert_close(op(**{**operands, "x": rows}), want["y"])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("name", "relu", "tokens"), FEW)
def test_autocast_over_float32_weights(name: str, relu: bool, tokens: int, dtype: torch.dtype) -> None:
    op = pair(name, relu, residual=False)[0]
    operands = {key: operand.float() for key, operand in tensors(tokens).items()}
    dy = torch.randn(3, 5, 24).to(DEVICE, dtype)

    def autocast(**leaves: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=dtype):
            return op(**leaves)

    got = run(autocast, operands, dy)
    want = run(op, {key: operand.to(dtype) for key, operand in operands.items()}, dy)
    assert got["y"].dtype == dtype
    assert all(got[f"d{key}"].dtype == torch.float32 for key in operands)
    torch.testing.assert_close(got, want, check_dtype=False)


def test_autocast_keeps_the_precision_of_the_residual() -> None:
    operands = {key: operand.float() for key, operand in tensors().items()}
    op = pair("mul", False)[0]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y, delta = op(**operands), op(**operands, residual=False)
    assert y.dtype == torch.float32
    assert torch.equal(y, operands["x"] + delta)


@pytest.mark.parametrize(("name", "relu", "tokens"), FEW)
def test_compiles_without_a_graph_break(name: str, relu: bool, tokens: int) -> None:
    torch._dynamo.reset()
    operands = {key: operand.float() for key, operand in tensors(tokens).items()}
    op = pair(name, relu)[0]

    def layer(x, v, down_weight, down_bias, up_weight, up_bias) -> Tensor:
        return op(x, v, down_weight, down_bias, up_weight, up_bias)

    dy = torch.randn(3, 5, 24).to(DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, operands, dy), run(layer, operands, dy))


@pytest.mark.parametrize("rank_one", [False, True])
def test_registered_ops_pass_opcheck(rank_one: bool) -> None:
    x, _, down, bias, up, up_bias = (operand.float() for operand in tensors().values())
    x, u = x.flatten(0, 1), torch.randn(3, 1, 6).to(DEVICE)
    if rank_one:
        down, bias = torch.randn(3, 24).to(DEVICE), torch.randn(3).to(DEVICE)
    options = AdapterOptions(ROUTINGS["mul"], False, ACTIVATIONS["gelu"], True)
    scalars = (options.routing.code, False, options.act.code, True)
    forward = (torch.zeros_like(x), x, down, bias, u, up, up_bias, 5, int(Visual.ONE_TOKEN), rank_one, True)
    torch.library.opcheck(triton_adapter_ops.adapter_forward_.op, (*forward, *scalars))
    t = triton_adapter_ops.adapter_forward_(*forward, options)
    backward = (x, t, down, u, up, 5, int(Visual.ONE_TOKEN), rank_one, True, True, True)
    torch.library.opcheck(triton_adapter_ops.adapter_backward.op, (*backward, *scalars))


@pytest.mark.parametrize("residual", [True, False])
def test_result_may_be_modified_and_input_is_not(residual: bool) -> None:
    operands = {key: operand.float() for key, operand in tensors().items()}
    kept = operands["x"].clone()
    operands["up_weight"].requires_grad_()
    y = routed_adapter(**operands, routing="mul", residual=residual, backend="triton")
    y += 1
    y.sum().backward()
    assert operands["up_weight"].grad is not None
    assert torch.equal(operands["x"], kept)


def test_nothing_is_saved_without_gradients() -> None:
    operands = {key: operand.float() for key, operand in tensors().items()}
    seen = []
    op = triton_adapter_ops.adapter_forward_

    def spy(*arguments):
        code = op(*arguments)
        seen.append(code.numel())
        return code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_adapter_ops, "adapter_forward_", spy)
        routed_adapter(**operands, routing="mul", backend="triton")
        operands["up_bias"].requires_grad_()
        routed_adapter(**operands, routing="mul", backend="triton")
    assert seen == [0, 15 * 6]
