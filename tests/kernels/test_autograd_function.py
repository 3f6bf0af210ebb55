"""The cheap signature of autograd functions binds what inspect's own does, and refuses the same."""

import inspect

import pytest

from routingvl.kernels.autograd_function import with_signature


def plain(x, low, scale=2.0):
    return x, low, scale


@with_signature
def kept(x, low, scale=2.0):
    return x, low, scale


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1, 2, 3), {}), ((1, 2), {}), ((1,), {"low": 2}), ((1, 2), {"scale": 4})]
)
def test_binds_as_inspect_does(args, kwargs):
    found, want = (inspect.signature(function).bind(*args, **kwargs) for function in (kept, plain))
    found.apply_defaults()
    want.apply_defaults()
    assert (tuple(found.args), dict(found.kwargs)) == (want.args, want.kwargs)


@pytest.mark.parametrize(("args", "kwargs"), [((), {}), ((1,), {}), ((1, 2, 3, 4), {}), ((1, 2), {"low": 3})])
def test_refuses_what_inspect_refuses(args, kwargs):
    with pytest.raises(TypeError):
        inspect.signature(kept).bind(*args, **kwargs)
