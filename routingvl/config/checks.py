"""Errors of settings, and strict reading of dataclasses from dictionaries."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A setting is unknown or has a value that cannot work; the message names the key and the fix."""


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint such as ``; did you mean 'rank'?`` for a mistyped name, or an empty string when nothing is close."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(key: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(map(repr, choices))}{nearest(value, choices)}")


def from_dict(cls: type[T], data: Mapping[str, Any], source: str = "configuration") -> T:
    """Build a config dataclass from a mapping, refusing unknown keys.

    ``source`` names where the mapping came from (a file, say) and opens every error message.
    Raises :class:`ConfigError` for an unknown key (with the nearest known one) or an impossible value.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}{nearest(key, known)} (known keys: {', '.join(known)})")
    try:
        return cls(**data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
