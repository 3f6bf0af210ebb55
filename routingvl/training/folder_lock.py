"""One writer at a time: a lock file that the operating system frees when its process ends, however it ends."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

from routingvl.atomic_files import naming

try:
    import fcntl
except ImportError:  # not a POSIX system: the file's text alone decides
    fcntl = None

_held: set[str] = set()  # of this process, to which its own record locks are no obstacle
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderLock:
    """A record lock (``lockf``) on a file that names its holder.

    Such a lock works between the machines of a network file system too (NFS since version 3 with its lock daemon, CIFS,
    Lustre with ``-o flock``), worker processes do not inherit it, and a dead process holds none, so that there is
    nothing stale to remove. Where a file system has no locks, the process that the file names decides: on this machine
    one that has ended counts for nothing, on another one it cannot be asked and the file has to be deleted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> str | None:
        """Take the lock, or say who holds it. Raises OSError where the file cannot be made."""
        key = str(self.path.resolve())
        if key in _held:
            return "this process"
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            holder = self._try(descriptor)
            if holder is None and self._is_at_its_place(descriptor):
                break
            os.close(descriptor)
            if holder is not None:
                return holder
        begin = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            with naming(self.path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {begin}".encode(), 0)
        except OSError:  # a full disk
            self.path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(key)
        return None

    def release(self) -> None:
        """Give the lock back, and remove the file."""
        self.path.unlink(missing_ok=True)
        _held.discard(str(self.path.resolve()))
        os.close(self._descriptor)

    def _try(self, descriptor: int) -> str | None:
        """None with the lock in hand, else what the file says of its holder."""
        text = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return text
            if error.errno not in _NO_LOCKS:
                raise
        return None if _has_ended(text) else f"{text} ({self.path})"

    def _is_at_its_place(self, descriptor: int) -> bool:
        """Whether the locked file still stands there; its last holder may have removed it meanwhile."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False


def _has_ended(text: str) -> bool:
    """Whether the process that a lock file names has ended, as far as can be told from here."""
    words = text.split()
    if len(words) < 4 or words[0] != "process" or not words[1].isdigit():
        return True
    if words[3] != socket.gethostname():
        return False
    try:
        os.kill(int(words[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return int(words[1]) == os.getpid()
