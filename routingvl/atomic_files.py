"""Files that appear whole or not at all: written beside their place under another name, then moved into it."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place (file or folder) when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: two containers that share a file system may have the same one.
    writer = uuid.uuid4().hex[:12]
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            # A folder cannot be replaced in one step: the old one moves aside until the new one stands.
            old = path.with_name(f".{path.name}.{writer}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
