"""Features of images that a frozen ViT gave, kept by the content of the image file: on disk or in memory.

    file_digest(data) -> 32 bytes                              SHA-256 of an image file's bytes
    MemoryCache(dtype)                                         of one run
    FeatureCache(root, key, shape, dtype)                      on disk, for all runs
        .find(digest) -> Tensor [L, d] | None                  checked against its checksum once
        .add(digests, features [B, L, d]), .refresh(), .close()
    FileDigests(root)                                          path, size and times of a file -> its digest, on disk

On disk, each ``key`` (what the features depend on beside the image) has a folder of its own below ``root``, named by
the SHA-256 of the key, so another model or preprocessing finds an empty cache. In it each writer has its own two files:

    <writer>.rows     features, row after row, each L * d values of the dtype in the machine's byte order
    <writer>.index    48 bytes per row: digest (32), row number (8), CRC-32 of the row (4), CRC-32 of the 44 before (4)

Rows are on the disk (fsync) before their records are written. A break therefore leaves rows without records, or a torn
record, and both are passed over. Nothing is ever changed in place, and no two processes write to one file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from routingvl.atomic_files import replacing, write_json
from routingvl.config.schema import FEATURE_DTYPES

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in FEATURE_DTYPES}
DESCRIPTION = "features.json"
READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
LAYOUT = 1  # of the files; part of every key
_FIELDS = struct.Struct("<32sQI")
_CHECK = struct.Struct("<I")
_RECORD_BYTES = _FIELDS.size + _CHECK.size
# A file changed again within the resolution of its times would look unchanged, so younger ones are not remembered.
_SETTLED_NS = 2_000_000_000

Stat = tuple[int, int, int]


class FeatureCacheError(ValueError):
    """A feature cache cannot be used as asked; the message names the file or setting and the fix."""


def file_digest(data: bytes) -> bytes:
    """SHA-256 of a file's content, 32 bytes."""
    return hashlib.sha256(data).digest()


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

    def close(self) -> None:
        """Nothing to close."""


class FeatureCache:
    """Features by image content, in memory-mapped files below ``root``.

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
        self._describe(json.loads(json.dumps(key)))
        self._entries: dict[bytes, list[_Entry]] = {}
        self._read_bytes: dict[Path, int] = {}
        self._writer: _Writer | None = None
        self.refresh()

    def _describe(self, key: dict[str, Any]) -> None:
        path = self.directory / DESCRIPTION
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            write_json(path, key)
            return
        except ValueError as error:
            # The folder's name is the key's digest, so its rows are good: only the explanation is lost.
            logger.warning("%s is damaged (%s) and is written again", path, error)
            write_json(path, key)
            return
        if found != key:
            raise FeatureCacheError(f"{path} describes other features; delete the folder {self.directory}")

    def __len__(self) -> int:
        return len(self._entries)

    def digests(self) -> frozenset[bytes]:
        """The images that the index lists; :meth:`find` may still find one's row damaged."""
        return frozenset(self._entries)

    def refresh(self) -> None:
        """Read what this and other writers added since the last call."""
        for path in sorted(self.directory.glob("*.index")):
            start = self._read_bytes.get(path, 0)
            with path.open("rb") as file:
                file.seek(start)
                data = file.read()
            whole = len(data) - len(data) % _RECORD_BYTES
            if whole:
                self._read_bytes[path] = start + whole
                self._read_records(path, data[:whole])

    def _read_records(self, path: Path, data: bytes) -> None:
        rows_file, damaged, lost = path.with_suffix(".rows"), 0, 0
        rows = _map_rows(rows_file, self.row_bytes)
        features = torch.from_numpy(rows).view(self.dtype).view(-1, *self.shape) if len(rows) else None
        for start in range(0, len(data), _RECORD_BYTES):
            record = data[start : start + _RECORD_BYTES]
            fields = record[: _FIELDS.size]
            if _CHECK.unpack(record[_FIELDS.size :])[0] != zlib.crc32(fields):
                damaged += 1
                continue
            digest, row, checksum = _FIELDS.unpack(fields)
            if row >= len(rows):
                lost += 1
                continue
            self._entries.setdefault(digest, []).append(_Entry(rows_file, rows[row], features[row], checksum))
        if damaged:
            logger.warning("%s: %d damaged records are passed over; their images are computed again", path, damaged)
        if lost:
            logger.warning("%s is shorter than its index says: %d images are computed again", rows_file, lost)

    def find(self, digest: bytes) -> Tensor | None:
        """The features [L, d] of an image as a view of the file, or None.

        The checksum of a row is computed the first time that it is asked for. A damaged row is passed over with a
        warning that names its file.
        """
        entries = self._entries.get(digest, [])
        while entries:
            if entries[0].intact():
                return entries[0].features
            logger.warning("%s: a damaged row is passed over; its image is computed again", entries[0].path)
            del entries[0]
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
        rows = _as_stored(features, self.dtype)
        if self._writer is None:
            with _named(self.directory.parent):
                self._writer = _Writer(self.directory)
        try:
            self._writer.append(digests, rows.flatten(1).view(torch.uint8).numpy())
        except BaseException:
            # What stands after the last record is of unknown length: the next rows go to files of their own.
            self.close()
            raise

    def close(self) -> None:
        """Close the files that this process writes; views stay valid."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@contextmanager
def _named(root: str | os.PathLike[str]) -> Iterator[None]:
    """Say whose folder it is that cannot be written, and what to do; a full disk stays the OSError that it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in READ_ONLY:
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


class _Entry:
    """One row of a file, and whether its checksum was found right."""

    __slots__ = ("checked", "checksum", "features", "path", "raw")

    def __init__(self, path: Path, raw: np.ndarray, features: Tensor, checksum: int) -> None:
        self.path, self.raw, self.features, self.checksum, self.checked = path, raw, features, checksum, False

    def intact(self) -> bool:
        self.checked = self.checked or zlib.crc32(self.raw) == self.checksum
        return self.checked


class _Writer:
    """The pair of files that one process appends to."""

    def __init__(self, directory: Path) -> None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:12]}"
        self.rows: BinaryIO = (directory / f"{name}.rows").open("xb")
        self.index: BinaryIO = (directory / f"{name}.index").open("xb")
        self.count = 0
        _sync_directory(directory)

    def append(self, digests: Sequence[bytes], rows: np.ndarray) -> None:
        self.rows.write(rows.data)
        _sync(self.rows)
        for digest, row in zip(digests, rows, strict=True):
            fields = _FIELDS.pack(digest, self.count, zlib.crc32(row))
            self.index.write(fields + _CHECK.pack(zlib.crc32(fields)))
            self.count += 1
        _sync(self.index)

    def close(self) -> None:
        for file in (self.rows, self.index):
            try:
                file.close()
            except OSError as error:  # of a full disk: the bytes that could not be written before
                logger.warning("%s: %s", file.name, error)


class FileDigests:
    """Remembers which content a file had, so that an unchanged file is not read again to know it.

    A file counts as unchanged while its size, its time of change and the time of change of its entry (which copying
    back an old time does not hide) stay the same. One changed in the last two seconds is not remembered.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.directory = Path(root) / "files"
        self._known: dict[str, tuple[Stat, bytes]] = {}
        for path in sorted(self.directory.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                self._known |= _parse_file_line(line)

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
        lines = [json.dumps([path, list(stat), digest.hex()]) + "\n" for path, (stat, digest) in settled.items()]
        # A file of its own for each call, written whole: many writers never meet.
        target = self.directory / f"{uuid.uuid4().hex}.jsonl"
        try:
            with replacing(target) as temporary, temporary.open("w", encoding="utf-8") as file:
                file.writelines(lines)
                _sync(file)
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            logger.warning("%s cannot be written: image files are read in every run to know them", self.directory)


def _parse_file_line(line: str) -> Iterator[tuple[str, tuple[Stat, bytes]]]:
    """The entry of one line, or none when the line is damaged: its file is then read again."""
    try:
        path, (size, changed, entry), digest = json.loads(line)
        if len(raw := bytes.fromhex(digest)) == 32:
            return iter([(path, ((size, changed, entry), raw))])
    except (ValueError, TypeError):
        logger.warning("a damaged line in the list of image files is passed over")
    return iter(())


def _map_rows(path: Path, row_bytes: int) -> np.ndarray:
    """The whole rows of a file, mapped: uint8 [rows, row_bytes]."""
    try:
        rows = path.stat().st_size // row_bytes
    except FileNotFoundError:
        rows = 0
    if not rows:
        return np.empty((0, row_bytes), dtype=np.uint8)
    # Copy-on-write, because torch wants writable memory; nobody writes.
    return np.asarray(np.memmap(path, dtype=np.uint8, mode="c", shape=(rows, row_bytes)))


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
