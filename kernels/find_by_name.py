"""Look-up of a name in one of the package's tables."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def find_by_name(table: Mapping[str, Entry], name: str, kind: str) -> Entry:
    """The entry called ``name``; ``ValueError`` names the known ones and the nearest when there is none."""
    entry = table.get(name)
    if entry is None:
        close = difflib.get_close_matches(str(name), list(table), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown {kind} {name!r}: known are {', '.join(map(repr, table))}{hint}")
    return entry
