"""Where a layer's q, k and v come from while its feature maps are trained.

`StoredActivations` reads what `capture` kept. Other sources (hidden states every few layers, or the teacher running
along) need only give the same batches.

Shapes: N rows, B batch, H query heads, K key heads, T time, D head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lolcats_formats import Artifact
from torch import Tensor

from lolcats_cli.errors import BadInput
from lolcats_cli.stages.capture import SPLITS
from lolcats_cli.teacher.data import Rows
from lolcats_cli.teacher.record import LayerInfo


@dataclass(frozen=True)
class Batch:
    """q [B, H, T, D]; k, v [B, K, T, D]; valid [B, T] bool or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if x is None else x.to(device) for x in (self.q, self.k, self.v, self.valid)))  # type: ignore[arg-type]


class StoredActivations:
    """The activations in a capture artifact."""

    def __init__(self, capture: Artifact) -> None:
        self.capture = capture
        self.layers = [LayerInfo.from_dict(layer) for layer in capture.teacher["layers"]]
        self._tokens = {split: Rows.from_tensors(capture.load(f"tokens/{split}.safetensors")) for split in SPLITS}
        self.rows = {split: len(rows) for split, rows in self._tokens.items()}

    def batches(
        self, layer: int, split: str, size: int, shuffle: torch.Generator | None = None, skip: int = 0
    ) -> Iterator[Batch]:
        """All rows of a split once, in batches of `size`; with `shuffle`, shards and the rows in them are shuffled.
        The first `skip` batches are left out, and shards that hold no others are not read."""
        prefix = f"layers/{layer:03d}/{split}-"
        shards = sorted(name for name in self.capture.files if name.startswith(prefix))
        starts, counts, start = {}, {}, 0
        for name in shards:
            starts[name], counts[name] = start, self._count(layer, split, name)
            start += counts[name]
        if start != self.rows[split]:
            raise BadInput(f"{self.capture.path} has {start} rows in layer {layer} for {self.rows[split]} of tokens.")
        order = range(len(shards)) if shuffle is None else torch.randperm(len(shards), generator=shuffle).tolist()
        valid = self._tokens[split].valid
        rest: list[tuple[Tensor, ...]] = []
        left_out = skip * size  # rows
        for name in (shards[i] for i in order):
            count = counts[name]
            index = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
            index, left_out = index[left_out:], max(0, left_out - count)
            if len(index) == 0:
                continue
            tensors = self.capture.load(name)
            where = starts[name] + index
            for part, rows in zip(index.split(1), where.split(1), strict=True):
                mask = () if valid is None else (valid[rows],)
                rest.append((tensors["q"][part], tensors["k"][part], tensors["v"][part], *mask))
                if len(rest) == size:
                    yield _collate(rest)
                    rest = []
        if rest:
            yield _collate(rest)

    def _count(self, layer: int, split: str, name: str) -> int:
        """The rows of a shard, whose header says what it should."""
        header, info = self.capture.header(name), self.layers[layer]
        found = {tensor: tuple(header[tensor].shape) for tensor in header}
        count, length = next(iter(found.values()), (0,))[0], self._tokens[split].input_ids.shape[1]
        kv = (count, info.num_key_value_heads, length, info.head_dim)
        if found != {"q": (count, info.num_heads, length, info.head_dim), "k": kv, "v": kv}:
            raise BadInput(f"{self.capture.path / name} holds {found}, which is not q, k and v of layer {layer}.")
        return count


def _collate(rows: list[tuple[Tensor, ...]]) -> Batch:
    q, k, v, *mask = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
    return Batch(q, k, v, mask[0] if mask else None)
