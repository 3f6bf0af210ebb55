"""Activations: values, hand-written gradients, unknown names."""

import math

import pytest
import torch

from routingvl.kernels.activations import ACTIVATIONS, find_activation

# f(-1), f(0), f(2) from the closed forms.
BY_HAND = {
    "identity": lambda z: z,
    "relu": lambda z: max(z, 0.0),
    "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
    "gelu_new": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "silu": lambda z: z / (1 + math.exp(-z)),
}


def test_every_activation_has_a_closed_form_here() -> None:
    assert sorted(BY_HAND) == sorted(ACTIVATIONS)
    assert sorted(row.code for row in ACTIVATIONS.values()) == list(range(len(ACTIVATIONS)))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values(name: str) -> None:
    points = [-3.0, -1.0, 0.0, 0.5, 2.0]
    got = find_activation(name).forward(torch.tensor(points, dtype=torch.float64)).tolist()
    assert got == pytest.approx([BY_HAND[name](z) for z in points], abs=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_the_gradient(name: str) -> None:
    torch.manual_seed(0)
    row = ACTIVATIONS[name]
    z = torch.randn(50, dtype=torch.float64, requires_grad=True)
    dh = torch.randn(50, dtype=torch.float64)
    (want,) = torch.autograd.grad(row.forward(z), z, dh)
    torch.testing.assert_close(row.backward(dh, z.detach()), want)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'gleu'.*did you mean 'gelu'\?"):
        find_activation("gleu")
