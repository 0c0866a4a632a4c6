"""Training block by block from tokens. Only the hidden states in front of the current block are on disk.

So a teacher of any size, with any number of tokens, needs the weights of one block in memory and the hidden states in
front of two blocks on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lolcats_formats import Artifact, ArtifactWriter, FormatError

from lolcats_cli.artifacts.disk import check_space
from lolcats_cli.artifacts.layout import Layout
from lolcats_cli.progress import Progress
from lolcats_cli.stages.activations import ComputedActivations
from lolcats_cli.stages.units import record_units
from lolcats_cli.stages.writing import tool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADVICE = "Capture fewer --samples, or take another disk."


class RollingActivations(ComputedActivations):
    """The activations of a capture of tokens, block by block.

    The hidden states in front of a block are a capture of their own in `folder`, made from the block before when the
    block is first read. They are removed when those in front of the next block are complete.
    """

    def __init__(
        self,
        capture: Artifact,
        load: Callable[[], PreTrainedModel],
        device: torch.device,
        block_size: int,
        folder: Path,
        progress: Progress,
    ) -> None:
        config = capture.config | {"store": "block", "block_size": block_size, "statistics": "none"}
        config.pop("logits", None)  # the transfer does not need them
        self._fields: dict[str, Any] = {"config": config, "teacher": capture.teacher, "data": capture.data}
        super().__init__(capture, load, device, Layout.of(self._fields))
        self._folder, self._progress = folder, progress

    @contextmanager
    def running(self, layers: list[int]) -> Iterator[None]:
        self._reach(self._block(layers))
        with super().running(layers):
            yield

    def remove(self) -> None:
        """Remove what is on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _reach(self, number: int) -> None:
        """Makes the hidden states in front of this block, and removes all others."""
        there = max((n for n in range(1, number + 1) if self._finished(n)), default=0)
        for following in range(there + 1, number + 1):
            self._compute(following)
        for other in self._folder.glob("*"):
            if other != self._place(number):
                shutil.rmtree(other)
        if number:
            self._stored = Artifact.open(self._place(number))

    def _compute(self, number: int) -> None:
        """The hidden states in front of a block, from those in front of the block before."""
        layout, place = self._layout, self._place(number)
        with ArtifactWriter.create(place, "capture", **self._fields, tool=tool()) as writer:
            units = [unit for unit in layout.units(number - 1) if not set(unit.files).issubset(writer.files)]
            check_space(layout.hidden_bytes * sum(len(unit.rows) for unit in units), place, ADVICE)
            with self._progress.task(f"block {number - 1}", sum(self.rows.values()), "rows") as advance:
                advance(sum(self.rows.values()) - sum(len(unit.rows) for unit in units))
                before = self._place(number - 1)
                record_units(
                    self.teacher(), layout, units, self.tokens, self._device, self._batch_size, writer, before, advance
                )
            writer.finish({})
        if number > 1:
            shutil.rmtree(self._place(number - 1))

    def _finished(self, number: int) -> bool:
        try:
            return bool(Artifact.open(self._place(number)).config == self._fields["config"])
        except FormatError:
            return False

    def _place(self, number: int) -> Path:
        return self._folder / f"{number:03d}"
