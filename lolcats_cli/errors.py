"""Errors for people. Each class is one documented exit code; `main` prints the message and exits with it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator


class LolcatsError(Exception):
    """A message for people, in whole sentences: what went wrong, where, and what to do next."""

    exit_code = 1


class UsageError(LolcatsError):
    """The options contradict each other, or cannot be used here."""

    exit_code = 2


class BadInput(LolcatsError):
    """A teacher, a data file or an artifact cannot be used."""

    exit_code = 3


class IdentityMismatch(LolcatsError):
    """Things do not belong together: the teacher, the tokenizer or the layers are others."""

    exit_code = 4


class NotEnoughSpace(LolcatsError):
    """There is not enough disk space or memory."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error tells that memory ran out: in Python, on a GPU, or in torch's CPU allocator."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


# By what the machine may have run out of: what the user can do.
SHORTAGES = {
    errno.ENOSPC: "Free some disk space",
    errno.EDQUOT: "Free some of your disk quota",
    errno.EFBIG: "Allow larger files (ulimit -f)",
    errno.EMFILE: "Allow more open files (ulimit -n)",
    errno.ENFILE: "Close other programs' files",
    errno.ENOMEM: "Free some memory",
}
# torch.save reports failed writes in these words. It does not tell why they failed.
_TORCH_WRITE = re.compile(
    r"PytorchStreamWriter|iostream error|inline_container.*(unexpected pos|write failed)", re.DOTALL
)


def shortage(error: BaseException) -> str | None:
    """What the user can do if the error, or one of its causes, tells that disk, memory or open files ran out.

    Errors of safetensors and torch.save, which are no OSError, are found by their words. None for other errors.
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
    """The error and its causes, in the order in which a traceback shows them."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


class Stopped(BaseException):
    """A signal has stopped the command. The same command resumes.

    It is not an Exception, because no library's `except Exception` may catch it.
    """

    exit_code = 75
