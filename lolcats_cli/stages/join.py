"""join: puts parts that several machines made together into the artifact that one machine would have made.

Transfers are joined by layers, captures by rows. If the parts were made in the same way, the result has the same bytes
and the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lolcats_formats import Artifact, ArtifactWriter
from lolcats_formats.place import Resume
from torch import Tensor

from lolcats_cli import ranks
from lolcats_cli.artifacts.disk import check_space
from lolcats_cli.artifacts.layout import SPLITS, Layout, is_measured, summarize, tokens_name
from lolcats_cli.artifacts.maps import kept_layers, maps_file
from lolcats_cli.errors import IdentityMismatch
from lolcats_cli.progress import Progress
from lolcats_cli.stages.capture import ADVICE
from lolcats_cli.stages.parts import PART, open_parts
from lolcats_cli.stages.writing import Making, make_artifact
from lolcats_cli.teacher.data import Rows, describe_rows, split_numbers


def join(
    parts: Sequence[Path | str],
    output: Path | str,
    *,
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Joins captures of `--samples A-B`, or transfers of `--layers A-B`. Running it again resumes.

    Args:
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        UsageError: there are fewer than two parts, or parts of different kinds.
        IdentityMismatch: the parts do not belong together, or rows or layers are missing or occur twice.
        NotEnoughSpace: the disk has too little space.
        FormatError: a part is not a finished artifact or is damaged, or `output` holds something else.
    """
    ranks.check_alone("join")
    opened = open_parts(parts)
    kind = opened[0].kind
    joined = _Captures(opened) if kind == "capture" else _Transfers(opened)
    fields = {
        "config": {**opened[0].config, PART[kind]: joined.covered},
        "teacher": opened[0].teacher,
        "data": joined.data,
        "parents": opened[0].parents,
    }

    def work(making: Making) -> dict[str, Any]:
        return joined.write(making.writer, progress)

    return make_artifact(output, kind, fields, work, resume=resume, force=force, progress=progress)


class _Transfers:
    """Transfers that have some of the layers each."""

    def __init__(self, parts: list[Artifact]) -> None:
        self.maker: dict[int, Artifact] = {}  # of each layer's maps
        for part in parts:
            for layer in part.config["layers"]:
                if layer in self.maker:
                    raise IdentityMismatch(
                        f"Layer {layer} is in {self.maker[layer].path} and in {part.path}. Leave one of them out."
                    )
                self.maker[layer] = part
        done = {*self.maker, *kept_layers(parts[0])}
        missing = [layer for layer in range(len(parts[0].teacher["layers"])) if layer not in done]
        if missing:
            raise IdentityMismatch(
                f"No part has layer {', '.join(map(str, missing))}. Transfer it with --layers, and join it too."
            )
        self.covered = sorted(self.maker)
        self.data = parts[0].data
        self.events = {id(part): part.metrics() for part in parts}

    def write(self, writer: ArtifactWriter, progress: Progress) -> dict[str, Any]:
        with progress.task("join", len(self.covered), "layers") as advance:
            for layer in self.covered:
                part = self.maker[layer]
                if not writer.has(maps_file(layer)):
                    for event in self.events[id(part)]:
                        if event["layer"] == layer:
                            writer.log(**event)
                    writer.copy(maps_file(layer), (part, maps_file(layer)))
                advance(1)
        return {"layers": {str(layer): self.maker[layer].summary["layers"][str(layer)] for layer in self.covered}}


class _Captures:
    """Captures of neighbouring rows. Rows are numbered from the first row of all parts."""

    def __init__(self, parts: list[Artifact]) -> None:
        parts = sorted(parts, key=lambda part: part.config["samples"])
        for before, after in pairwise(parts):
            last, first = before.config["samples"][1], after.config["samples"][0]
            if first != last + 1:
                if first <= last:
                    raise IdentityMismatch(
                        f"Rows {first} to {last} are in {before.path} and in {after.path}. Capture one of them again."
                    )
                raise IdentityMismatch(
                    f"Rows {last + 1} to {first - 1} are missing between {before.path} and {after.path}. Capture them "
                    "with --samples, and join them too."
                )
        config = parts[0].config
        self.covered = [config["samples"][0], parts[-1].config["samples"][1]]
        self.place: dict[int, tuple[Artifact, str, int]] = {}  # of each row: part, split, and number in that
        self.measured: dict[int, int] = {}  # of each measured row: its number among those of its part and split
        tokens: dict[int, Rows] = {}
        for part in parts:
            for split, numbers in Layout.of(part.manifest).rows.items():
                found = Rows.from_tensors(part.load(tokens_name(split)))
                measured = [number for number in numbers if is_measured(part.config, number)]
                self.measured |= {number: place for place, number in enumerate(measured)}
                for index, number in enumerate(numbers):
                    self.place[number] = (part, split, index)
                    tokens[number] = found.select(torch.tensor([index]))
        drawn = split_numbers(len(tokens), config["val_fraction"], config["seed"])
        self.numbers = {s: (found + self.covered[0]).tolist() for s, found in zip(SPLITS, drawn, strict=True)}
        whole = _concatenated([tokens[number] for number in sorted(tokens)])
        self.rows = {split: whole.select(found) for split, found in zip(SPLITS, drawn, strict=True)}
        self.data = describe_rows(self.rows, parts[0].data["path"])
        self.layout = Layout.of({"config": config, "teacher": parts[0].teacher, "data": self.data})

    def write(self, writer: ArtifactWriter, progress: Progress) -> dict[str, Any]:
        layout, units = self.layout, list(self.layout.all_units())
        todo = [(unit, name) for unit in units for name in unit.files if not writer.has(name)]
        left = {name for _, name in todo}
        needed = sum(
            len(unit.rows) * layout.row_file_bytes(key)
            for unit in units
            for key, name in unit.activations.items()
            if name in left
        )
        check_space(needed, writer.path, ADVICE)
        for split in SPLITS:
            if not writer.has(tokens_name(split)):
                writer.save(tokens_name(split), self.rows[split].to_tensors())
        total = sum(len(unit.files) for unit in units)
        with progress.task("join", total, "shards") as advance:
            advance(total - len(todo))
            for unit, name in todo:
                if name == unit.statistics:
                    shapes = layout.statistics_shapes(unit.block)
                    places = {row: self.measured[self.numbers[unit.split][row]] for row in unit.measured}
                else:
                    shapes = layout.shapes(next(key for key, file in unit.activations.items() if file == name))
                    places = {row: self.place[self.numbers[unit.split][row]][2] for row in unit.rows}
                rows = [self._row(unit.split, row, name, place, shapes) for row, place in places.items()]
                writer.save(name, {key: torch.stack([row[key] for row in rows]) for key in shapes})
                advance(1)
        return {
            "bytes": layout.row_bytes * len(self.place),
            "layers": summarize(writer.path, layout, self.rows),
        }

    def _row(
        self, split: str, row: int, name: str, place: int, shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The tensors of one row of a split, from the part that holds it.

        They are in the part's files of the same kind as `name`. There the row is number `place`.
        """
        part, its_split, _ = self.place[self.numbers[split][row]]
        folder = name.rpartition("/")[0]
        for shard in sorted(file for file in part.files if file.startswith(f"{folder}/{its_split}-")):
            found = {key: info.shape for key, info in part.header(shard).items()}
            count = next(iter(found.values()), (0,))[0]
            if found != {key: (count, *shape) for key, shape in shapes.items()}:
                raise IdentityMismatch(
                    f"{part.path / shard} does not hold the tensors of its configuration. Capture it again."
                )
            if place < count:
                return {key: tensor[place] for key, tensor in part.load(shard).items()}
            place -= count
        what = "no statistics" if folder.startswith("statistics") else f"too few rows in {folder}"
        raise IdentityMismatch(f"{part.path} has {what}. Capture it again.")


def _concatenated(rows: list[Rows]) -> Rows:
    """All rows together, with the tensors that every part has."""
    parts = [part.to_tensors() for part in rows]
    return Rows(
        **{name: torch.cat([part[name] for part in parts]) for name in parts[0] if all(name in p for p in parts)}
    )
