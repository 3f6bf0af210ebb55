"""Reading annotation files, writing derived ones, and finding COCO images on disk."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from routingvl import json_files
from routingvl.atomic_files import replacing, write_text

COCO_PREFIX = re.compile(r"^COCO_([a-z]+\d{4})_")
_BREAKS = re.compile("[\t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")
_MOST_ID = 2**63
UNFINISHED = "prepare-data.unfinished"  # file that names those whose renaming was interrupted
_LONGEST_NAME = 255  # bytes of one part of a path, as file systems have it


class DataError(ValueError):
    """Annotations cannot be used; the message names the file, the entry and the fix."""


def read_json(path: str | Path, **options: Any) -> Any:
    """As :func:`routingvl.json_files.read_json`, of annotations and what is derived from them; raises DataError."""
    marker = Path(path).parent / UNFINISHED
    if marker.is_file() and Path(path).name in marker.read_text(encoding="utf-8").split("\n"):
        raise DataError(
            f"{path} may not fit the files beside it: `routingvl prepare-data` was interrupted; run it again"
        )
    return json_files.read_json(path, DataError, **options)


@contextlib.contextmanager
def required_keys(path: str | Path, kind: str, identity: Any) -> Iterator[None]:
    """Turn a failed look-up in one entry of an annotation file into a :class:`DataError` that names the entry."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{path}: {kind} {identity} has no key {error}") from error
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path}: {kind} {identity} does not have the expected form: {error}") from error


def required_list(content: Any, key: str, path: str | Path, expected: str) -> list[Any]:
    """The list under ``key`` of a file's content; DataError, which says what was ``expected``, when it has none."""
    if not isinstance(content, Mapping) or not isinstance(content.get(key), list):
        raise DataError(f'{path} has no "{key}" that is a list; expected {expected}')
    return content[key]


def check_id(value: Any, path: str | Path, kind: str, position: int | str = "") -> int | str:
    """``value``, if it can identify something: an integer of 64 bits, or a string that is not empty."""
    if type(value) is int and -_MOST_ID <= value < _MOST_ID:
        return value
    if type(value) is str and value:
        return value
    where = f"{path}: {kind}".replace("#", str(position))
    if type(value) is int:
        raise DataError(f"{where} has more than 64 bits")
    raise DataError(f"{where} {value!r:.60} must be an integer or a string that is not empty")


def check_ids(ids: Iterable[int | str], path: str | Path, kind: str, *, mixed: bool = False) -> None:
    """Raise :class:`DataError` for an id that occurs twice and, unless ``mixed``, for integers among strings."""
    ids = list(ids)
    if len(set(ids)) < len(ids):
        twice = next(identity for identity, count in Counter(ids).items() if count > 1)
        raise DataError(f"{path}: {kind} {twice} is listed twice")
    if not mixed and len(set(map(type, ids))) > 1:
        other = next(identity for identity in ids if type(identity) is not type(ids[0]))
        raise DataError(
            f"{path}: {kind} ids are partly integers, partly strings: {ids[0]!r}, {other!r}; use one of them"
        )


def one_line(raw: str) -> str:
    """A text without surrounding space; line breaks and tabs in it become single spaces, as in COCO's evaluation."""
    if raw.isprintable():
        return raw.strip()
    return " ".join(filter(None, map(str.strip, _BREAKS.split(raw))))


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
    renamed, in the order of ``files``: a failure while writing leaves the folder's files as they were. Should the
    program be killed between two renames, :func:`read_json` refuses these files until they are written again.

    Raises:
        DataError: another process writes into the folder.
        OSError: it cannot be written; the error names the file.
    """
    if not str(folder) or "\0" in str(folder):
        raise DataError(f"{str(folder)!r} cannot be the name of a folder")
    folder, marker = Path(folder), Path(folder, UNFINISHED)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DataError(f"{folder} is a file, or lies in one; name a folder") from error
    if odd := [name for name in files if os.path.lexists(folder / name) and not (folder / name).is_file()]:
        raise DataError(f"{folder / odd[0]} is not a regular file; remove it, or name another folder")
    with _only_writer(folder), contextlib.ExitStack() as stack:
        for leftover in (path for name in (*files, UNFINISHED) for path in folder.glob(f".{name}.*.tmp")):
            leftover.unlink()
        for name, value in reversed(files.items()):  # leaving the stack renames the last one first
            temporary = stack.enter_context(replacing(folder / name))
            with temporary.open("w", encoding="utf-8") as stream:
                json.dump(value, stream, ensure_ascii=False, separators=(",", ":"))
                stream.write("\n")
        write_text(marker, "\n".join(files))
        stack.pop_all().close()
        marker.unlink()
    return {name: folder / name for name in files}


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise DataError(f"another process is writing into {folder}; wait for it, or choose another folder") from error
    finally:
        os.close(handle)


def _bytes(part: str) -> int:
    return len(part.encode(errors="surrogatepass"))


class ImageFolders:
    """Finds an image by its COCO name: ``COCO_val2014_*.jpg`` lies in ``ROOT/Images/val2014`` or in ``ROOT/val2014``.

    The folder comes from the prefix of the file name, never from the split: Karpathy's restval images train, but lie in
    val2014. Names without such a prefix are taken relative to the root (or to ``ROOT/Images``).

    Args:
        root: image root; None when images are not needed (stored features), then every path is None.
        source: the file that names the images, for messages.
        allow_symlinks: let symbolic links below the root lead out of it.

    Raises:
        DataError: the root, or the folder that an image name asks for, does not exist.
    """

    def __init__(self, root: str | Path | None, source: str | Path = "annotations", allow_symlinks: bool = False):
        self.source, self.allow_symlinks = source, allow_symlinks
        self.root = None if root is None else Path(os.path.realpath(root))
        self._resolved: dict[tuple[str, str], Path] = {}  # of each folder and sub-folder that names speak of
        if self.root is not None and not self.root.is_dir():
            problem = "is no folder" if self.root.exists() else "does not exist"
            raise DataError(f"image folder {root} {problem}; correct data.images")

    def path(self, file_name: str, folder: str = "") -> Path | None:
        """Resolved path of an image, which is its identity; whether the file is there is not looked at.

        ``folder`` is used only for a name that does not say its folder itself. Raises :class:`DataError` for a name
        that no file below the root can have.
        """
        self._check_name(file_name)
        if folder:
            self._check_name(folder)
        if self.root is None:
            return None
        prefix = COCO_PREFIX.match(file_name)
        below, name = os.path.split(file_name)
        where = (prefix.group(1) if prefix else folder, below)
        if where not in self._resolved:
            self._resolved[where] = self._inside(self._folder(where[0]) / below)
        resolved = f"{self._resolved[where]}{os.sep}{name}"  # quicker than Path, for hundreds of thousands
        return self._inside(resolved) if os.path.islink(resolved) else Path(resolved)

    def _check_name(self, name: Any) -> None:
        if not isinstance(name, str):
            reason = "is no text"
        elif name.split("/")[-1] in ("", "."):
            reason = "names no file"
        elif "\0" in name or max(map(_bytes, name.split("/"))) > _LONGEST_NAME:
            reason = "cannot be the name of a file"
        elif name.startswith("/") or ".." in name.split("/"):
            reason = "leaves the image folder"
        else:
            return
        raise DataError(f"{self.source}: the image name {name!r:.80} {reason}; names are relative to data.images")

    def _inside(self, path: str | Path) -> Path:
        """The path without symbolic links; DataError when it leaves the root and may not."""
        resolved = Path(os.path.realpath(path))
        if not self.allow_symlinks and not resolved.is_relative_to(self.root):
            raise DataError(
                f"{self.source}: {path} leads out of data.images ({self.root}) through a symbolic link; set "
                "data.allow_symlinks=true to follow it, or data.images to the folder that holds the images"
            )
        return resolved

    def _folder(self, folder: str) -> Path:
        candidates = [self.root / "Images" / folder, self.root / folder]
        found = next((candidate for candidate in candidates if candidate.is_dir()), None)
        if found is None:
            raise DataError(f"no folder {folder!r} of images; looked for {' and '.join(map(str, candidates))}")
        return found
