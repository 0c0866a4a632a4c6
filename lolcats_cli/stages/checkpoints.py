"""When a stage saves what it needs to be resumed in the middle of a file: seldom enough to cost less than 2 % of the
run, and before it stops for a signal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lolcats_formats import ArtifactWriter

from lolcats_cli import stopping

SECONDS = 30.0  # between two checkpoints, at least
COST = 0.02  # of the run, at most


class Checkpoints:
    """The checkpoints of one stage, in the scratch folder of its artifact."""

    def __init__(self, writer: ArtifactWriter) -> None:
        self._writer = writer
        self._cost = 0.0  # seconds that the last one took
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether to save now: a signal waits, or the last checkpoint is old enough."""
        elapsed = time.monotonic() - self._last
        return stopping.requested() or elapsed >= max(SECONDS, self._cost / COST)

    def save(self, name: str, write: Callable[[Path], None]) -> None:
        """Let `write` fill a new folder and record it; then stop if a signal waits.

        A folder that is there is the recorded one: the stage was resumed from it, and has done nothing since.
        """
        started = time.monotonic()
        folder = self._writer.scratch / name
        if folder.exists():
            self._last = started
            stopping.check()
            return
        folder.mkdir()
        write(folder)
        self.record(folder, since=started)

    def record(self, folder: Path, since: float) -> None:
        """Record a folder in scratch that a library began to fill at the time `since`; then stop if a signal waits."""
        self._writer.checkpoint(folder)
        self._last = time.monotonic()
        self._cost = self._last - since
        stopping.check()

    def folder(self, prefix: str) -> Path | None:
        """The recorded checkpoint, if its name begins so."""
        found = self._writer.checkpointed
        return found if found is not None and found.name.startswith(prefix) else None
