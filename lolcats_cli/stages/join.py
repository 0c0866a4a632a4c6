"""join: parts that several machines made, as the one artifact that one machine would have made.

Transfers are joined by layers, captures by rows. Where the parts were made alike, the result has the same bytes and so
the same id.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from lolcats_formats import Artifact, ArtifactWriter, differences
from lolcats_formats.writer import Resume
from torch import Tensor

from lolcats_cli import __version__
from lolcats_cli.errors import IdentityMismatch, UsageError
from lolcats_cli.progress import Progress
from lolcats_cli.stages.capture import ADVICE, SPLITS, row_groups, shard_name
from lolcats_cli.stages.disk import check_space
from lolcats_cli.stages.models import kept_layers, maps_file
from lolcats_cli.teacher.data import Rows, describe_rows, split_numbers
from lolcats_cli.teacher.record import LayerInfo

# What parts have in common, and what of their config tells them apart.
COMMON = {"capture": ("teacher", "config"), "transfer": ("teacher", "data", "parents", "config")}
NEEDED = {"capture": ("samples", "dtype", "val_fraction", "seed"), "transfer": ("layers",)}
PART = {"capture": "samples", "transfer": "layers"}


def join(
    parts: Sequence[Path | str],
    output: Path | str,
    *,
    resume: Resume = "auto",
    force: bool = False,
    progress: Progress = Progress(),
) -> Artifact:
    """Join captures of `--samples A-B`, or transfers of `--layers A-B`. Running it again resumes.

    Args:
        resume, force: what to do with an artifact that `output` holds, see `ArtifactWriter.create`.

    Raises:
        UsageError: fewer than two parts, or parts of different kinds.
        IdentityMismatch: parts that do not belong together, with the fields that differ; rows or layers that are
            missing or doubled.
        NotEnoughSpace: the disk lacks the bytes.
        FormatError: a part that is no finished artifact, or damaged; `output` holds something else.
    """
    opened = [Artifact.open(part, tuple(PART)) for part in parts]
    kind = opened[0].kind if opened else ""
    if len(opened) < 2 or any(part.kind != kind for part in opened):
        raise UsageError("join takes two or more parts of one kind: captures, or transfers.")
    for other in opened[1:]:
        fields = differences(_identity(opened[0]), _identity(other))
        if fields:
            raise IdentityMismatch(
                f"{other.path} does not belong to {opened[0].path}: they differ in {', '.join(fields)}."
            )
    lacking = [key for key in NEEDED[kind] if key not in opened[0].config]
    if lacking:
        raise IdentityMismatch(f"{opened[0].path} does not say its {', '.join(lacking)}. Make the parts again.")
    joined = _Captures(opened) if kind == "capture" else _Transfers(opened)
    with ArtifactWriter.create(
        output,
        kind,
        config={**opened[0].config, PART[kind]: joined.covered},
        teacher=opened[0].teacher,
        data=joined.data,
        parents=opened[0].parents,
        tool=f"lolcats {__version__}",
        resume=resume,
        force=force,
    ) as writer:
        if writer.finished:
            progress.note(f"{output} is finished already")
            return writer.finished
        return writer.finish(joined.write(writer, progress))


def _identity(part: Artifact) -> dict:
    found = {field: part.manifest[field] for field in COMMON[part.kind]}
    return {**found, "config": {key: value for key, value in part.config.items() if key != PART[part.kind]}}


class _Transfers:
    """Transfers of some layers each."""

    def __init__(self, parts: list[Artifact]) -> None:
        self.maker: dict[int, Artifact] = {}  # of each layer's maps
        for part in parts:
            for layer in part.config["layers"]:
                if layer in self.maker:
                    raise IdentityMismatch(f"Layer {layer} is doubled: {self.maker[layer].path} and {part.path}.")
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

    def write(self, writer: ArtifactWriter, progress: Progress) -> dict:
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
    """Captures of neighbouring rows each. Rows are numbered from the first of all."""

    def __init__(self, parts: list[Artifact]) -> None:
        parts = sorted(parts, key=lambda part: part.config["samples"])
        for before, after in pairwise(parts):
            last, first = before.config["samples"][1], after.config["samples"][0]
            if first != last + 1:
                what = f"{first} to {last} are doubled" if first <= last else f"{last + 1} to {first - 1} are missing"
                raise IdentityMismatch(f"Rows {what}, between {before.path} and {after.path}.")
        config = parts[0].config
        self.covered = [config["samples"][0], parts[-1].config["samples"][1]]
        self.dtype = getattr(torch, config["dtype"])
        self.layers = [LayerInfo.from_dict(layer) for layer in parts[0].teacher["layers"]]
        self.place: dict[int, tuple[Artifact, str, int]] = {}  # of each row: part, split, and number in that
        tokens: dict[int, Rows] = {}
        for part in parts:
            start, rows = len(self.place), part.config["samples"][1] - part.config["samples"][0] + 1
            for split, numbers in zip(SPLITS, split_numbers(rows, config["val_fraction"], config["seed"]), strict=True):
                found = Rows.from_tensors(part.load(f"tokens/{split}.safetensors"))
                for index, number in enumerate(numbers.tolist()):
                    self.place[start + number] = (part, split, index)
                    tokens[start + number] = found.select(torch.tensor([index]))
        drawn = split_numbers(len(tokens), config["val_fraction"], config["seed"])
        self.numbers = dict(zip(SPLITS, drawn, strict=True))
        self.rows = {s: _concatenated([tokens[n] for n in self.numbers[s].tolist()]) for s in SPLITS}
        self.data = describe_rows(self.rows, parts[0].data["path"])

    def write(self, writer: ArtifactWriter, progress: Progress) -> dict:
        counts, seq_len = {split: len(self.rows[split]) for split in SPLITS}, self.data["seq_len"]
        groups = list(row_groups(counts, seq_len, self.layers, self.dtype))
        per_row = [seq_len * layer.bytes_per_token(self.dtype) for layer in self.layers]
        todo = [
            (layer, *group)
            for layer in range(len(self.layers))
            for group in groups
            if not writer.has(shard_name(layer, *group[:2]))
        ]
        check_space(sum(per_row[layer] * len(index) for layer, _, _, index in todo), writer.path, ADVICE)
        for split in SPLITS:
            if not writer.has(f"tokens/{split}.safetensors"):
                writer.save(f"tokens/{split}.safetensors", self.rows[split].to_tensors())
        with progress.task("join", len(self.layers) * len(groups), "shards") as advance:
            advance(len(self.layers) * len(groups) - len(todo))
            for layer, split, number, index in todo:
                rows = [self._row(layer, n) for n in self.numbers[split][index].tolist()]
                writer.save(shard_name(layer, split, number), {x: torch.stack([row[x] for row in rows]) for x in "qkv"})
                advance(1)
        return {"bytes": sum(per_row) * len(self.place)}

    def _row(self, layer: int, row: int) -> dict[str, Tensor]:
        """q, k and v of one row: [H, T, D], [K, T, D], [K, T, D]."""
        part, split, index = self.place[row]
        for name in _shards(part, layer, split):
            count = part.header(name)["q"].shape[0]
            if index < count:
                return {x: tensor[index] for x, tensor in part.load(name).items()}
            index -= count
        raise IdentityMismatch(f"{part.path} has too few rows in layer {layer}. Capture it again.")


def _shards(part: Artifact, layer: int, split: str) -> list[str]:
    prefix = shard_name(layer, split, 0)[: -len("00000.safetensors")]
    return sorted(name for name in part.files if name.startswith(prefix))


def _concatenated(rows: list[Rows]) -> Rows:
    valid = [part.valid for part in rows if part.valid is not None]
    return Rows(torch.cat([part.input_ids for part in rows]), torch.cat(valid) if valid else None)
