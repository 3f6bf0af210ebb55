"""The branches of the routing functions in the kernels, against their eager pairs: in the interpreter or on a GPU."""

import pytest
import torch
from routed_cases import FORMS

from routingvl.kernels import ROUTINGS
from routingvl.kernels.optional_triton import interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="neither a GPU nor Triton's interpreter")

from routingvl.kernels.routing import route_bwd, route_fwd  # noqa: E402

ROWS, RANK = 16, 16


@triton.jit
def routing_kernel(p_z, p_dt, p_du, p_t, p_u, p_dz, ROUTING: tl.constexpr, RELU: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    t, u = tl.load(p_t + i), tl.load(p_u + i)
    tl.store(p_z + i, route_fwd(t, u, ROUTING, RELU))
    dt, du = route_bwd(tl.load(p_dz + i), t, u, ROUTING, RELU)
    tl.store(p_dt + i, dt)
    tl.store(p_du + i, du)


@pytest.mark.parametrize(("name", "relu"), [form for form in FORMS if ROUTINGS[form[0]].code is not None])
def test_branch_is_the_eager_pair(name: str, relu: bool) -> None:
    """A row of text to an image, so that what each adds to its image's gradient can be read."""
    torch.manual_seed(0)
    t, u, dz = (torch.randn(ROWS, 1, RANK, device=DEVICE) for _ in range(3))
    z, dt, du = (torch.empty_like(t) for _ in range(3))
    row = ROUTINGS[name]
    routing_kernel[(1,)](z, dt, du, t, u, dz, row.code, relu, RANK)
    torch.testing.assert_close(z, row.route(t, u, relu))
    want_t, want_u = row.route_backward(dz, t, u, relu)
    torch.testing.assert_close(dt, want_t.expand_as(dt))
    if row.uses_image:
        torch.testing.assert_close(du, want_u)
