"""Reading annotation files, writing derived ones, and finding COCO images on disk."""

from __future__ import annotations

import contextlib
import gc
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from routingvl.atomic_files import replacing

COCO_PREFIX = re.compile(r"^COCO_([a-z]+\d{4})_")


class DataError(ValueError):
    """Annotations cannot be used; the message names the file, the entry and the fix."""


def read_text(path: str | Path, fix: str = "") -> str:
    """A file's UTF-8 text, with or without a byte-order mark.

    Raises :class:`DataError` naming the file (and ``fix``) when it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}" + (f"; {fix}" if fix else "")) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from error


def read_json(path: str | Path, fix: str = "") -> Any:
    """Parse a JSON file. Raises :class:`DataError` naming the file (and ``fix``) when it is missing or not JSON."""
    text = read_text(path, fix)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not valid JSON (cut off while copying?): {error}") from error


@contextlib.contextmanager
def required_keys(path: str | Path, kind: str, identity: Any) -> Iterator[None]:
    """Turn a failed look-up in one entry of an annotation file into a :class:`DataError` that names the entry."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path}: {kind} {identity} has no key {error}") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path}: {kind} {identity} does not have the expected form: {error}") from error


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Switch off Python's cyclic garbage collector; use it as a decorator of functions that load annotations.

    Millions of small objects come to life there and stay; collecting among them frees nothing, and costs up to six
    times what the parsing does.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def write_json_files(folder: str | Path, files: Mapping[str, Any]) -> dict[str, Path]:
    """Write ``{file name: value}`` as JSON files into ``folder``; returns ``{file name: path}``.

    Every file is first written under a temporary name in the same folder, and only when all are complete are they
    renamed: a failure while writing leaves the folder's files as they were.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:  # leaving it renames, when every file is complete
        for name, value in files.items():
            temporary = stack.enter_context(replacing(folder / name))
            with temporary.open("w", encoding="utf-8") as stream:
                json.dump(value, stream, ensure_ascii=False, separators=(",", ":"))
                stream.write("\n")
    return {name: folder / name for name in files}


class ImageFolders:
    """Finds an image by its COCO name: ``COCO_val2014_*.jpg`` lies in ``ROOT/Images/val2014`` or in ``ROOT/val2014``.

    The folder comes from the prefix of the file name, never from the split: Karpathy's restval images train, but lie in
    val2014. Names without such a prefix are taken relative to the root (or to ``ROOT/Images``).

    Args:
        root: image root; None when images are not needed (stored features), then every path is None.

    Raises:
        DataError: the root, or the folder that an image name asks for, does not exist.
    """

    def __init__(self, root: str | Path | None):
        self.root = None if root is None else Path(root)
        self._folders: dict[str, Path] = {}
        if self.root is not None and not self.root.is_dir():
            raise DataError(f"image folder {self.root} does not exist")

    def path(self, file_name: str, folder: str = "") -> Path | None:
        """Path of an image; ``folder`` is used only for a name that does not say its folder itself."""
        if self.root is None:
            return None
        prefix = COCO_PREFIX.match(file_name)
        return self._resolve(prefix.group(1) if prefix else folder) / file_name

    def _resolve(self, folder: str) -> Path:
        if folder not in self._folders:
            candidates = [self.root / "Images" / folder, self.root / folder]
            for candidate in candidates:
                if candidate.is_dir():
                    self._folders[folder] = candidate
                    break
            else:
                raise DataError(f"no folder {folder!r} of images; looked for {' and '.join(map(str, candidates))}")
        return self._folders[folder]
