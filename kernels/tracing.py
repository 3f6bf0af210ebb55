"""Whether calls run as they are written, or something traces or transforms them."""

from __future__ import annotations

import torch


def transformed() -> bool:
    """Whether something else than plain execution goes on: a compiler traces, or torch.func transforms."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
