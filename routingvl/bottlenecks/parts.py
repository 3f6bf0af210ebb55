"""Parts of a projection's output that are not equally wide, or do not stand side by side.

Phi-3 gives q, k and v of different widths at once where heads are grouped; GPT-NeoX gives q, k and v head by head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F


class Parts:
    """Parts of an output that are not equally wide or do not stand side by side.

    Attributes:
        sizes: how many columns each part has.
        columns: which ones.
        is_even: whether all have as many.
    """

    def __init__(self, parts: Sequence[Sequence[int]], out_features: int) -> None:
        columns = [column for part in parts for column in part]
        if not all(parts) or len(set(columns)) != len(columns) or not 0 <= min(columns) <= max(columns) < out_features:
            raise ValueError(f"parts must be different columns, at least one each, of the {out_features} outputs")
        self.columns = tuple(map(tuple, parts))
        self.sizes = tuple(len(part) for part in parts)
        self.is_even = len(set(self.sizes)) == 1
        widest = max(self.sizes)
        taken = [n * widest + column for n, size in enumerate(self.sizes) for column in range(size)]
        self._columns = columns, taken
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def even(self, b: torch.Tensor) -> torch.Tensor:
        """B [sum of sizes, R] with rows of 0 below the narrower parts: [G*widest, R], as the kernels take it."""
        if self.is_even:
            return b
        widest = max(self.sizes)
        return torch.cat([F.pad(part, (0, 0, 0, widest - part.shape[0])) for part in b.split(self.sizes)])

    def add(self, base: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """base [B, T, N] plus the update [B, T, G*widest] at its columns."""
        columns, taken = self._indices(base.device)
        update = update if self.is_even else update.index_select(-1, taken)
        return base.index_add(-1, columns, update.to(base.dtype))

    def _indices(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling():  # what is made there must not outlive it
            return tuple(torch.tensor(each, device=device) for each in self._columns)
        if device not in self._on:
            self._on[device] = tuple(torch.tensor(each, device=device) for each in self._columns)
        return self._on[device]
