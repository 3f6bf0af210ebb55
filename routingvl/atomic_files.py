"""Files that appear whole or not at all: written beside their place under another name, then moved into it."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What a killed program leaves: a file or folder that it was writing, or an old folder that it was about to replace.
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{12}\.(?P<kind>tmp|old)")

STANDARD_OUTPUT = Path("standard output")  # for naming


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place (file or folder) when the block ends well.

    It does so once it is on the disk, with the mode that the user's umask gives to new files. A program that is killed
    leaves the old file; a folder may be missing until :func:`recover` puts the old one back.

    Raises OSError, which names ``path``, when the disk is full or the folder may not be written.
    """
    # Not the process id: two containers that share a file system may have the same one.
    writer = uuid.uuid4().hex[:12]
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    with naming(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _settle(temporary)
            if temporary.is_dir() and path.exists():
                # A folder cannot be replaced in one step: the old one moves aside until the new one stands.
                old = path.with_name(f".{path.name}.{writer}.old")
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
            _sync(path.parent)
        finally:
            remove(temporary)


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors of writing that leave the block are OSErrors that name ``path``, those of Rust libraries too.

    Those that name another file than ``temporary`` (or one in it) stay as they are.
    """
    try:
        yield
    except OSError as error:
        nameless = error.errno is not None and error.filename is None
        if nameless or (temporary is not None and str(error.filename).startswith(str(temporary))):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except Exception as error:  # safetensors and tokenizers have types of their own, and the number in the text
        if (found := re.search(r"\(os error (\d+)\)", str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def recover(folder: Path) -> None:
    """Put back what killed writers moved aside in ``folder``, and remove what they left; none may be at work there."""
    for entry in list(folder.iterdir()) if folder.is_dir() else ():
        if found := _LEFTOVER.fullmatch(entry.name):
            place = folder / found["name"]
            if found["kind"] == "old" and not place.exists():
                os.replace(entry, place)
            else:
                remove(entry)


def is_leftover(path: Path) -> bool:
    """Whether :func:`recover` would remove or rename it."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _settle(path: Path) -> None:
    """Bring a new file, or all of a new folder, to the disk, in the mode that the umask gives."""
    umask = os.umask(0o077)  # the only way to read it
    os.umask(umask)
    entries = [Path(parent, name) for parent, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
    for entry in entries:
        if not entry.is_symlink():
            if entry.stat().st_mode & 0o777 == 0o600:  # safetensors makes files that nobody else may read
                entry.chmod(0o666 & ~umask)
            _sync(entry)
    for parent, _, _ in os.walk(path):
        _sync(Path(parent))


def _sync(path: Path) -> None:
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing
            raise
    finally:
        os.close(descriptor)


def append_text(path: Path, text: str) -> None:
    """Add to the end of a text file all of ``text`` or nothing; raises OSError, which names the file."""
    with naming(path), path.open("ab") as file:
        size = file.tell()
        try:
            file.write(text.encode())
            file.flush()
        except OSError:
            file.truncate(size)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
