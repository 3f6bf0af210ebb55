"""The routed LoRA on the Triton kernels: against the definition, in Triton's interpreter or on a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from routed_cases import KERNEL_CASES as CASES
from tolerances import assert_as_good_as, relative_rms, run
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from routingvl.kernels import ROUTINGS, routed_lora, routed_lora_linear
from routingvl.kernels.optional_triton import interpreted
from routingvl.kernels.reference import reference_lora

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="neither a GPU nor Triton's interpreter")

from routingvl.kernels.lora import ops  # noqa: E402
from routingvl.kernels.lora.options import LoRAOptions  # noqa: E402
from routingvl.kernels.triton_common import launch  # noqa: E402
from routingvl.kernels.triton_common.visual_tokens import Visual, image_operand  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPUTED = [
    (name, relu, tokens, text)
    for name, relu, tokens, text in CASES
    if ROUTINGS[name].kernel_obstacle(tokens if ROUTINGS[name].uses_image else 0, relu, "bottleneck") is None
]
FEW = [case for case in CASES if case[2] == 2 or (case[2] == 1 and not case[1])]
EDGES = [(1, 1, 1, 1, 1), (2, 3, 16, 16, 16), (1, 150, 70, 33, 17), (9, 7, 130, 70, 3)]  # B, T, K, n, R
LAYOUTS = {"plain": (1, None, 1), "c_attn": (2, (0, 2), 3)}  # groups, columns and width of y in units of n
fused_linear = partial(routed_lora_linear, backend="triton")


def tensors(tokens: int, layout: str, sizes: tuple[int, ...], seed: int = 0) -> dict[str, Tensor]:
    """x, v, weight, bias, a, b of a layer in float64; sizes are B, T, K, n, R."""
    batch, text, width, n, rank = sizes
    groups, _, units = LAYOUTS[layout]
    torch.manual_seed(seed)
    drawn = {
        "x": torch.randn(batch, text, width),
        "v": torch.randn(batch, tokens, width),
        "weight": torch.randn(units * n, width) / width**0.5,
        "bias": torch.randn(units * n),
        "a": torch.randn(groups * rank, width) / width**0.5,
        "b": torch.randn(groups * n, rank) / rank**0.5,
    }
    return {name: tensor.to(DEVICE, torch.float64) for name, tensor in drawn.items()}


def options(name: str, relu: bool, layout: str = "plain", n: int = 40, **more) -> dict:
    groups, units, _ = LAYOUTS[layout]
    columns = None if units is None else tuple(unit * n for unit in units)
    return {"routing": name, "relu": relu, "groups": groups, "columns": columns, "scaling": 1.7, **more}


def defined_linear(x, v, weight, bias, a, b, **more) -> Tensor:
    """The definition of routed_lora_linear."""
    return reference_lora(x, v, a, b, base=F.linear(x, weight, bias), **more)


def rounded(given_tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in given_tensors.items()}


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.float32, "plain"), *((dtype, "c_attn") for dtype in DTYPES)], ids=str
)
@pytest.mark.parametrize(("name", "relu", "tokens", "text"), CASES)
def test_is_the_definition(name: str, relu: bool, tokens: int, text: int, layout: str, dtype: torch.dtype) -> None:
    drawn = tensors(tokens, layout, (3, text, 50, 40, 5))
    drawn["v"] *= (10 * tokens) ** -0.5  # u of about unit length: no function may be ill-conditioned in half precision
    kwargs = options(name, relu, layout)
    assert_as_good_as(partial(fused_linear, **kwargs), partial(defined_linear, **kwargs), drawn, dtype)


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (2, 3, 16, 16, 16), (1, 150, 70, 33, 17), (9, 7, 130, 70, 3)], ids=str
)
@pytest.mark.parametrize(("name", "relu", "tokens"), [("mul", False, 1), ("expand", False, 1), ("vllora", True, 2)])
def test_sizes_at_the_edges_of_tiles(
    name: str, relu: bool, tokens: int, sizes: tuple[int, ...], poisoned_memory: None
) -> None:
    drawn = tensors(tokens, "c_attn", sizes)
    kwargs = options(name, relu, "c_attn", n=sizes[3])
    assert_as_good_as(partial(fused_linear, **kwargs), partial(defined_linear, **kwargs), drawn, torch.float32)


@pytest.mark.parametrize(("name", "relu", "tokens", "text"), FEW)
@pytest.mark.parametrize("with_base", [False, True])
def test_with_a_base_and_alone(
    name: str, relu: bool, tokens: int, text: int, with_base: bool, poisoned_memory: None
) -> None:
    drawn = tensors(tokens, "c_attn", (3, text, 50, 40, 5))
    kwargs = options(name, relu, "c_attn")
    base = F.linear(drawn["x"], drawn.pop("weight"), drawn.pop("bias"))
    if with_base:
        drawn["base"] = base
    else:
        kwargs["columns"] = None
    op = partial(routed_lora, backend="triton", **kwargs)
    assert_as_good_as(op, partial(reference_lora, **kwargs), drawn, torch.float32)


@pytest.mark.parametrize(("name", "relu", "tokens", "text"), FEW)
def test_only_what_is_needed(name: str, relu: bool, tokens: int, text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not asked for is neither computed nor does its absence change another."""
    drawn = rounded(tensors(tokens, "plain", (3, text, 20, 24, 3)))
    dy = torch.randn(3, text, 24, device=DEVICE)
    op = partial(fused_linear, **options(name, relu, n=24))
    full = run(op, drawn, dy)
    for wanted in (("a", "b"), ("x",), ("v",), ("b",), ("weight", "bias")):
        if wanted == ("v",) and name == "none":
            continue
        part = run(op, drawn, dy, {key: key in wanted for key in drawn})
        assert part.keys() == {"y", *(f"d{key}" for key in wanted)}
        assert all(torch.equal(part[key], full[key]) for key in part)
    for called in ("lora_backward_", "rank_one_backward_", "dropped_gradient"):
        monkeypatch.setattr(ops, called, lambda *args: pytest.fail("a backward kernel ran for the frozen weight"))
    run(op, drawn, dy, {key: key == "weight" for key in drawn})


@pytest.mark.parametrize(("name", "relu", "tokens", "text"), FEW)
def test_two_backward_passes_give_the_same_bits(name: str, relu: bool, tokens: int, text: int) -> None:
    drawn = rounded(tensors(tokens, "c_attn", (5, 70, 20, 16, 3)), torch.bfloat16)
    op = partial(fused_linear, **options(name, relu, "c_attn", n=16))
    dy = torch.randn(5, 70, 48, device=DEVICE)
    first, second = run(op, drawn, dy), run(op, drawn, dy)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("name", "relu", "tokens", "text"), CASES)
def test_fresh_bottleneck_leaves_the_bits(name: str, relu: bool, tokens: int, text: int) -> None:
    drawn = rounded(tensors(tokens, "c_attn", (3, text, 50, 40, 5)), torch.bfloat16)
    drawn["b"].zero_()
    y = fused_linear(**drawn, **options(name, relu, "c_attn"))
    assert torch.equal(y, F.linear(drawn["x"], drawn["weight"], drawn["bias"]))


@pytest.mark.parametrize(("name", "relu"), [("mul", False), ("none", False), ("expand", False), ("vllora", True)])
@pytest.mark.parametrize("text", [3, 40])  # rows of an image in one program, and in several
def test_programs_that_share_columns(name: str, relu: bool, text: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a large GPU few rows are spread over more programs, and every result is the same."""
    drawn = rounded(tensors(1, "c_attn", (2, text, 130, 100, 5)))
    op, dy = partial(fused_linear, **options(name, relu, "c_attn", n=100)), torch.randn(2, text, 300, device=DEVICE)
    alone = run(op, drawn, dy)
    for module in (ops, launch):
        monkeypatch.setattr(module, "processors", lambda device: 24)
    shared = run(op, drawn, dy)
    assert all(torch.equal(shared[key], alone[key]) for key in alone)


@pytest.mark.parametrize(("name", "dropout"), [("none", 0.0), ("add", 0.0), ("mul", 0.0), ("mul", 0.5)])
@pytest.mark.parametrize("many", [False, True])
def test_groups_with_programs_of_their_own(name: str, dropout: float, many: bool, monkeypatch, poisoned_memory) -> None:
    """Wide groups of a function of single components: the same bits as from programs that have all groups."""
    drawn = rounded(tensors(1, "c_attn", (3, 7, 50, 70, 70)))
    op, dy = partial(fused_linear, **options(name, False, "c_attn", n=70), dropout=dropout), torch.randn(3, 7, 210)
    found = []
    prepare = ops.prepare_forward
    monkeypatch.setattr(ops, "prepare_forward", lambda *args: found.append(prepare(*args)) or found[-1])
    if many:
        for module in (ops, launch):
            monkeypatch.setattr(module, "processors", lambda device: 12)

    def both() -> dict[str, Tensor]:
        torch.manual_seed(1)
        return run(op, drawn, dy.to(DEVICE))

    apart = both()
    monkeypatch.setattr(ops, "APART_ABOVE", 256)
    joined = both()
    assert all(torch.equal(apart[key], joined[key]) for key in apart)
    (own, _, _), (shared, _, _) = ((grid[1], *rest) for grid, *rest in found)
    assert own % 2 == 0
    assert (own > 2) == many == (shared > 1)


@pytest.mark.parametrize(("name", "relu", "tokens"), [("mul", False, 1), ("add", False, 1), ("vllora", True, 1)])
def test_rows_with_an_image_each(name: str, relu: bool, tokens: int) -> None:
    drawn = tensors(tokens, "c_attn", (50, 1, 20, 24, 5))
    kwargs = options(name, relu, "c_attn", n=24)
    assert_as_good_as(partial(fused_linear, **kwargs), partial(defined_linear, **kwargs), drawn, torch.float32)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("dtype", "text", "several"), [(torch.float32, 90, True), (torch.float16, 20, False)], ids=str)
def test_gradient_of_many_visual_tokens(relu: bool, dtype: torch.dtype, text: int, several: bool, monkeypatch) -> None:
    """In the kernel where one program has all the rows of an image, by torch's products where several have."""
    drawn, by_torch = tensors(37, "c_attn", (2, text, 20, 24, 70)), []
    drawn["v"] *= 370**-0.5
    whole = launch.inner_product_image_gradient
    monkeypatch.setattr(launch, "inner_product_image_gradient", lambda *args: by_torch.append(1) or whole(*args))
    kwargs = options("vllora", relu, "c_attn", n=24)
    assert_as_good_as(partial(fused_linear, **kwargs), partial(defined_linear, **kwargs), drawn, dtype)
    assert bool(by_torch) == several


@pytest.mark.parametrize("name", ["mul", "vllora"])
def test_strided_inputs(name: str) -> None:
    drawn = rounded(tensors(1, "plain", (3, 5, 50, 40, 5)))
    dy = torch.randn(3, 5, 40, device=DEVICE)
    op = partial(fused_linear, **options(name, False))
    want = run(op, drawn, dy)

    def strided(view, **leaves: Tensor) -> Tensor:
        return op(**{key: view(leaf) if leaf.dim() > 1 else leaf for key, leaf in leaves.items()})

    def through_transpose(leaf: Tensor) -> Tensor:
        return leaf.transpose(0, 1).contiguous().transpose(0, 1)

    def through_slice(leaf: Tensor) -> Tensor:
        return torch.cat([leaf, leaf], -1)[..., : leaf.shape[-1]]

    for view in (through_transpose, through_slice):
        got = run(partial(strided, view), drawn, dy)
        assert all(relative_rms(got[key], want[key]) < 5e-6 for key in want)
    got = run(op, drawn, through_transpose(dy))
    assert all(torch.equal(got[key], want[key]) for key in want)


def read_mask(seed: Tensor, rows: int, width: int, dropout: float) -> Tensor:
    """The mask [rows, width] that the kernels draw, scaled: dropout of ones through identity weights."""
    ones, eye = torch.ones(rows, width, device=DEVICE), torch.eye(width, device=DEVICE)
    y = torch.full((rows, width), torch.nan, device=DEVICE)
    plain = LoRAOptions(ROUTINGS["none"], False, 1.0, (0,), "bottleneck", dropout=dropout)
    ops.lora_forward_(y, ones, eye, None, eye, seed, rows, int(Visual.NO_IMAGE), False, False, plain)
    return y


def test_mask_of_a_seed() -> None:
    first, second = (torch.tensor([seed], device=DEVICE) for seed in (5, 2**40 + 5))
    mask = read_mask(first, 300, 50, 0.3)
    kept = mask != 0
    assert torch.equal(mask, kept / 0.7)
    assert abs(kept.double().mean() - 0.7) < 4 * (0.3 * 0.7 / mask.numel()) ** 0.5
    for axis in (0, 1):  # neither rows nor columns repeat
        assert torch.unique(kept, dim=axis).shape == kept.shape
    assert torch.equal(mask, read_mask(first, 300, 50, 0.3))
    assert torch.equal(mask[:40, :30], read_mask(first, 40, 30, 0.3))  # whatever the tile
    other = read_mask(second, 300, 50, 0.3) != 0
    assert abs((kept & other).double().mean() - 0.49) < 0.02


@pytest.mark.parametrize(("name", "relu", "tokens", "text"), COMPUTED)
def test_dropout_is_exact_given_its_mask(name: str, relu: bool, tokens: int, text: int) -> None:
    drawn = tensors(tokens, "c_attn", (3, text, 50, 40, 5))
    kwargs = options(name, relu, "c_attn")
    torch.manual_seed(5)
    # In float32, as the op draws it: on a GPU the mask of one seed is another one in float64.
    image_mask = F.dropout(torch.ones_like(drawn["v"], dtype=torch.float32), 0.5).double() if name != "none" else 1.0
    seed = torch.randint(2**62, (1,), device=DEVICE)
    text_mask = read_mask(seed, 3 * text, 50, 0.5).view_as(drawn["x"]).double()

    def masked(x, v, weight, bias, a, b) -> Tensor:
        return reference_lora(x * text_mask, v * image_mask, a, b, base=F.linear(x, weight, bias), **kwargs)

    def dropped(**leaves: Tensor) -> Tensor:
        torch.manual_seed(5)
        return fused_linear(**leaves, **kwargs, dropout=0.5)

    dy = torch.randn_like(masked(**drawn))
    want = run(masked, drawn, dy)
    got = run(dropped, rounded(drawn), dy.float())
    for key in want:
        assert relative_rms(got[key], want[key]) < 5e-6 or want[key].abs().max() == 0, key


def test_dropout_draws_text_and_image_apart() -> None:
    torch.manual_seed(0)
    x, v = torch.full((1000, 1, 1), 1.0, device=DEVICE), torch.full((1000, 1, 1), 10.0, device=DEVICE)
    one, zero = torch.ones(1, 1, device=DEVICE), torch.zeros(1, 1, device=DEVICE)
    y = fused_linear(x, v, zero, None, one, one, routing="add", dropout=0.25).flatten()
    values, counts = torch.unique(y.round(decimals=4), return_counts=True)
    scale = 1 / 0.75
    torch.testing.assert_close(values.cpu(), torch.tensor([0.0, scale, 10 * scale, 11 * scale]), rtol=0, atol=1e-3)
    expected = torch.tensor([0.25 * 0.25, 0.75 * 0.25, 0.25 * 0.75, 0.75 * 0.75]) * 1000
    assert (counts.cpu() - expected).abs().max() < 60  # about four standard deviations


def checkpointed(op, leaves: dict[str, Tensor]) -> Tensor:
    """By position: torch keeps the generators of those devices only that positional arguments are on."""
    return checkpoint(lambda *given: op(**dict(zip(leaves, given, strict=True))), *leaves.values(), use_reentrant=False)


@pytest.mark.parametrize("name", ["mul", "expand"])
def test_activation_checkpointing_repeats_mask_and_bits(name: str) -> None:
    drawn = rounded(tensors(1, "plain", (3, 5, 20, 16, 3)))
    op = partial(fused_linear, **options(name, False, n=16), dropout=0.5)
    dy = torch.randn(3, 5, 16, device=DEVICE)
    found = []
    for function in (op, lambda **leaves: checkpointed(op, leaves)):
        torch.manual_seed(3)
        found.append(run(function, drawn, dy))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])
    assert not torch.equal(run(op, drawn, dy)["y"], found[0]["y"])  # the generator went on


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["mul", "vllora"])
def test_autocast_over_float32_weights(name: str, dtype: torch.dtype) -> None:
    drawn = rounded(tensors(1, "plain", (3, 5, 20, 16, 3)))
    dy = torch.randn(3, 5, 16, device=DEVICE).to(dtype)
    op = partial(fused_linear, **options(name, False, n=16))
    low = run(op, rounded(drawn, dtype), dy)
    with torch.autocast(DEVICE, dtype=dtype):
        got = run(op, drawn, dy)
    assert torch.equal(got["y"], low["y"])
    for key in got.keys() - {"y"}:
        assert got[key].dtype == torch.float32
        torch.testing.assert_close(got[key], low[key].float())


@pytest.mark.parametrize(("name", "relu", "tokens", "dropout"), [
    ("mul", False, 1, 0.0), ("mul", False, 1, 0.5), ("vllora", False, 1, 0.0), ("vllora", True, 3, 0.0),
])  # fmt: skip
def test_compiles_without_a_graph_break(name: str, relu: bool, tokens: int, dropout: float) -> None:
    torch._dynamo.reset()
    drawn = rounded(tensors(tokens, "c_attn", (3, 5, 20, 16, 3)))
    op = partial(fused_linear, **options(name, relu, "c_attn", n=16), dropout=dropout)
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    for text in (5, 8, 11):  # from the second length on, the length is symbolic
        drawn["x"], dy = torch.randn(3, text, 20, device=DEVICE), torch.randn(3, text, 48, device=DEVICE)
        got = run(compiled, drawn, dy)
        if dropout == 0:  # else the compiled graph draws other numbers
            torch.testing.assert_close(got, run(op, drawn, dy))


def test_ops_are_what_they_declare() -> None:
    drawn = rounded(tensors(1, "c_attn", (3, 5, 20, 16, 3)))
    x, a, b = drawn["x"].flatten(0, 1), drawn["a"], drawn["b"]
    y, dy, dx = torch.randn(15, 48, device=DEVICE), torch.randn(15, 48, device=DEVICE), torch.randn_like(x)
    u, seed = F.linear(drawn["v"], a), torch.tensor([3], device=DEVICE)
    dropped = LoRAOptions(ROUTINGS["mul"], False, 1.7, (0, 32), "bottleneck", dropout=0.5)
    plain = dropped._replace(dropout=0.0)

    def check(op, *arguments, options=dropped) -> None:
        opcheck(op.op, (*arguments, options.routing.code, *options[1:]))

    shared = (seed, 5, int(Visual.ONE_TOKEN), True)
    check(ops.lora_forward_, y, x, a, u, b, *shared, True)
    check(ops.lora_backward_, dx, dy, F.linear(x, a), a, u, b, *shared, True, True)
    check(ops.lora_backward_, None, dy, F.linear(x, a), a, u, b, *shared, False, False)
    several, whole = torch.randn(3, 4, 6, device=DEVICE), torch.randn(3, 6, 6, device=DEVICE)
    vllora = plain._replace(routing=ROUTINGS["vllora"])
    for way, image in ((Visual.TOKENS, several), (Visual.GRAM, whole)):
        operands = (dx, dy, F.linear(x, a), a, image, b, None, 5, int(way), True, True, True)
        check(ops.lora_backward_, *operands, options=vllora)
    check(ops.dropped_gradient, F.linear(x, a), x, seed)
    p, o, c = torch.randn(3, 20, device=DEVICE), torch.randn(3, 32, device=DEVICE), torch.randn(15, device=DEVICE)
    check(ops.rank_one_forward_, y, x, p, o, None, 5, True, options=plain)
    check(ops.rank_one_backward_, dx, dy, x, p, o, c, seed, 5, True, True, True)
    check(ops.rank_one_backward_, None, dy, x, p, o, c, None, 5, True, True, False, options=plain)


def test_what_the_kernels_do_not_cover_goes_to_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    for called in ("lora_forward_", "rank_one_forward_"):
        monkeypatch.setattr(ops, called, lambda *args: pytest.fail("a kernel ran"))
    drawn = tensors(1, "plain", (2, 3, 6, 8, 2))
    kwargs = options("mul", False, n=8)
    torch.testing.assert_close(fused_linear(**drawn, **kwargs), defined_linear(**drawn, **kwargs))  # float64
    drawn = rounded(drawn)
    kwargs["placement"] = "output"
    torch.testing.assert_close(fused_linear(**drawn, **kwargs), defined_linear(**drawn, **kwargs))
    drawn |= {"b": torch.randn(3, 2, device=DEVICE), "a": torch.randn(6, 6, device=DEVICE)}
    kwargs = options("mul", False, n=8) | {"groups": 3, "columns": (0, 1, 7)}  # not equally spaced
    torch.testing.assert_close(fused_linear(**drawn, **kwargs), defined_linear(**drawn, **kwargs))
    wide = rounded(tensors(1, "plain", (1, 2, 6, 8, 257)))
    kwargs = options("mul", False, n=8)
    torch.testing.assert_close(fused_linear(**wide, **kwargs), defined_linear(**wide, **kwargs))


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("name", "relu", "tokens", "text"), FEW)
def test_beams_share_an_image(name: str, relu: bool, tokens: int, text: int, backend: str) -> None:
    """Two images, three beams each: as with repeated features, and the features' gradients are summed."""
    drawn = rounded(tensors(tokens, "c_attn", (6, 4, 20, 16, 3)))
    drawn["v"] = drawn["v"][:2]
    op = partial(routed_lora_linear, **options(name, relu, "c_attn", n=16), backend=backend)

    def repeated(v: Tensor, **leaves: Tensor) -> Tensor:
        return op(v=v.repeat_interleave(3, 0), **leaves)

    dy = torch.randn(6, 4, 48, device=DEVICE)
    got, want = run(op, drawn, dy), run(repeated, drawn, dy)
    assert all(relative_rms(got[key], want[key]) < 5e-6 for key in want)


def test_no_text() -> None:
    drawn = rounded(tensors(1, "plain", (2, 3, 6, 8, 2)))
    drawn["x"] = drawn["x"][:, :0]
    for name in ("mul", "expand"):
        found = run(partial(fused_linear, **options(name, False, n=8)), drawn, torch.zeros(2, 0, 8, device=DEVICE))
        assert found["y"].shape == (2, 0, 8)
        assert not found["da"].any()


def test_many_visual_tokens_take_both_forms() -> None:
    """The cases above reach the matrix of inner products and the tokens one by one."""
    u = torch.ones(1, 70, 5)
    assert image_operand(u, 37, False)[0] == Visual.GRAM
    assert image_operand(u[:, :2], 5, False)[0] == Visual.TOKENS
