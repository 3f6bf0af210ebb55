"""The Triton kernels at sizes that hypothesis draws: on a GPU where there is one, else in Triton's interpreter."""

from functools import partial

import pytest
import torch
from routed_cases import FORMS, KERNEL_CASES, LAYOUTS, defined_linear, options, tensors
from tolerances import assert_as_good_as, run

from routingvl.kernels import ROUTINGS, routed_adapter, routed_lora_linear
from routingvl.kernels.optional_triton import interpreted
from routingvl.kernels.reference import reference_adapter

pytest.importorskip("triton")
pytest.importorskip("hypothesis")  # in a file of its own, so that without it the other tests still run
if not torch.cuda.is_available() and not interpreted():
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=8, deadline=None)
@given(
    case=st.sampled_from(KERNEL_CASES),
    layout=st.sampled_from(list(LAYOUTS)),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 90), st.integers(1, 80), st.integers(1, 40)),
    seed=st.integers(0, 1000),
)
def test_lora_of_any_size(case: tuple, layout: str, sizes: tuple[int, ...], seed: int) -> None:
    name, relu, tokens, _ = case
    drawn = {key: tensor.to(DEVICE) for key, tensor in tensors(tokens, layout, sizes=sizes, seed=seed).items()}
    kwargs = options(name, relu, layout, n=sizes[3])
    op = partial(routed_lora_linear, backend="triton", **kwargs)
    assert_as_good_as(op, partial(defined_linear, **kwargs), drawn, torch.float32)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    form=st.sampled_from(FORMS),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 140), st.integers(1, 40)),
    tokens=st.integers(1, 50),
    residual=st.booleans(),
)
def test_adapter_of_any_size(form: tuple[str, bool], sizes: tuple[int, ...], tokens: int, residual: bool) -> None:
    (name, relu), (batch, text, width, rank) = form, sizes
    tokens = tokens if ROUTINGS[name].max_visual_tokens is None else 1
    torch.manual_seed(sum(sizes))
    small = (rank * tokens) ** -0.5  # keeps the image's u near unit length, whatever the routing function
    shapes = {
        "x": (batch, text, width), "v": (batch, tokens, width), "down_weight": (rank, width), "down_bias": (rank,),
        "up_weight": (width, rank), "up_bias": (width,),
    }  # fmt: skip
    scales = {"v": small, "down_weight": width**-0.5, "down_bias": small, "up_weight": rank**-0.5}
    operands = {key: (torch.randn(shape) * scales.get(key, 1.0)).to(DEVICE) for key, shape in shapes.items()}
    dy = torch.randn(batch, text, width).to(DEVICE)
    kwargs = {"routing": name, "relu": relu, "residual": residual}
    exact = {key: operand.double() for key, operand in operands.items()}
    wanted = run(partial(reference_adapter, **kwargs), exact, dy.double())
    got = run(partial(routed_adapter, backend="triton", **kwargs), operands, dy)
    for key, want in wanted.items():  # where a draw cancels, rounding is all that is left: hence the 1
        assert (got[key] - want).norm() <= 1e-5 * (1 + want.norm()), key
