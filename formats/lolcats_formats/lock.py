"""A lock that allows one writer per directory. It is an advisory lock (flock), which the system frees when its owner
dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Self

from .errors import FormatError, Locked
from .limits import LOCK


class DirectoryLock:
    """Holds the lock from construction until `release`, or as a context manager.

    Raises Locked at once when another process has it, FormatError when no lock can be taken there.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._pid = os.getpid()
        self._descriptor: int | None = None
        while self._descriptor is None:
            descriptor = _open(self.path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, self.path):  # else its last owner removed it between our open and our lock
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{self._pid} {socket.gethostname()}\n".encode())
                    self._descriptor = descriptor
            except BlockingIOError:
                owner = os.read(descriptor, 256).decode("utf-8", "replace").split()
                by = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
                raise Locked(
                    f"{directory} is being written by {by}. Wait for it, or choose another output directory."
                ) from None
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Frees the lock and removes its file. A forked child, which shares the lock, changes nothing."""
        if self._descriptor is None or os.getpid() != self._pid:
            return
        descriptor, self._descriptor = self._descriptor, None
        with contextlib.suppress(OSError):
            if _is_at(descriptor, self.path):
                os.unlink(self.path)  # before the lock is freed, or it could be the next owner's
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _open(path: Path) -> int:
    """A descriptor of the lock file, made if need be; never waits, as opening a pipe or a device could."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            raise _no_lock(path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _no_lock(path)
    return descriptor


def _no_lock(path: Path) -> FormatError:
    return FormatError(f"{path} is not a regular file, so the directory cannot be locked. Remove that file.")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
