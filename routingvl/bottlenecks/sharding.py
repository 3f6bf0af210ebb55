"""Parameters that FSDP2 shards: telling them apart, and gathering them whole."""

from __future__ import annotations

import torch

try:
    from torch.distributed.tensor import DTensor
except ImportError:  # a torch built without distributed
    DTensor = ()


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of ``tensor`` only."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` without gradient and in full; every process has to ask, because each sends its part."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_writer(sharded: bool) -> bool:
    """Whether this process writes what several have gathered: the first one; without sharding, whoever is asked."""
    return not sharded or torch.distributed.get_rank() == 0


def own_class(module: torch.nn.Module) -> type:
    """The class of ``module`` without the one that ``fully_shard`` puts in front of it."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch."))
