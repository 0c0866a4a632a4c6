"""Signals that ask for an end: at once, or at the next safe point of a stage that saves its state first.

A process has one set of signal handlers, so this is a module's state and not an object.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from lolcats_cli.errors import Stopped

_requested: str | None = None  # the signal's name
_deferring = 0


@contextmanager
def handled() -> Iterator[None]:
    """In this block SIGINT and SIGTERM raise `Stopped`. A third signal ends the process as the system does."""
    global _requested
    before = {number: signal.signal(number, _handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _requested = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: object) -> None:
    global _requested
    again = _requested is not None
    _requested = signal.Signals(number).name
    if again:
        signal.signal(number, signal.SIG_DFL)
    if again or not _deferring:
        raise Stopped(_requested)


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
    """As a first signal would: wait for `check`, which names `by`. Nothing happens if one is waiting."""
    global _requested
    _requested = _requested or by


def check() -> None:
    """Raise `Stopped` if a signal is waiting."""
    if _requested is not None:
        raise Stopped(_requested)
