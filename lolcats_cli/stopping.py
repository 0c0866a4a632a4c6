"""Signals that ask for an end: at once, or at the next safe point of a stage that saves its state first.

A process has one set of signal handlers, so this is a module's state and not an object.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lolcats_cli.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REMINDER = 1.0  # seconds after which `Stopped` is raised again, if somebody has kept it

_requested: str | None = None  # the signal's name
_raised = False
_handling = False
_deferring = 0


def install() -> None:
    """Handle signals from now on: the first thing that a process does. Outside of `handled` they end it at once."""
    for number in SIGNALS:
        signal.signal(number, _handle)


@contextmanager
def handled() -> Iterator[None]:
    """In this block SIGINT and SIGTERM raise `Stopped`, until it leaves the block. A third signal ends the process as
    the system does. Any other error that comes of it is `Stopped` too."""
    global _requested, _raised, _handling
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, _remind)
    _handling = True
    try:
        yield
    except Exception as error:
        if _raised and _requested is not None:  # a library has made an error of its own of it
            raise Stopped(_requested) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _requested, _raised, _handling = None, False, False
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    global _requested
    again = _requested in signal.Signals.__members__  # a `request` does not count
    _requested = signal.Signals(number).name
    if again:
        signal.signal(number, signal.SIG_DFL)
    if again or not _deferring:
        _stop(frame)


def _remind(number: int, frame: FrameType | None) -> None:
    if _requested is not None:
        _stop(frame)


def _stop(frame: FrameType | None) -> None:
    """Raise `Stopped`; end the process where an exception would not come far: before a command has begun, after it has
    ended, and in an import, which libraries wrap in handlers of all sorts. What is on the disk is always resumable."""
    assert _requested is not None
    if not _handling or _is_importing(frame):
        os.write(2, f"{farewell(_requested, sys.argv[1:])}\n".encode(errors="replace"))
        os._exit(Stopped.exit_code)
    check()


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def farewell(name: str, args: list[str]) -> str:
    """The message of a stopped process."""
    return f"Stopped by {name}. The same command resumes: {shlex.join(['lolcats', *args])}"


@contextmanager
def deferred() -> Iterator[None]:
    """In this block a first signal waits for `check`. A second one does not wait."""
    global _deferring
    _deferring += 1
    try:
        yield
    finally:
        _deferring -= 1


def requested() -> bool:
    """Whether a signal is waiting."""
    return _requested is not None


def request(by: str) -> None:
    """Let `check` stop this process too, and name `by`, unless a signal is waiting already."""
    global _requested
    _requested = _requested or by


def check() -> None:
    """Raise `Stopped` if a signal is waiting."""
    global _raised
    if _requested is not None:
        _raised = True
        if _handling:
            signal.setitimer(signal.ITIMER_REAL, REMINDER, REMINDER)
        raise Stopped(_requested)
