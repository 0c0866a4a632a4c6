"""Runs the rows of a capture through the teacher's blocks, and writes the files of every unit of rows (`layout.Unit`).

Files are written by threads: one unit is written while the next one is computed.

Shapes: B batch, N rows of a unit, H query heads, K key heads, T time, D head, E hidden size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from lolcats_formats import ArtifactWriter
from lolcats_kernels.softmax import AttentionSpec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lolcats_cli import stopping
from lolcats_cli.artifacts.float8 import SUFFIX, quantize
from lolcats_cli.artifacts.layout import HIDDEN, LOGITS, Layout, Unit, hidden_name
from lolcats_cli.artifacts.logits import likeliest
from lolcats_cli.progress import Advance
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.teacher.blocks import Run, block
from lolcats_cli.teacher.data import Rows
from lolcats_cli.teacher.record import Sink, recording
from lolcats_cli.teacher.statistics import attention_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Statistics:
    """The attention's figures of some rows, row by row."""

    def __init__(self) -> None:
        self._found: dict[str, list[Tensor]] = {}

    def sink(self, valid: Tensor | None, wanted: list[int]) -> Sink:
        """Measures the rows `wanted` of a batch; `valid` [B, T] says which tokens are real."""

        def measure(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
            for row in wanted:  # alone, so that its figures do not depend on the rows beside it
                real = None if valid is None else valid[row].to(q.device)
                for name, figure in zip(
                    ("entropy", "esl"), attention_statistics(q[row], k[row], spec, real), strict=True
                ):
                    self._found.setdefault(f"{name}.{layer:03d}", []).append(figure.cpu())

        return measure

    def tensors(self) -> dict[str, Tensor]:
        """`entropy.LLL` and `esl.LLL` [n, H] of every layer."""
        return {name: torch.stack(figures) for name, figures in self._found.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self._found = {name: list(tensor) for name, tensor in tensors.items()}


class UnitRecord:
    """The contents of a unit's files, for the rows that were computed so far."""

    def __init__(self, layout: Layout, unit: Unit) -> None:
        self.unit = unit
        self.rows = unit.computed
        self.done = 0  # rows
        self.statistics = Statistics()
        self._quantized, self._likeliest = layout.quantized, layout.logits
        self._kept = {
            key: {
                name: torch.empty(len(self.rows), *shape, dtype=dtype)
                for name, (shape, dtype) in layout.tensors(key).items()
            }
            for key in unit.activations
        }

    def batches(self, size: int) -> Iterator[list[int]]:
        """The rows still to be computed, batch by batch: up to `size` of one group."""
        for group in self.unit.groups:
            rows = [row for row in self.rows if row in group]
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                if self.rows.index(batch[0]) >= self.done:
                    yield batch

    def add(self, model: PreTrainedModel, run: Run, batch: list[int], rows: Rows, hidden: Tensor | None) -> None:
        """Compute a batch of rows from their tokens, or from the `hidden` states [B, T, E] in front of the block."""
        chosen = rows.select(torch.tensor(batch))
        measure = self.statistics.sink(chosen.valid, [i for i, row in enumerate(batch) if row in self.unit.measured])
        place = slice(self.done, self.done + len(batch))

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
            for name, tensor in zip("qkv", (q, k, v), strict=True) if layer in self._kept else ():
                if self._quantized:
                    tensor, scale = quantize(tensor)
                    self._kept[layer][f"{name}{SUFFIX}"][place].copy_(scale)
                self._kept[layer][name][place].copy_(tensor)
            measure(layer, q, k, v, spec)

        with recording(model, keep):
            behind = run(chosen.input_ids, chosen.valid, hidden)
        if HIDDEN in self._kept:
            assert behind is not None, "hidden states are stored in front of a layer"
            self._kept[HIDDEN]["hidden"][place].copy_(behind)
        if LOGITS in self._kept:
            assert behind is not None, "the last block was asked for logits"
            for i, logits in enumerate(behind):  # one row at a time, as a copy in fp32 is large
                found = likeliest(logits, self._likeliest, None if chosen.valid is None else chosen.valid[i])
                for name, tensor in found.items():
                    self._kept[LOGITS][name][self.done + i].copy_(tensor)
        self.done += len(batch)

    def files(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every file of the unit."""
        found = {self.unit.activations[key]: tensors for key, tensors in self._kept.items()}
        return found | ({self.unit.statistics: self.statistics.tensors()} if self.unit.statistics else {})

    @property
    def name(self) -> str:
        """What a checkpoint of the unit is called, before the number of rows."""
        return f"unit-{self.unit.block:03d}-{self.unit.split}-{self.unit.number:05d}-"

    def save(self, folder: Path) -> None:
        """Write the rows so far into `folder`."""
        for key, tensors in self._kept.items():
            kept = {name: tensor[: self.done] for name, tensor in tensors.items()}
            save_file(kept, folder / f"{key}.safetensors")
        save_file(self.statistics.tensors(), folder / "statistics.safetensors")
        (folder / "unit.json").write_text(json.dumps({"done": self.done}))

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        self.done = json.loads((folder / "unit.json").read_text())["done"]
        self.statistics.restore(load_file(folder / "statistics.safetensors"))
        for key, tensors in self._kept.items():
            found = load_file(folder / f"{key}.safetensors")
            for name, tensor in tensors.items():
                tensor[: self.done].copy_(found[name])


class BackgroundFiles:
    """Writes files into an artifact by threads. One unit at most waits to be written."""

    def __init__(self, writer: ArtifactWriter) -> None:
        self._writer = writer
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "write")
        self._pending: list[Future[None]] = []

    def put(self, files: dict[str, dict[str, Tensor]]) -> None:
        """Begin to write the files, when those before are written."""
        self.wait()
        self._pending = [self._pool.submit(self._writer.save, name, tensors) for name, tensors in files.items()]

    def wait(self) -> None:
        """Return when all is written; raises what a write raised."""
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._pool.shutdown()  # what was begun is finished


def record_units(
    model: PreTrainedModel,
    layout: Layout,
    units: Iterable[Unit],
    rows: dict[str, Rows],
    device: torch.device,
    batch_size: int,
    writer: ArtifactWriter,
    whole: Path,
    advance: Advance,
) -> None:
    """Computes and writes the units in order. A signal stops it after the current batch, and its results are kept.

    whole: where an earlier run's files of the blocks before may be, beside the writer's own directory.
    """
    checkpoints = Checkpoints(writer)
    saved = checkpoints.folder("unit-")
    for number, chosen in groupby(units, key=lambda unit: unit.block):
        logits = layout.logits > 0
        with block(model, layout.blocks[number], device, logits) as run, BackgroundFiles(writer) as files:
            for unit in chosen:
                record = UnitRecord(layout, unit)
                if saved and saved.name.startswith(record.name):
                    record.load(saved)
                    advance(record.done)
                for batch in record.batches(batch_size):
                    if record.done and checkpoints.due():
                        files.wait()
                        checkpoints.save(f"{record.name}{record.done:07d}", record.save)
                    record.add(model, run, batch, rows[unit.split], _hidden((writer.path, whole), unit, batch))
                    advance(len(batch))
                files.put({name: tensors for name, tensors in record.files().items() if not writer.has(name)})
                if stopping.requested():
                    files.wait()
                    stopping.check()


def _hidden(folders: tuple[Path, ...], unit: Unit, batch: list[int]) -> Tensor | None:
    """The stored hidden states [B, T, E] of these rows in front of the unit's block; None in front of the first."""
    if unit.block == 0:
        return None
    name = hidden_name(unit.block, unit.split, unit.number)
    with safe_open(next(folder / name for folder in folders if (folder / name).exists()), framework="pt") as file:
        stored = file.get_slice("hidden")
        return torch.cat([stored[row - unit.rows.start : row - unit.rows.start + 1] for row in batch])
