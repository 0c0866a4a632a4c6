"""Every byte of an artifact is written through the functions of this module.

A file appears under its name complete or not at all: it is written to a temporary file in the same directory, fsynced
and renamed, and the directory is fsynced. Tests that inject faults replace the functions of this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from .limits import TEMPORARY_SUFFIX

WORTH_A_THREAD = 2**20  # bytes of a chunk that is hashed beside its writing


class Written(NamedTuple):
    """What a manifest says of a file."""

    size: int  # bytes
    sha256: str  # hexadecimal


def temporary(path: Path) -> Path:
    """The temporary name beside `path`. It has no random part, so that such files cannot pile up: there is one writer
    at a time."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def write(path: Path, chunks: Iterable[Any]) -> Written:
    """Writes the chunks (bytes-like objects) as the file `path`, durably; returns its size and SHA-256.

    Permissions are 0666 less the umask. On an exception the temporary file is removed, and an older file under `path`
    is left as it was. Raises OSError (ENOSPC when the disk is full).
    """
    beside = temporary(path)
    digest, size = hashlib.sha256(), 0
    try:
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        # Hashed while it is written: both take about as long, and neither holds the interpreter's lock.
        with open(descriptor, "wb", buffering=0) as file, ThreadPoolExecutor(1) as hasher:
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                hashed: Future[None] | None = None
                if len(view) >= WORTH_A_THREAD:
                    hashed = hasher.submit(digest.update, view)
                else:
                    digest.update(view)
                size += len(view)
                while len(view):  # a raw write may be short
                    view = view[file.write(view) or 0 :]
                if hashed is not None:
                    hashed.result()
            fsync(descriptor)
        rename(beside, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = os.fspath(path)  # a failed write does not say where
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    return Written(size, digest.hexdigest())


def append(descriptor: int, data: bytes) -> None:
    """Appends to an open log. When the writer resumes after a crash, it cuts off what was half written."""
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]


def rename(source: Path, target: Path) -> None:
    """Renames within a directory and makes the new name durable."""
    os.replace(source, target)
    fsync_directory(target.parent)


def exchange(first: Path, second: Path) -> None:
    """Swaps the names of two directories in the same folder: in one step where the system can (Linux), else by three
    renames."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange_flag = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
    if swap is not None and swap(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange_flag) == 0:
        fsync_directory(second.parent)
        return
    code = ctypes.get_errno() if swap is not None else errno.ENOSYS
    if code not in (errno.ENOSYS, errno.EINVAL):  # these say that the system or the file system has no such call
        raise OSError(code, os.strerror(code), str(second))
    aside = temporary(second)
    rename(second, aside)
    rename(first, second)
    rename(aside, first)


def remove(path: Path) -> None:
    """Removes a file durably, if it is there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    fsync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Makes the directory and its missing parents, each entry durable."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
        fsync_directory(path.parent)


def fsync(descriptor: int) -> None:
    """The file's bytes reach the disk before this returns."""
    os.fsync(descriptor)


def fsync_file(path: Path) -> None:
    """The bytes of a file that is closed reach the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_directory(path: Path) -> None:
    """The directory's entries reach the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
