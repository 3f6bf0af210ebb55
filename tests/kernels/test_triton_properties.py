"""The Triton kernels at sizes that hypothesis draws: on a GPU where there is one, else in Triton's interpreter."""

from functools import partial

import pytest
import torch
from tolerances import assert_as_good_as, run

from routingvl.kernels.optional_triton import interpreted

pytest.importorskip("triton")
pytest.importorskip("hypothesis")  # in a file of its own, so that without it the other tests still run
if not torch.cuda.is_available() and not interpreted():
    pytest.skip("neither a GPU nor Triton's interpreter", allow_module_level=True)

import test_triton_adapter as adapter
import test_triton_lora as lora
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=8, deadline=None)
@given(
    case=st.sampled_from(lora.CASES),
    layout=st.sampled_from(list(lora.LAYOUTS)),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 90), st.integers(1, 80), st.integers(1, 40)),
    seed=st.integers(0, 1000),
)
def test_lora_of_any_size(case: tuple, layout: str, sizes: tuple[int, ...], seed: int) -> None:
    name, relu, tokens, _ = case
    drawn = lora.tensors(tokens, layout, sizes, seed)
    kwargs = lora.options(name, relu, layout, n=sizes[3])
    op, definition = partial(lora.fused_linear, **kwargs), partial(lora.defined_linear, **kwargs)
    assert_as_good_as(op, definition, drawn, torch.float32)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(1, 140), st.integers(1, 40)),
    tokens=st.integers(1, 50),
    relu=st.booleans(),
    residual=st.booleans(),
)
def test_adapter_of_any_size(sizes: tuple[int, ...], tokens: int, relu: bool, residual: bool) -> None:
    operands = {name: operand.float() for name, operand in adapter.tensors(tokens, sizes, seed=sum(sizes)).items()}
    op, plain = adapter.pair("vllora", relu, residual=residual)
    dy = adapter.tensors(sizes=sizes, seed=1)["x"].float()
    exact = run(plain, {name: operand.double() for name, operand in operands.items()}, dy.double())
    got = run(op, operands, dy)
    for name, want in exact.items():  # where a draw cancels, rounding is all that is left: hence the 1
        assert (got[name] - want).norm() <= 1e-5 * (1 + want.norm()), name
