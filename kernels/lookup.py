"""Look-up of a name in one of the package's tables."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Row = TypeVar("Row")


def find_row(table: Mapping[str, Row], name: str, kind: str) -> Row:
    """The row called ``name``; ``ValueError`` names the known ones of this kind and the nearest when there is none."""
    row = table.get(name)
    if row is None:
        close = difflib.get_close_matches(str(name), list(table), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r}: known are {', '.join(map(repr, table))}{hint}")
    return row
