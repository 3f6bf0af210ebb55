"""The key of a cached launch, with arguments that hypothesis draws."""

import pytest
import torch

from routingvl.kernels.optional_triton import triton
from routingvl.kernels.triton_common.cached_launcher import specialization

pytest.importorskip("hypothesis")  # in a file of its own, so that without it the other tests still run

from hypothesis import given
from hypothesis import strategies as st

MEMORY = torch.zeros(64, dtype=torch.float64)


def tensors() -> st.SearchStrategy:
    """Tensors of several dtypes, aligned and not."""
    dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64])
    return st.builds(lambda dtype, first: MEMORY.view(dtype)[first:], dtypes, st.integers(0, 20))


ARGUMENTS = st.one_of(
    st.sampled_from([0, 1, 2, 15, 16, 17, 32, -1, -16, 2**31 - 1, 2**31, -(2**31), 2**40, 2**63, True, None, 0.0, 1.0]),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    tensors(),
)


@pytest.mark.skipif(triton is None, reason="no triton")
@given(first=ARGUMENTS, second=ARGUMENTS, specialize=st.booleans(), align=st.booleans())
def test_the_key_is_at_least_as_fine_as_tritons(first, second, specialize, align) -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    if not hasattr(jit, "native_specialize_impl"):
        pytest.skip("this Triton specializes elsewhere")
    from triton.backends.compiler import BaseBackend

    ours = specialization(first)
    if ours is not None and ours == specialization(second):
        theirs = [jit.native_specialize_impl(BaseBackend, x, False, specialize, align) for x in (first, second)]
        assert theirs[0] == theirs[1]
