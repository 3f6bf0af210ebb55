"""How close is close enough: the library's one table (benchmarks/gate.py), and an assertion that names the tensor."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from routingvl.benchmarks.gate import CAPS, failures, relative_rms

__all__ = ["CAPS", "assert_as_good_as", "relative_rms", "run"]

Op = Callable[..., Tensor]


def run(
    op: Op, tensors: Mapping[str, Tensor], dy: Tensor, needs: Mapping[str, bool] | None = None
) -> dict[str, Tensor]:
    """Call ``op(**tensors)`` on fresh leaves: its output as "y" and the gradient of <y, dy> for each leaf that needs
    one.
    """
    leaves = {
        name: tensor.detach().clone().requires_grad_(needs is None or needs[name])
        for name, tensor in tensors.items()
        if tensor is not None
    }
    y = op(**{name: leaves.get(name) for name in tensors})
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], dy.to(y.dtype), allow_unused=True)
    found = {
        f"d{name}": torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(wanted, grads, strict=True)
    }
    return {"y": y.detach(), **found}


def assert_as_good_as(op: Op, plain: Op, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Output and every gradient of ``op`` agree with the float64 ``plain`` and err little more than ``plain`` in
    ``dtype``.
    """
    rounded = {name: None if tensor is None else tensor.to(dtype) for name, tensor in tensors.items()}
    exact = {name: None if tensor is None else tensor.double() for name, tensor in rounded.items()}
    y = plain(**exact)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device, dtype)
    oracle = run(plain, exact, dy.double())
    missed = failures(run(op, rounded, dy), run(plain, rounded, dy), oracle, dtype)
    assert not missed, "; ".join(f"{name} {what}" for name, what in missed.items())
