"""A lock between processes that ends with the one that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from pathlib import Path

if sys.platform == "win32":
    import msvcrt

    def _lock(handle: int) -> None:
        os.lseek(handle, 2**30, os.SEEK_SET)  # what is locked cannot be read: a byte far behind the text
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        os.lseek(handle, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(handle: int) -> None:
        # Not flock: a forked child (a DataLoader's worker) would hold that on after its parent was killed.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)


class FileLock:
    """An exclusive lock by way of ``path``, a file of its own that is there while the lock is held.

    The lock is the operating system's (fcntl(2) record locks; msvcrt on Windows), not the file: what a killed process
    leaves behind locks nothing, and the next holder takes it over and removes it. It holds against other processes,
    not within one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock; raises BlockingIOError naming the process that has it, OSError where nothing can be locked."""
        while self._handle is None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._take(handle)
            except BaseException:
                os.close(handle)
                raise
            if self._handle is None:  # its holder has removed it between the two calls
                os.close(handle)

    def _take(self, handle: int) -> None:
        try:
            _lock(handle)
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            holder = os.read(handle, 200).decode(errors="replace").strip()
            raise BlockingIOError(error.errno, holder or "another process") from error
        try:
            still_there = os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return
        if still_there:
            self._handle = handle
            with contextlib.suppress(OSError):  # who holds it is for people; a full disk may keep it to itself
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Give the lock back and remove its file; nothing where it is not held."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if sys.platform == "win32":  # which removes no open file; elsewhere the name goes before anyone can lock it
            os.close(handle)
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        if sys.platform != "win32":
            os.close(handle)
