"""Errors for people. Each class is one documented exit code; `main` prints the message and exits with it."""

from __future__ import annotations


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


class Stopped(BaseException):
    """Stopped by a signal; the same command resumes. Not an Exception: no library's `except Exception` may keep it."""

    exit_code = 75
