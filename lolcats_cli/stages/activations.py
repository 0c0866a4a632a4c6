"""The sources of the layers' q, k and v while their feature maps are trained.

Every source gives the same batches. One reads q, k and v (`StoredActivations`), and one lets the teacher compute them
from hidden states or tokens (`ComputedActivations`). Layers that are computed together are trained side by side. Heads
that keep softmax attention are left out by `MappedHeads`.

Shapes: N rows, B batch, H query heads, K key heads, T time, D head, E hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from lolcats_formats import Artifact
from lolcats_kernels.equation import other_heads, take_heads
from lolcats_kernels.softmax import AttentionSpec
from torch import Tensor

from lolcats_cli.artifacts.float8 import NAME, SUFFIX, dequantize
from lolcats_cli.artifacts.layout import SPLITS, Layout, hidden_name, tokens_name
from lolcats_cli.errors import BadInput
from lolcats_cli.teacher.blocks import Run, block
from lolcats_cli.teacher.data import Rows
from lolcats_cli.teacher.record import LayerInfo, recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Batch:
    """q [B, H, T, D]; k, v [B, K, T, D]; valid [B, T] bool or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    valid: Tensor | None

    def to(self, device: torch.device) -> Batch:
        return Batch(*(None if x is None else x.to(device) for x in (self.q, self.k, self.v, self.valid)))  # type: ignore[arg-type]


Activations = dict[int, tuple[Tensor, Tensor, Tensor]]  # q, k and v of some rows, by layer


class Source(ABC):
    """The activations of a capture.

    Attributes:
        layers: the teacher's layers.
        together: the layers that are computed together, and so trained side by side.
        rows: the number of rows of each split.
    """

    def __init__(self, capture: Artifact) -> None:
        self.capture = capture
        self.layers = [LayerInfo.from_dict(layer) for layer in capture.teacher["layers"]]
        self.together = [range(layer, layer + 1) for layer in range(len(self.layers))]
        self.tokens = {split: Rows.from_tensors(capture.load(tokens_name(split))) for split in SPLITS}
        self.rows = {split: len(rows) for split, rows in self.tokens.items()}

    def teacher(self) -> PreTrainedModel | None:
        """The model that computes them, which the first call loads; None where they are stored."""
        return None

    @contextmanager
    def running(self, layers: list[int]) -> Iterator[None]:
        """While open, these layers, which are computed together, can be read."""
        yield

    @abstractmethod
    def groups(self, layers: list[int], split: str) -> list[range]:
        """The rows of the split, in the groups in which they are shuffled and read."""

    @abstractmethod
    def read(self, layers: list[int], split: str, number: int) -> Activations:
        """A group's q [N, H, T, D], k and v [N, K, T, D] of the layers, which are computed together."""

    def batches(
        self, layers: list[int], split: str, size: int, shuffle: torch.Generator | None = None, skip: int = 0
    ) -> Iterator[dict[int, Batch]]:
        """All rows of a split once, in batches of `size`, for some layers of `together`; with `shuffle`, groups and the
        rows in them are shuffled. The first `skip` batches are left out, and groups that hold no others are not read.
        """
        groups, valid = self.groups(layers, split), self.tokens[split].valid
        order = range(len(groups)) if shuffle is None else torch.randperm(len(groups), generator=shuffle).tolist()
        rest: list[dict[int, tuple[Tensor, ...]]] = []
        left_out = skip * size  # rows
        for number in order:
            count = len(groups[number])
            index = torch.arange(count) if shuffle is None else torch.randperm(count, generator=shuffle)
            index, left_out = index[left_out:], max(0, left_out - count)
            if len(index) == 0:
                continue
            found = self.read(layers, split, number)
            for part in index.split(1):
                mask = () if valid is None else (valid[groups[number].start + part],)
                rest.append({layer: (*(x[part] for x in tensors), *mask) for layer, tensors in found.items()})
                if len(rest) == size:
                    yield _collate(rest)
                    rest = []
        if rest:
            yield _collate(rest)


def _collate(rows: list[dict[int, tuple[Tensor, ...]]]) -> dict[int, Batch]:
    batches = {}
    for layer in rows[0]:
        q, k, v, *mask = (torch.cat(tensors) for tensors in zip(*(row[layer] for row in rows), strict=True))
        batches[layer] = Batch(q, k, v, mask[0].to(q.device) if mask else None)
    return batches


class StoredActivations(Source):
    """Reads what a capture with the store "attention" kept."""

    def __init__(self, capture: Artifact) -> None:
        super().__init__(capture)
        self._quantized = capture.config.get("stored") == NAME

    def groups(self, layers: list[int], split: str) -> list[range]:
        groups, start = [], 0
        for name in self._shards(layers[0], split):
            count = self._count(layers[0], split, name)
            groups.append(range(start, start + count))
            start += count
        if start != self.rows[split]:
            raise BadInput(
                f"{self.capture.path} has {start} rows in layer {layers[0]}, and {self.rows[split]} rows of tokens. "
                "Capture it again."
            )
        return groups

    def read(self, layers: list[int], split: str, number: int) -> Activations:
        tensors = {layer: self.capture.load(self._shards(layer, split)[number]) for layer in layers}
        return {
            layer: (self._tensor(x, "q"), self._tensor(x, "k"), self._tensor(x, "v")) for layer, x in tensors.items()
        }

    def _tensor(self, shard: dict[str, Tensor], name: str) -> Tensor:
        """q, k or v of a shard, in the dtype of the teacher."""
        if not self._quantized:
            return shard[name]
        return dequantize(shard[name], shard[f"{name}{SUFFIX}"], getattr(torch, self.capture.config["dtype"]))

    def _shards(self, layer: int, split: str) -> list[str]:
        prefix = f"layers/{layer:03d}/{split}-"
        return sorted(name for name in self.capture.files if name.startswith(prefix))

    def _count(self, layer: int, split: str, name: str) -> int:
        """The rows of a shard, whose header says what it should."""
        header, heads = self.capture.header(name), self.layers[layer].shapes
        found = {tensor: tuple(header[tensor].shape) for tensor in header}
        count, length = next(iter(found.values()), (0,))[0], self.tokens[split].input_ids.shape[1]
        expected: dict[str, tuple[int, ...]] = {x: (count, n, length, size) for x, (n, size) in heads.items()}
        if self._quantized:
            expected |= {f"{x}{SUFFIX}": (count, n) for x, (n, _) in heads.items()}
        if found != expected:
            raise BadInput(
                f"{self.capture.path / name} holds {found}, which is not q, k and v of layer {layer}. Capture it again."
            )
        return count


class ComputedActivations(Source):
    """Lets the teacher compute q, k and v, from the hidden states or the tokens that a capture kept.

    Forward passes have the same rows as in the capture, so that every store gives the same numbers.
    """

    def __init__(
        self,
        capture: Artifact,
        load: Callable[[], PreTrainedModel],
        device: torch.device,
        layout: Layout | None = None,
    ) -> None:
        """load: loads the teacher."""
        super().__init__(capture)
        self._layout = layout = layout or Layout.of(capture.manifest)
        self._stored = capture  # the hidden states
        self.together = layout.blocks
        self._model, self._device = cache(load), device
        self._batch_size: int = capture.config["batch_size"]
        self._groups = {split: layout.groups(split) for split in SPLITS}
        self._units = [list(layout.units(number)) for number in range(len(layout.blocks))]
        self._run: Run | None = None
        self._seen: Activations = {}  # what the attentions of the forward pass got

    def teacher(self) -> PreTrainedModel:
        return self._model()

    @contextmanager
    def running(self, layers: list[int]) -> Iterator[None]:
        number = self._block(layers)
        reached = range(self.together[number].start, max(layers) + 1)

        def keep(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
            self._seen[layer] = (q, k, v)

        with block(self.teacher(), reached, self._device) as run, recording(self.teacher(), keep):
            self._run = run
            try:
                yield
            finally:
                self._run, self._seen = None, {}

    def groups(self, layers: list[int], split: str) -> list[range]:
        return self._groups[split]

    def read(self, layers: list[int], split: str, number: int) -> Activations:
        assert self._run is not None, "read while `running`"
        parts: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in layers}
        for rows in torch.tensor(self._groups[split][number]).split(self._batch_size):
            chosen = self.tokens[split].select(rows)
            self._run(chosen.input_ids, chosen.valid, self._hidden(self._block(layers), split, rows))
            for layer in layers:
                parts[layer].append(self._seen[layer])
            self._seen = {}
        return {layer: tuple(map(torch.cat, zip(*found, strict=True))) for layer, found in parts.items()}  # type: ignore[misc]

    def _block(self, layers: list[int]) -> int:
        return next(number for number, chosen in enumerate(self.together) if layers[0] in chosen)

    def _hidden(self, number: int, split: str, rows: Tensor) -> Tensor | None:
        """The stored hidden states [B, T, E] of these neighbouring rows in front of a block; None for the first."""
        if number == 0:
            return None
        unit = next(unit for unit in self._units[number - 1] if unit.split == split and int(rows[0]) in unit.rows)
        return self._stored.load(hidden_name(number, split, unit.number))["hidden"][rows - unit.rows.start]


class MappedHeads(Source):
    """Another source's activations, of the heads alone that get feature maps."""

    def __init__(self, source: Source, kept: Sequence[tuple[int, int]]) -> None:
        """kept: layer and key head of those that keep softmax attention."""
        self._source = source
        self.capture, self.together = source.capture, source.together
        self.tokens, self.rows = source.tokens, source.rows
        self._heads = {
            layer: other_heads([head for i, head in kept if i == layer], source.layers[layer].num_key_value_heads)
            for layer, _ in kept
        }
        self.layers = [
            info.take(self._heads[layer]) if layer in self._heads else info for layer, info in enumerate(source.layers)
        ]

    def teacher(self) -> PreTrainedModel | None:
        return self._source.teacher()

    @contextmanager
    def running(self, layers: list[int]) -> Iterator[None]:
        with self._source.running(layers):
            yield

    def groups(self, layers: list[int], split: str) -> list[range]:
        return self._source.groups(layers, split)

    def read(self, layers: list[int], split: str, number: int) -> Activations:
        return {layer: self._mapped(layer, *found) for layer, found in self._source.read(layers, split, number).items()}

    def _mapped(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if layer not in self._heads:
            return q, k, v
        heads, count = self._heads[layer], k.shape[1]
        return take_heads(q, heads, count), take_heads(k, heads, count), take_heads(v, heads, count)
