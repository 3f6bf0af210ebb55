"""Matrix products through oneDNN: that they are the same, and that no others go there."""

from functools import partial

import pytest
import torch
from routed_cases import defined_linear, options, tensors
from tolerances import assert_as_good_as, relative_rms
from torch import Tensor

from routingvl.kernels import ROUTINGS, cpu_library, routed_adapter, routed_lora_linear
from routingvl.kernels import linear as products
from routingvl.kernels.linear import add_product_, fresh_linear, plus_product, product
from routingvl.kernels.reference import reference_adapter

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN",
)


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Products go through oneDNN on whatever CPU this is; the shapes of x of those that did."""
    seen, real = [], cpu_library.onednn_linear

    def spy(x: Tensor, *rest: Tensor | None, **more: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return real(x, *rest, **more)

    for name in ("measured", "onednn_is_faster"):
        monkeypatch.setattr(products, name, lambda: True)
    monkeypatch.setattr(products, "onednn_linear", spy)
    monkeypatch.setattr(cpu_library, "onednn_linear", spy)
    return seen


def laid_out(layout: str, rows: int, columns: int) -> Tensor:
    """A random matrix [rows, columns]: contiguous, the transpose of such a one, or columns of a wider one of either."""
    if layout.endswith("columns"):
        return laid_out(layout.removesuffix("columns").strip() or "rows", columns, rows).t()
    return torch.randn(rows, columns) if layout == "rows" else torch.randn(rows, 3 * columns)[:, columns : 2 * columns]


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    assert relative_rms(found, wanted) < 1e-6


@needs_onednn
@pytest.mark.parametrize("right", ["rows", "columns", "part", "part columns"])
@pytest.mark.parametrize("left", ["rows", "columns", "part", "part columns"])
def test_products_of_every_layout(left: str, right: str, through: list) -> None:
    torch.manual_seed(0)
    x, w, y = laid_out(left, 5, 7), laid_out(right, 7, 6), torch.randn(5, 6)
    exact = x.double() @ w.double()
    close(product(x, w), exact)
    close(plus_product(y, x, w), y.double() + exact)
    for beta in (0, 1):
        for form in ("rows", "part", "columns"):
            z = laid_out(form, 5, 6)
            wanted = beta * z.double() + 1.7 * exact
            assert add_product_(z, x, w, alpha=1.7, beta=beta).data_ptr() == z.data_ptr()
            close(z, wanted)
    assert len(through) == 8


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_fresh_linear_is_no_view(bias: bool, contiguous: bool, through: list) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4) if contiguous else torch.randn(3, 2, 4).transpose(0, 1)
    weight, offset = torch.randn(5, 4), torch.randn(5) if bias else None
    y = fresh_linear(x, weight, offset)
    assert not y._is_view()
    assert y.is_contiguous()
    close(y, torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double()))
    assert through == [(6, 4)]


@needs_onednn
@pytest.mark.parametrize("layout", ["plain", "c_attn"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_lora_through_onednn(routing: str, layout: str, through: list) -> None:
    chosen = options(routing, False, layout)
    op = partial(routed_lora_linear, **chosen, backend="eager")
    assert_as_good_as(op, partial(defined_linear, **chosen), tensors(layout=layout), torch.float32)
    assert through


@needs_onednn
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_adapter_through_onednn(routing: str, residual: bool, through: list) -> None:
    torch.manual_seed(0)
    shapes = {"x": (3, 5, 6), "v": (3, 1, 6), "down_weight": (4, 6), "down_bias": (4,), "up_weight": (6, 4)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in (shapes | {"up_bias": (6,)}).items()}
    chosen = {"routing": routing, "activation": "gelu_new", "residual": residual}
    op = partial(routed_adapter, **chosen, backend="eager")
    assert_as_good_as(op, partial(reference_adapter, **chosen), given, torch.float32)
    assert through


def test_only_exact_float32_products_on_a_cpu_go_there(through: list) -> None:
    x, w = torch.randn(2, 3), torch.randn(3, 4)
    product(x.double(), w.double())
    product(x.bfloat16(), w.bfloat16())
    assert product(x[:0], w).shape == (0, 4)
    assert product(x.to("meta"), w.to("meta")).shape == (2, 4)
    torch.compile(product, backend="eager", fullgraph=True)(x, w)
    with torch.backends.mkldnn.flags(enabled=False):
        product(x, w)
    try:
        torch.set_float32_matmul_precision("high")
        product(x, w)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not through
