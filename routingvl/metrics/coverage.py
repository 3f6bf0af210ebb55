"""Whether results and what they are compared with are of the same items."""

from __future__ import annotations

from collections.abc import Iterable


def difference(found: Iterable[object], wanted: Iterable[object], lack: str, foreign: str) -> str | None:
    """None when the ids ``found`` are the ``wanted`` ones, else how many ``lack`` a partner or are ``foreign``."""
    found, wanted = set(found), set(wanted)
    if found == wanted:
        return None
    missing, extra = (sorted(ids, key=lambda i: (isinstance(i, str), i)) for ids in (wanted - found, found - wanted))
    return f"{len(missing)} {lack} {missing[:5]}, {len(extra)} {foreign} {extra[:5]}"
