"""Features of images that a frozen ViT gave, kept by the content of the image file: on disk or in memory.

On disk, each ``key`` (what the features depend on beside the image) has a folder of its own below ``root``, named by
the SHA-256 of the key, so another model or preprocessing finds an empty cache. In it each writer has its own two files:

    <writer>.rows     features, row after row, each L * d values of the dtype in the machine's byte order
    <writer>.index    48 bytes per row: digest (32), row number (8), CRC-32 of the row (4), CRC-32 of the 44 before (4)

Rows are on the disk (fsync) before their records are written. A break therefore leaves rows without records, or a torn
record, and both are passed over. Nothing is ever changed in place, and no two processes write to one file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import struct
import time
import uuid
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from routingvl.atomic_files import recover, remove, write_json, write_text
from routingvl.config.schema import FEATURE_DTYPES
from routingvl.json_files import read_json

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in FEATURE_DTYPES}
DESCRIPTION = "features.json"
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
LAYOUT = 1  # of the files; part of every key
_OWN_FOLDER = re.compile("[0-9a-f]{32}|files|files-exif")
_RECORD = struct.Struct("<32sQII")
# A file changed again within the resolution of its times would look unchanged, so younger ones are not remembered.
_SETTLED_NS = 2_000_000_000

Stat = tuple[int, int, int]


class FeatureCacheError(ValueError):
    """A feature cache cannot be used as asked; the message names the file or setting and the fix."""


def file_stat(path: str | os.PathLike[str]) -> Stat:
    """Size in bytes, time of the last change of content and of the file's entry, in nanoseconds. Raises OSError."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


class MemoryCache:
    """Features by image content, for as long as the process lives. The interface is that of :class:`FeatureCache`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rows: dict[bytes, Tensor] = {}

    def digests(self) -> frozenset[bytes]:
        """The images that :meth:`find` knows."""
        return frozenset(self.rows)

    def find(self, digest: bytes) -> Tensor | None:
        """The features [L, d] of an image, or None."""
        return self.rows.get(digest)

    def add(self, digests: Sequence[bytes], features: Tensor) -> None:
        """Keep ``features`` [B, L, d] of the images with these digests; raises FeatureCacheError as on disk."""
        rows = _as_stored(features, self.dtype)
        # A tensor for each image, so that sending one to another process does not send its whole batch.
        self.rows |= {digest: row.clone() for digest, row in zip(digests, rows, strict=True)}

    def refresh(self) -> None:
        """Nothing to read: what was added is there."""


class FeatureCache:
    """Features by image content, in files below ``root``.

    Args:
        root: folder of the cache; made when it is missing.
        key: plain values of everything that decides the features of an image: weights, settings, preprocessing.
        shape: (L, d), visual tokens and width.
        dtype: torch.float32, float16 or bfloat16; features are converted when they are added.

    Raises:
        FeatureCacheError: ``root`` is no folder or may not be written, or the folder of this key describes another one.
        OSError: a folder or file cannot be made or read.
    """

    def __init__(
        self, root: str | os.PathLike[str], key: Mapping[str, Any], shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        names = {value: name for name, value in DTYPES.items()}
        if dtype not in names:
            raise FeatureCacheError(f"features are stored as {', '.join(DTYPES)}, not {dtype}")
        if os.path.lexists(root) and not os.path.isdir(root):
            raise FeatureCacheError(f"feature cache {root} is a file; name a folder")
        self.shape, self.dtype = tuple(shape), dtype
        self.row_bytes = shape[0] * shape[1] * dtype.itemsize
        key = {"layout": LAYOUT, "shape": list(shape), "dtype": names[dtype], **key}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        self.directory = Path(root) / name
        with _named(root):
            self.directory.mkdir(parents=True, exist_ok=True)
            self._hold(Path(root))
        self._describe(json.loads(json.dumps(key)))
        self._entries: dict[bytes, list[tuple[Path, int, int]]] = {}  # digest -> file, row number, checksum
        self._files: dict[Path, BinaryIO] = {}  # of rows, open: one that is deleted can still be read
        self._read_bytes: dict[Path, int] = {}
        self._writer: str | None = None  # name of the files that this process appends to
        self.refresh()

    def _hold(self, root: Path) -> None:
        """Share the folder with other users until this one goes; who comes alone removes what killed ones left."""
        handle = os.open(root, os.O_RDONLY)
        weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # others are at work, or the file system has no locks
            pass
        else:
            with suppress(OSError):  # a folder that may not be written
                for folder in filter(_OWN_FOLDER.fullmatch, os.listdir(root)):  # others may keep theirs beside them
                    recover(root / folder)
                    for rows in (root / folder).glob("*.rows"):
                        index = rows.with_suffix(".index")
                        if not index.exists() or index.stat().st_size == 0:  # rows that no record names
                            remove(rows)
                            remove(index)
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)

    def _describe(self, key: dict[str, Any]) -> None:
        path = self.directory / DESCRIPTION
        try:
            found = read_json(path, FeatureCacheError, dict) if os.path.lexists(path) else None
        except FeatureCacheError as error:
            # The folder's name is the key's digest, so its rows are good: only the explanation is lost.
            if not path.is_file():
                raise
            logger.warning("%s is damaged (%s) and is written again", path, error)
            found = None
        if found is None:
            write_json(path, key)
        elif found != key:
            raise FeatureCacheError(f"{path} describes other features; delete the folder {self.directory}")

    def digests(self) -> frozenset[bytes]:
        """The images that the index lists; :meth:`find` may still find one's row damaged."""
        return frozenset(self._entries)

    def refresh(self) -> None:
        """Read what this and other writers added since the last call."""
        for path in sorted(self.directory.glob("*.index")):
            with _open(path) as file:
                file.seek(self._read_bytes.get(path, 0))
                data = file.read()
            data = data[: len(data) - len(data) % _RECORD.size]
            if data:
                self._read_bytes[path] = self._read_bytes.get(path, 0) + len(data)
                self._read_records(path, data)

    def _read_records(self, path: Path, data: bytes) -> None:
        rows, damaged, lost = path.with_suffix(".rows"), 0, 0
        if rows not in self._files:
            with suppress(FileNotFoundError):
                self._files[rows] = _open(rows)
        count = os.fstat(self._files[rows].fileno()).st_size // self.row_bytes if rows in self._files else 0
        for start in range(0, len(data), _RECORD.size):
            digest, row, checksum, check = _RECORD.unpack_from(data, start)
            if check != zlib.crc32(data[start : start + _RECORD.size - 4]):
                damaged += 1
            elif row >= count:
                lost += 1
            else:
                self._entries.setdefault(digest, []).append((rows, row, checksum))
        if damaged:
            logger.warning("%s: %d damaged records are passed over; their images are computed again", path, damaged)
        if lost:
            logger.warning("%s is shorter than its index says: %d images are computed again", rows, lost)

    def find(self, digest: bytes) -> Tensor | None:
        """The features [L, d] of an image, read from the file and checked, or None.

        A row that is damaged or no longer there is forgotten, with a warning that names its file. Threads may call it.
        """
        for entry in tuple(self._entries.get(digest, ())):
            path, row, checksum = entry
            data = torch.empty(self.row_bytes, dtype=torch.uint8)
            read = os.preadv(self._files[path].fileno(), [data.numpy()], row * self.row_bytes)
            if read == self.row_bytes and zlib.crc32(data.numpy()) == checksum:
                return data.view(self.dtype).view(self.shape)
            logger.warning("%s: a damaged row is passed over; its image is computed again", path)
            self._entries[digest] = [other for other in self._entries[digest] if other != entry]
        if not self._entries.get(digest):
            self._entries.pop(digest, None)
        return None

    def add(self, digests: Sequence[bytes], features: Tensor) -> None:
        """Append ``features`` [B, L, d] of the images with these digests; on the disk when this returns.

        They can be found after :meth:`refresh`.

        Raises:
            FeatureCacheError: the shape is another, or a value is not finite in the cache's dtype.
            OSError: the disk is full or cannot be written.
        """
        if features.shape != (len(digests), *self.shape):
            raise FeatureCacheError(
                f"{len(digests)} images need features [{len(digests)}, {self.shape[0]}, {self.shape[1]}], "
                f"not {list(features.shape)}"
            )
        rows = _as_stored(features, self.dtype).flatten(1).view(torch.uint8).numpy()
        if self._writer is None:
            self._writer = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:12]}"
        target = self.directory / self._writer
        try:
            with (
                _named(self.directory.parent),
                target.with_suffix(".rows").open("ab") as rows_file,
                target.with_suffix(".index").open("ab") as index,
            ):
                first = rows_file.tell() // self.row_bytes
                rows_file.write(rows.data)
                _sync(rows_file)
                for number, (digest, row) in enumerate(zip(digests, rows, strict=True), first):
                    record = _RECORD.pack(digest, number, zlib.crc32(row), 0)[:-4]
                    index.write(record + zlib.crc32(record).to_bytes(4, "little"))
                _sync(index)
            if first == 0:
                _sync_directory(self.directory)
        except BaseException:
            # What stands after the last record is of unknown length: the next rows go to files of their own.
            self._writer = None
            raise


class StoredFeatures(Mapping[Path, Tensor]):
    """Features [L, d] by the path of their image, on the CPU; those of a folder are read when they are asked for.

    Raises :class:`FeatureCacheError` for features whose file was cut, deleted or damaged since they were found.
    """

    def __init__(self, cache: FeatureCache | MemoryCache, digests: dict[Path, bytes]) -> None:
        self.cache, self.digests = cache, digests

    def __getitem__(self, path: Path) -> Tensor:
        if (row := self.cache.find(self.digests[path])) is None:
            raise FeatureCacheError(
                f"features of image {path} were damaged or deleted while they were used; start again to have them "
                "computed again"
            )
        return row

    def __iter__(self) -> Iterator[Path]:
        return iter(self.digests)

    def __len__(self) -> int:
        return len(self.digests)

    def __or__(self, other: StoredFeatures) -> StoredFeatures:
        return StoredFeatures(self.cache, self.digests | other.digests)


@contextmanager
def _named(root: str | os.PathLike[str]) -> Iterator[None]:
    """Say whose folder it is that cannot be written, and what to do; a full disk stays the OSError that it is."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise FeatureCacheError(
                f"feature cache {root} cannot be made, or was deleted while it was used; name another folder"
            ) from error
        if error.errno not in READ_ONLY:
            error.filename = error.filename or str(root)
            raise
        raise FeatureCacheError(
            f"feature cache {root} lacks images and cannot be written ({error.strerror}): make it writable, or give "
            "data.feature_cache another folder (null: no cache)"
        ) from error


def _as_stored(features: Tensor, dtype: torch.dtype) -> Tensor:
    rows = features.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(rows).all():
        name = str(dtype).removeprefix("torch.")
        raise FeatureCacheError(f"features of an image are not finite as {name}; use data.feature_dtype=float32")
    return rows


class FileDigests:
    """Remembers which content a file had, so that an unchanged file is not read again to know it.

    A file counts as unchanged while its size, its time of change and the time of change of its entry (which copying
    back an old time does not hide) stay the same. One changed in the last two seconds is not remembered.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if os.path.lexists(directory) and not self.directory.is_dir():
            raise FeatureCacheError(f"{directory} is not a folder; remove it")
        self._known: dict[str, tuple[Stat, bytes]] = {}
        for path in sorted(self.directory.glob("*.jsonl")):
            with _open(path) as file:
                lines = file.read().decode(errors="replace").splitlines()
            entries = [entry for entry in map(_parse_file_line, lines) if entry is not None]
            for name, entry in entries:  # the latest of each file, whichever list it is in
                if name not in self._known or entry[0][2] >= self._known[name][0][2]:
                    self._known[name] = entry
            if damaged := len(lines) - len(entries):
                logger.warning("%s: %d lines are damaged or old; their image files are read again", path, damaged)

    def known(self, path: str | os.PathLike[str]) -> bytes | None:
        """The digest of an unchanged file; None for one that is new, changed or missing."""
        stat, digest = self._known.get(os.path.abspath(path), (None, None))
        try:
            return digest if stat is not None and stat == file_stat(path) else None
        except OSError:
            return None

    def remember(self, files: Mapping[str, tuple[Stat, bytes]]) -> None:
        """Append files, path -> (their stat before they were read, digest), to the list.

        In a folder that may not be written the next run reads them again, which is logged. OSError: the disk is full.
        """
        now = time.time_ns()
        settled = {
            os.path.abspath(path): (tuple(stat), digest)
            for path, (stat, digest) in files.items()
            if max(stat[1:]) < now - _SETTLED_NS
        }
        if not settled:
            return
        self._known |= settled
        entries = ([path, list(stat), digest.hex()] for path, (stat, digest) in settled.items())
        lines = [json.dumps([*entry, _checksum(entry)]) + "\n" for entry in entries]
        # A file of its own for each call, written whole: many writers never meet.
        target = self.directory / f"{uuid.uuid4().hex}.jsonl"
        try:
            write_text(target, "".join(lines))
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            logger.warning("%s cannot be written: image files are read in every run to know them", self.directory)


def _checksum(entry: list[Any]) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def _parse_file_line(line: str) -> tuple[str, tuple[Stat, bytes]] | None:
    """The entry of one line, or None when the line is damaged: its file is then read again."""
    try:
        *entry, checksum = json.loads(line)
        path, (size, changed, inode), digest = entry
        if _checksum(entry) == checksum:
            return path, ((size, changed, inode), bytes.fromhex(digest))
    except (ValueError, TypeError, RecursionError):
        return None
    return None


def _open(path: Path) -> BinaryIO:
    """A regular file of the cache, for reading."""
    if not path.is_file() and os.path.lexists(path):
        raise FeatureCacheError(f"{path} is not a regular file; remove it")
    return path.open("rb", buffering=0)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
