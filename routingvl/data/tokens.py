"""Texts as token ids, tokenised once and kept in two flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Texts given to the tokenizer at a time: enough for its threads, little enough for lists of Python integers.
PART = 8192


class TokenTable(Sequence):
    """The token ids of a list of texts: 4 bytes a token and 8 a text.

    Arrays, not lists: worker processes share them with the process that made them.

    Args:
        texts: any number.
        encode: several texts -> a list of token ids for each, as the collators' ``encode``.

    Attributes:
        ids: those of all texts, one after the other: int32 [tokens].
    """

    def __init__(self, texts: Sequence[str], encode: Callable[[list[str]], Sequence[Sequence[int]]]) -> None:
        parts, lengths = [np.zeros(0, np.int32)], [0]
        for start in range(0, len(texts), PART):
            rows = encode(list(texts[start : start + PART]))
            lengths += map(len, rows)
            parts.append(np.fromiter((token for row in rows for token in row), np.int32))
        self.ids = np.concatenate(parts)
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> list[int]:
        """The token ids of text ``index``."""
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return self.ids[self._ends[index] : self._ends[index + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text: int64 [texts]."""
        return np.diff(self._ends)
