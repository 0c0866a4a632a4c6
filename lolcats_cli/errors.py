"""Errors for people. Each class is one documented exit code; `main` prints the message and exits with it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator


class LolcatsError(Exception):
    """What went wrong, where, and what to do next, in one sentence."""

    exit_code = 1


class UsageError(LolcatsError):
    """Options that contradict each other or cannot be served."""

    exit_code = 2


class BadInput(LolcatsError):
    """A teacher, data file or artifact that cannot be used."""

    exit_code = 3


class IdentityMismatch(LolcatsError):
    """Things that do not belong together: another teacher, tokenizer or set of layers."""

    exit_code = 4


class NotEnoughSpace(LolcatsError):
    """Not enough disk or memory."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory ran out, in Python, on a GPU, or in torch's CPU allocator."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


# What the machine may have run out of, and what the user can do.
SHORTAGES = {
    errno.ENOSPC: "Free some disk space",
    errno.EDQUOT: "Free some of your disk quota",
    errno.EFBIG: "Allow larger files (ulimit -f)",
    errno.EMFILE: "Allow more open files (ulimit -n)",
    errno.ENFILE: "Close other programs' files",
    errno.ENOMEM: "Free some memory",
}
# torch.save tells of every write that fails in such words, but not why it failed.
_TORCH_WRITE = re.compile(
    r"PytorchStreamWriter|iostream error|inline_container.*(unexpected pos|write failed)", re.DOTALL
)


def shortage(error: BaseException) -> str | None:
    """What helps against the lack of disk, memory or open files that the error, or one that it came of, tells of.

    Also in the words of libraries that do not raise OSError: safetensors, torch.save. None for other errors.
    """
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in SHORTAGES:
            return SHORTAGES[link.errno]
        if is_out_of_memory(link):
            return "Free some memory, or give smaller sizes"
        for number, advice in SHORTAGES.items():
            if os.strerror(number) in str(link):
                return advice
        if isinstance(link, RuntimeError) and _TORCH_WRITE.search(str(link)):
            return SHORTAGES[errno.ENOSPC]
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what it came of, as a traceback would show them."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


class Stopped(BaseException):
    """Stopped by a signal; the same command resumes. Not an Exception: no library's `except Exception` may keep it."""

    exit_code = 75
