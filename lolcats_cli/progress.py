"""How a stage tells what it is doing: by default not at all, and from the command line by bars or lines on stderr."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

# Control characters, also of the second set (C1), what turns the direction of text, and halves of characters.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """The text with control characters as escapes, for terminals; those in `keep` stay.

    Names and settings in files that others made may hold what moves a cursor or hides an error.
    """
    return _CONTROL.sub(lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), text)


class Advance(Protocol):
    def __call__(self, done: int = 1, **figures: float) -> None: ...


class Progress:
    """Silent progress, for stages called from Python."""

    def note(self, message: str) -> None:
        """Say one thing."""

    @contextmanager
    def task(self, name: str, total: int, unit: str = "it") -> Iterator[Advance]:
        """A piece of work of `total` units; call what it yields as they are done, with figures worth showing."""
        yield lambda done=1, **figures: None


INTERVALS = {"normal": 10.0, "verbose": 1.0}  # seconds between plain lines, by how much is to be said
_level = "normal"


def set_level(level: str) -> None:
    """Sets how much this process writes to stderr: "quiet", "normal" or "verbose"."""
    global _level
    _level = level


def for_people() -> Progress:
    """Progress on stderr, at the level that was set."""
    return Progress() if _level == "quiet" else StderrProgress(INTERVALS[_level])


class StderrProgress(Progress):
    """Shows tqdm bars on a terminal, and otherwise a plain line every `interval` seconds."""

    def __init__(self, interval: float = 10.0) -> None:
        self.interval = interval

    def note(self, message: str) -> None:
        print(printable(message), file=sys.stderr, flush=True)

    @contextmanager
    def task(self, name: str, total: int, unit: str = "it") -> Iterator[Advance]:
        if sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=total, desc=name, unit=unit, dynamic_ncols=True, leave=False, file=sys.stderr) as bar:

                def advance(done: int = 1, **figures: float) -> None:
                    if figures:
                        bar.set_postfix({key: f"{value:.4g}" for key, value in figures.items()}, refresh=False)
                    bar.update(done)

                yield advance
            return
        finished, told, spoken = 0, 0, time.monotonic()  # units so far and in the last line, and when that was

        def speak(done: int = 1, **figures: float) -> None:
            nonlocal finished, told, spoken
            finished += done
            seconds = time.monotonic() - spoken
            if seconds >= self.interval:
                rate = (finished - told) / max(seconds, 1e-9)
                told, spoken = finished, time.monotonic()
                left = f", {_duration((total - finished) / rate)} left" if 0 < finished < total and rate else ""
                shown = " ".join(f" {key}={value:.4g}" for key, value in figures.items())
                self.note(f"{name}: {finished}/{total} {unit}, {rate:.3g} {unit}/s{left}{shown}")

        yield speak


def _duration(seconds: float) -> str:
    """Seconds for people: 9 s, 3:20 min, 2:05 h."""
    minutes, hours = divmod(round(seconds), 60), divmod(round(seconds / 60), 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes[0]}:{minutes[1]:02d} min" if seconds < 3600 else f"{hours[0]}:{hours[1]:02d} h"
