"""What a capture keeps on disk, and in which files.

A capture stores one of three things, from which the transfer gets the same queries, keys and values:

- "attention": q, k and v of every layer.
- "block": the hidden states in front of every `block_size`-th layer except the first. The transfer computes q, k and v
  from them with the teacher's layers.
- "tokens": the tokens alone. The transfer runs the teacher.

With any of them it may also store the teacher's likeliest next tokens, which `lora` learns from: `config["logits"]` of
them behind every token, with their log-probabilities. The last block computes them.

Rows are computed in **groups** of neighbouring rows. The transfer holds one group in memory and shuffles its rows, and
forward passes begin with a group, for every store. A **unit** is written together: it is one group, or, for hidden
states, as many neighbouring groups as fill a shard.

Shapes: N rows, T tokens of a row, E hidden size, H query heads, L likeliest next tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lolcats_cli.artifacts import float8 as quantized
from lolcats_cli.artifacts.float8 import SUFFIX
from lolcats_cli.artifacts.logits import DTYPES as LOGITS_DTYPES
from lolcats_cli.artifacts.stores import GROUP_BYTES, SHARD_BYTES, blocks, group_rows
from lolcats_cli.teacher.data import Rows, split_numbers
from lolcats_cli.teacher.record import LayerInfo

SPLITS = ("train", "validation")
SAMPLE = 16  # one in this number of rows is measured, unless all are
HIDDEN, LOGITS = "hidden", "logits"  # the keys of files that do not hold the q, k and v of a layer


@dataclass(frozen=True)
class Unit:
    """Rows whose activations are written together.

    Attributes:
        block: the number of the block of layers that computes them.
        number: the number of the unit in its split, the same in every block.
        groups: the ranges of rows, in the split, of the unit's groups.
        measured: the rows, in the split, whose attention is measured.
        activations: files by what they hold: the q, k and v of the layer with this number, the hidden states behind
            the block (`HIDDEN`), or the likeliest next tokens (`LOGITS`).
        statistics: the file with the statistics of the measured rows; None if no row is measured.
    """

    block: int
    split: str
    number: int
    groups: tuple[range, ...]
    measured: tuple[int, ...]
    activations: dict[int | str, str]
    statistics: str | None

    @property
    def rows(self) -> range:
        return range(self.groups[0].start, self.groups[-1].stop)

    @property
    def computed(self) -> tuple[int, ...]:
        """The rows that pass through the block: all of them, or only the measured ones if nothing else is stored."""
        return tuple(self.rows) if self.activations else self.measured

    @property
    def files(self) -> list[str]:
        return [*([self.statistics] if self.statistics else []), *self.activations.values()]


@dataclass(frozen=True)
class Layout:
    """The files of one capture.

    Attributes:
        store: one of `stores.STORES`.
        block_size: the layers of a block, for the store "block".
        layers: the teacher's layers.
        hidden_size: E.
        dtype: of the activations.
        seq_len: T.
        rows: by split, the numbers that its rows have in the data, in the order of the split.
        config: the capture's configuration.
    """

    store: str
    block_size: int | None
    layers: list[LayerInfo]
    hidden_size: int
    dtype: torch.dtype
    seq_len: int
    rows: dict[str, list[int]]
    config: dict[str, Any]

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Layout:
        """The layout of the capture with this manifest. The fields that a new capture begins with are enough."""
        config, teacher = manifest["config"], manifest["teacher"]
        counts = manifest["data"]["rows"]
        numbers = split_numbers(sum(counts.values()), config["val_fraction"], config["seed"])
        first = 0 if "keep" in config else config["samples"][0]
        return cls(
            store=config.get("store", "attention"),
            block_size=config.get("block_size"),
            layers=[LayerInfo.from_dict(layer) for layer in teacher["layers"]],
            hidden_size=teacher["hidden_size"],
            dtype=getattr(torch, config["dtype"]),
            seq_len=manifest["data"]["seq_len"],
            rows={split: (first + found).tolist() for split, found in zip(SPLITS, numbers, strict=True)},
            config=config,
        )

    @property
    def quantized(self) -> bool:
        """Whether q, k and v are stored in 8 bits."""
        return self.config.get("stored") == quantized.NAME

    @property
    def logits(self) -> int:
        """L; 0 if no next tokens are stored."""
        return int(self.config.get("logits", 0))

    @property
    def attentions(self) -> list[int]:
        """The layers that have softmax attention."""
        return [number for number, layer in enumerate(self.layers) if layer.has_attention]

    @property
    def blocks(self) -> list[range]:
        """The layers of every block. There is one block if no hidden states are stored."""
        return blocks(len(self.layers), self.block_size)

    @property
    def bytes(self) -> int:
        """Bytes of all activations and likeliest next tokens on disk."""
        return self.row_bytes * sum(map(len, self.rows.values()))

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's activations and likeliest next tokens on disk."""
        logits = self.row_file_bytes(LOGITS) if self.logits else 0
        if self.store == "attention":
            return logits + sum(self.row_file_bytes(layer) for layer in range(len(self.layers)))
        return logits + self.hidden_bytes * (len(self.blocks) - 1)

    @property
    def hidden_bytes(self) -> int:
        """Bytes of a row's hidden states in front of one layer."""
        return self.seq_len * self.hidden_size * self.dtype.itemsize

    def groups(self, split: str) -> list[range]:
        """The rows of the split, group by group."""
        per_layer = [self.seq_len * layer.bytes_per_token(self.dtype) for layer in self.layers]
        size, count = group_rows(per_layer, SHARD_BYTES, GROUP_BYTES), len(self.rows[split])
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    def units(self, block: int) -> Iterator[Unit]:
        """What the block writes, in order."""
        last = block == len(self.blocks) - 1
        for split in SPLITS:
            groups = self.groups(split)
            per_unit = max(1, SHARD_BYTES // (self.hidden_bytes * max(map(len, groups), default=1)))
            runs = [groups[i : i + per_unit] for i in range(0, len(groups), per_unit)]
            for number, run in enumerate(runs if self.store == "block" else [[group] for group in groups]):
                rows = range(run[0].start, run[-1].stop)
                activations: dict[int | str, str] = {}
                if self.store == "attention":
                    activations = {layer: shard_name(layer, split, number) for layer in self.attentions}
                elif self.store == "block" and not last:
                    activations = {HIDDEN: hidden_name(block + 1, split, number)}
                if self.logits and last:
                    activations[LOGITS] = logits_name(split, number)
                measured = tuple(row for row in rows if is_measured(self.config, self.rows[split][row]))
                folder = f"statistics/{block:03d}" if self.store == "block" else "statistics"
                attends = any(layer in self.attentions for layer in self.blocks[block])
                statistics = f"{folder}/{split}-{number:05d}.safetensors" if measured and attends else None
                unit = Unit(block, split, number, tuple(run), measured, activations, statistics)
                if unit.files:
                    yield unit

    def all_units(self) -> Iterator[Unit]:
        for block in range(len(self.blocks)):
            yield from self.units(block)

    def row_file_bytes(self, key: int | str) -> int:
        """Bytes of a row in a file with this key (see `Unit.activations`)."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors(key).values())

    def tensors(self, key: int | str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of a row, and dtype, of the tensors in a file with this key."""
        shapes = self.shapes(key)
        if key == LOGITS:
            return {name: (shape, LOGITS_DTYPES[name]) for name, shape in shapes.items()}
        if key == HIDDEN or not self.quantized:
            return {name: (shape, self.dtype) for name, shape in shapes.items()}
        return {
            name: (shape, torch.float32 if name.endswith(SUFFIX) else quantized.DTYPE) for name, shape in shapes.items()
        }

    def shapes(self, key: int | str) -> dict[str, tuple[int, ...]]:
        """The tensors of one row in a file with this key."""
        if key == HIDDEN:
            return {"hidden": (self.seq_len, self.hidden_size)}
        if key == LOGITS:
            return dict.fromkeys(LOGITS_DTYPES, (self.seq_len, self.logits))
        heads = self.layers[int(key)].shapes
        shapes: dict[str, tuple[int, ...]] = {name: (n, self.seq_len, size) for name, (n, size) in heads.items()}
        return shapes | ({f"{name}{SUFFIX}": (n,) for name, (n, _) in heads.items()} if self.quantized else {})

    def statistics_shapes(self, block: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one row in a file of a block's statistics."""
        layers = [layer for layer in self.blocks[block] if layer in self.attentions]
        return {f"{name}.{i:03d}": (self.layers[i].num_heads,) for name in ("entropy", "esl") for i in layers}


def is_measured(config: dict[str, Any], number: int) -> bool:
    """Whether a capture of this configuration measures the attention of the row of this number in the data."""
    which = config.get("statistics", "all")
    return which == "all" or (which == "sample" and number % SAMPLE == 0)


def shard_name(layer: int, split: str, number: int) -> str:
    return f"layers/{layer:03d}/{split}-{number:05d}.safetensors"


def hidden_name(block: int, split: str, number: int) -> str:
    return f"hidden/{block:03d}/{split}-{number:05d}.safetensors"


def logits_name(split: str, number: int) -> str:
    return f"logits/{split}-{number:05d}.safetensors"


def candidates_name(number: int) -> str:
    return f"candidates/{number:05d}.safetensors"


def tokens_name(split: str) -> str:
    return f"tokens/{split}.safetensors"


def summarize(folder: Path, layout: Layout, rows: dict[str, Rows]) -> dict[str, dict[str, Any]]:
    """For every layer, the mean `entropy` of a query in nats, the same by head, and the mean `esl` of a row.

    They are computed from the statistics of the measured rows in a capture's `folder`. Empty if no row was measured.
    """
    units = [unit for unit in layout.all_units() if unit.statistics]
    tokens = sum(rows[u.split].select(torch.tensor(u.measured)).tokens for u in units if u.block == 0)
    found: dict[str, list[Tensor]] = {}
    for unit in units:
        for name, tensor in load_file(folder / str(unit.statistics)).items():
            found.setdefault(name, []).append(tensor)
    summary = {}
    for layer in sorted(name.partition(".")[2] for name in found if name.startswith("esl.")):
        entropy, esl = (torch.cat(found[f"{figure}.{layer}"]).double() for figure in ("entropy", "esl"))
        heads = entropy.sum(0) / tokens
        summary[str(int(layer))] = {
            "entropy": heads.mean().item(),
            "head_entropy": heads.tolist(),
            "esl": esl.mean().item(),
        }
    return summary
