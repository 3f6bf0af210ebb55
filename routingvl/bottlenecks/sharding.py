"""Parameters of which each process holds a part (FSDP2, DeepSpeed ZeRO-3): telling them apart, whole, written to."""

from __future__ import annotations

import sys

import torch

try:
    from torch.distributed.tensor import DTensor, distribute_tensor
except ImportError:  # a torch built without distributed
    DTensor = ()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of ``tensor`` only."""
    return isinstance(tensor, DTensor) or _is_partitioned(tensor)


def _is_partitioned(tensor: torch.Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 took ``tensor`` apart; between uses it is empty then, of shape [0]."""
    return "deepspeed" in sys.modules and hasattr(tensor, "ds_id") and hasattr(tensor, "ds_shape")


def full_shape(tensor: torch.Tensor) -> list[int]:
    """The shape of ``tensor`` as a whole."""
    return list(tensor.ds_shape if _is_partitioned(tensor) else tensor.shape)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without gradient and in full; every process has to ask, because each sends its part."""
    if _is_partitioned(tensor):
        with sys.modules["deepspeed"].zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Write ``values``, whole and the same in every process, into ``parameter``."""
    if _is_partitioned(parameter):
        with sys.modules["deepspeed"].zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(values)
    elif isinstance(parameter, DTensor):
        values = values.to(parameter.device)
        parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(values)


def is_writer(sharded: bool) -> bool:
    """Whether this process writes what several have gathered: the first one; without sharding, whoever is asked."""
    return not sharded or torch.distributed.get_rank() == 0


def own_class(module: torch.nn.Module) -> type:
    """The class of ``module`` without the one that ``fully_shard`` puts in front of it."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch."))
