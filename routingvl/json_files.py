"""JSON from anywhere (annotations, configs, caches, results) as plain values, or one sentence that says why not.

Refused, beside what is no JSON: files that are no regular files (a FIFO would hang), text that is not UTF-8, half a
surrogate pair, nesting too deep for Python, keys that stand twice in one object, integers of thousands of digits,
numbers beyond float64, NaN and Infinity (unless allowed), and another type at the top than the caller expects.
"""

from __future__ import annotations

import json
import math
import re
import stat
from pathlib import Path
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {dict: "an object", list: "a list", str: "a string"}


def read_text(path: str | Path, error: type[ValueError], fix: str = "") -> str:
    """The text of a UTF-8 file, with or without a byte-order mark.

    Raises ``error`` with one sentence that names the file, and ends in ``fix``, when it cannot be read.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise error(f"{path} is not a regular file" + (f"; {fix}" if fix else ""))
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text: {problem}") from problem
    except MemoryError as problem:
        raise error(f"{path} is too large for the memory of this machine") from problem
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror or problem}" + (f"; {fix}" if fix else "")) from problem
    except ValueError as problem:  # of the name: a NUL character, half a surrogate pair
        if isinstance(problem, error):
            raise
        raise error(f"{str(path)!r} cannot be the name of a file: {problem}") from problem


def read_json(
    path: str | Path,
    error: type[ValueError],
    kind: type | tuple[type, ...] = (dict, list),
    *,
    fix: str = "",
    nan: bool = False,
) -> Any:
    """The content of a JSON file.

    Args:
        path: of a regular file.
        error: class of what is raised.
        kind: what the file must hold: dict, list, or several types.
        fix: how to get the file, appended when it cannot be read.
        nan: let NaN and Infinity pass.

    Raises:
        error: with one sentence that names the file.
    """
    return parse_json(read_text(path, error, fix), str(path), error, kind, nan=nan)


def parse_json(
    text: str, source: str, error: type[ValueError], kind: type | tuple[type, ...] = (dict, list), *, nan: bool = False
) -> Any:
    """The content of a JSON text, as :func:`read_json`; ``source`` opens the sentence of an error."""

    def constant(name: str) -> float:
        if nan:
            return float(name)
        raise error(f"{source} holds {name}, which is no number")

    def number(digits: str) -> float:
        if math.isinf(value := float(digits)):
            raise error(f"{source} holds {digits[:20]}, which is too large a number")
        return value

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise error(f"{source} has the key {twice!r} twice in one object; keep one of them")
        return found

    try:
        value = json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=mapping)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as problem:
        raise error(f"{source} is not valid JSON (cut off while copying?): {problem}") from problem
    except UnicodeEncodeError as problem:
        raise error(f"{source} holds text with half a surrogate pair, which is no character") from problem
    except RecursionError as problem:
        raise error(f"{source} is nested too deeply to be read") from problem
    except ValueError as problem:  # the interpreter's limit on the digits of an integer
        if isinstance(problem, error):
            raise
        raise error(f"{source} holds an integer of thousands of digits") from problem
    if not isinstance(value, kind):
        expected = " or ".join(_KINDS.get(one, one.__name__) for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise error(f"{source} must hold {expected}, not {_KINDS.get(type(value), repr(value)[:40])}")
    return value
