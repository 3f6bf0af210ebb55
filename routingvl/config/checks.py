"""Errors of settings, and dataclasses of settings whose every value has a type and a range."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

LARGEST_INTEGER = 2**31 - 1
# What ``setting`` takes: (is a number outside of this limit, how a message says it).
LIMITS = {
    "least": (operator.lt, "at least"),
    "above": (operator.le, "above"),
    "most": (operator.gt, "at most"),
    "below": (operator.ge, "below"),
}
WORDS = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    dict: "an object",
    types.NoneType: "null",
}


class ConfigError(ValueError):
    """A setting is unknown or has a value that cannot work; the message names the key and the fix."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``; did you mean 'rank'?`` for a mistyped name, or an empty string when nothing is close."""
    close = difflib.get_close_matches(str(name), list(map(str, known)), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(key: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(
            f"{key}={shown(value)} is not one of {', '.join(map(repr, choices))}{nearest(value, choices)}"
        )


def shown(value: Any) -> str:
    """``value`` as a message shows it: at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists of lists of lists ...
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def setting(default: Any, *, choices: Sequence[Any] = (), **limits: float) -> Any:
    """A field of a dataclass that :func:`check_settings` checks; for a list, each of its items.

    Args:
        default: its value.
        choices: the values it can have; empty for any.
        **limits: ``least`` and ``most``, that a number may be, ``above`` and ``below``, that it may not.
    """
    return dataclasses.field(default=default, metadata={"choices": choices, "limits": limits})


@functools.cache
def types_of(cls: type) -> dict[str, tuple[Any, ...]]:
    """The types that each field of a dataclass can have."""
    hints = typing.get_type_hints(cls)
    return {
        name: typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,) for name, hint in hints.items()
    }


def check_settings(config: Any) -> None:
    """Raise :class:`ConfigError` for a value that is not of its field's type or out of range; lists become tuples."""
    for field in dataclasses.fields(config):
        value = check_value(field.name, getattr(config, field.name), types_of(type(config))[field.name], field.metadata)
        object.__setattr__(config, field.name, value)


def check_value(key: str, value: Any, hints: tuple[Any, ...], metadata: Mapping[str, Any]) -> Any:
    """``value`` of the field ``key``, checked, with a tuple for a list.

    A list that can be null may not be empty, and a list of any length may not name a thing twice.
    """
    choices, limits = metadata.get("choices", ()), metadata.get("limits", {})
    if int in hints:
        limits = {"most": LARGEST_INTEGER, **limits}
    if value is False and "no" in choices:
        value = "no"  # as YAML reads it without quotes
    if isinstance(value, os.PathLike) and str in hints:
        value = os.fspath(value)
    if not any(_is_a(value, hint) for hint in hints):
        raise ConfigError(f"{key}={shown(value)} must be {' or '.join(map(_described, hints))}")
    if isinstance(value, list | tuple):
        value, listed = tuple(value), next(hint for hint in hints if typing.get_origin(hint) is tuple)
        if not value and types.NoneType in hints:
            raise ConfigError(f"{key} is empty: nothing would be chosen; leave it out for the default")
        if typing.get_args(listed)[-1] is ... and len(set(value)) < len(value):
            raise ConfigError(f"{key}={shown(list(value))} names something twice")
    for item in value if isinstance(value, tuple) else () if value is None else (value,):
        if choices:
            check_choice(key, item, choices)
        if isinstance(item, str) and not item:
            raise ConfigError(f"{key} is empty; give a name or leave it out")
        if isinstance(item, str) and re.search("[\x00-\x1f\x7f\ud800-\udfff]", item):
            raise ConfigError(f"{key}={shown(item)} holds control characters, or is not UTF-8")
        for name, limit in limits.items() if item is not None else ():
            out_of_range, words = LIMITS[name]
            if out_of_range(item, limit):
                raise ConfigError(f"{key}={shown(item)} must be {words} {limit}")
    return value


def _is_a(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            return False
        parts = typing.get_args(hint)
        if parts[-1] is ...:
            parts = parts[:1] * len(value)
        return len(parts) == len(value) and all(map(_is_a, value, parts))
    if hint is float:
        return type(value) in (int, float) and abs(value) <= 1e300 and not math.isnan(value)
    return type(value) is hint if hint in (int, bool) else isinstance(value, hint)


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is not tuple:
        return WORDS.get(hint) or hint.__name__
    first, last = typing.get_args(hint)
    return f"a list of {WORDS[first].split(' ', 1)[1]}s" if last is ... else f"a list of two {WORDS[last][2:]}s"


def from_dict(cls: type[T], data: Mapping[str, Any], source: str = "configuration") -> T:
    """Build a config dataclass from a mapping, refusing unknown keys.

    ``source`` names where the mapping came from (a file, say) and opens every error message.
    Raises :class:`ConfigError` for an unknown key (with the nearest known one) or an impossible value.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source} must hold keys such as {dataclasses.fields(cls)[0].name}, not {shown(data)}")
    known = [field.name for field in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            raise ConfigError(
                f"{source}: unknown key {shown(key)}{nearest(key, known)} (known keys: {', '.join(known)})"
            )
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if absent := [name for name in required if name not in data]:
        raise ConfigError(f"{source}: {', '.join(absent)} missing")
    try:
        return cls(**data)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
