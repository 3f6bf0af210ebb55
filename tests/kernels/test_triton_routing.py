"""The branches of the routing functions in the kernels, against their eager pairs: in the interpreter or on a GPU."""

import pytest
import torch
from routed_cases import FORMS

from routingvl.kernels import ROUTINGS, routed_adapter, routed_lora
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


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_nan_of_the_text_is_handed_on(relu, tokens):
    torch.manual_seed(0)
    x, v, a, b = torch.randn(2, 4, 8), torch.randn(2, tokens, 8), torch.randn(5, 8), torch.randn(6, 5)
    x[0, 1, 2] = torch.nan
    eager, fused = (
        routed_lora(x, v, a, b, routing="vllora", relu=relu, backend=backend) for backend in ("eager", "triton")
    )
    assert eager[0, 1].isnan().all()
    assert torch.equal(eager.isnan(), fused.isnan())
    down, up = torch.randn(5, 8), torch.randn(8, 5)
    eager, fused = (
        routed_adapter(x, None, down, None, up, None, routing="none", activation="relu", backend=backend)
        for backend in ("eager", "triton")
    )
    assert torch.equal(eager.isnan(), fused.isnan())


def test_scores_that_overflow_do_not_spoil_what_is_finite():
    # 3 components of rank are padded to 16: scores of infinity times the padding's zeros would be NaN everywhere.
    x, v = torch.full((1, 2, 4), 200.0).half(), torch.full((1, 2, 4), 200.0).half()
    a, b = torch.ones(3, 4).half(), torch.ones(2, 3).half()  # t = u = (800, 800, 800): scores are infinite in float16
    y = routed_lora(x, v, a, b, routing="vllora", backend="triton")
    assert y.isinf().all()
    assert torch.equal(y, routed_lora(x, v, a, b, routing="vllora", backend="eager"))


def test_tensors_of_several_devices_are_refused():
    x, v, a, b = torch.randn(1, 2, 4), torch.randn(1, 1, 4), torch.randn(3, 4), torch.randn(2, 3, device="meta")
    with pytest.raises(ValueError, match="x is on cpu and b on meta: move one"):
        routed_lora(x, v, a, b, routing="mul", backend="triton")
    down, up = torch.randn(3, 4, device="meta"), torch.randn(4, 3)
    with pytest.raises(ValueError, match="x is on cpu and down_weight on meta"):
        routed_adapter(x, None, down, None, up, None, routing="none", activation="relu", backend="triton")
