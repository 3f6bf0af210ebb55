"""Dropout for the frozen backbones, cheap on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LANES = 2**16  # values of the 16 random bits that decide about one component


class LaneDropout(nn.Dropout):
    """nn.Dropout that draws four components' fates from one 64-bit random number on a CPU.

    torch draws a random number for each component there, in one thread. The probability is p to within 2^-17, and kept
    components are scaled by what it really is, so that the expectation is exact. Numbers come from torch's generator.
    On other devices, and for a p that 16 bits do not express to within 1 %, it is nn.Dropout.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x of any shape and floating dtype -> the same shape."""
        cut = round(self.p * LANES)
        plain = not self.training or self.inplace or x.device.type != "cpu"
        if plain or not 50 <= cut < LANES:
            return super().forward(x)
        # All 64-bit numbers but one; random_, which knows all, breaks torch.compile's graph.
        words = torch.randint(-(2**63), 2**63 - 1, ((x.numel() + 3) // 4,))
        lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
        return x * (lanes >= cut - LANES // 2).to(x.dtype).mul_(LANES / (LANES - cut))


def lighten_dropout(model: nn.Module) -> None:
    """Replace every nn.Dropout below ``model`` by :class:`LaneDropout` of the same probability.

    One that has a forward hook, as those with an adapter behind them, stays.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and type(module) is nn.Dropout and not module._forward_hooks:
            model.set_submodule(name, LaneDropout(module.p, module.inplace).train(module.training))
