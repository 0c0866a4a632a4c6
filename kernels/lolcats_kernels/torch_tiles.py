"""How the chunked path cuts its rows: the plan of a call, slices of rows, and tiles of some chunks.

Letters: see ../README.md; r rows of a slice, c chunks of a tile, P chunks in a band.

The time is cut in chunks of L tokens, L at least the window. A query sees by softmax keys of its band: its own chunk
and the one before (P is 2; 1 where no query sees by softmax beyond its chunk).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .equation import KeyMasks, key_masks
from .spec import CallSpec, HybridConfig

_MIN_CHUNK = 64  # smaller chunks mean more sums, larger ones more masked work
# exp is several times slower where it underflows, and always on -inf. e^-80 is nothing beside the window's e^0.
_LEAST_EXPONENT = -80.0
_TILE_SCORES = 2**18  # scores held at a time on CPU: 1 MB in fp32


def chunk_size(config: HybridConfig) -> int:
    """Tokens of a chunk of a long row: at least the window, and a chunk does not end inside a terrace."""
    size = max(config.window, _MIN_CHUNK)
    return -(-size // config.window) * config.window if config.layout == "terraced" and config.window else size


@dataclass(frozen=True)
class Plan:
    """One call: what it sums, and how it is cut. Unless the device is a CPU, G must be 1."""

    spec: CallSpec
    has_initial_state: bool
    num_heads: int  # H
    num_key_value_heads: int  # K
    time: int
    device: torch.device
    dtype: torch.dtype
    keep: bool  # whether there will be a backward

    @cached_property
    def chunk(self) -> int:
        """L."""
        return min(chunk_size(self.spec.config), self.time)

    @cached_property
    def chunks(self) -> int:
        """M."""
        return -(-self.time // self.chunk)

    @cached_property
    def reach(self) -> int:
        """P."""
        return 2 if self.spec.config.window and self.chunks > 1 else 1

    @property
    def front(self) -> int:
        """Zeros in front of the keys, so that the first chunk has a band too."""
        return (self.reach - 1) * self.chunk

    @property
    def has_sums(self) -> bool:
        """Whether any query has keys before its band."""
        return self.spec.has_linear and (self.has_initial_state or self.chunks > self.reach)

    @property
    def tile_rows(self) -> int:
        """Rows of a slice: on CPU one, else the heads of a sequence."""
        return 1 if self.device.type == "cpu" else self.num_heads

    @property
    def tile_chunks(self) -> int:
        fit = max(1, _TILE_SCORES // (self.reach * self.chunk**2))
        return fit if self.device.type == "cpu" else self.chunks

    @cached_property
    def _masks(self) -> KeyMasks:
        position = torch.arange(self.reach * self.chunk, device=self.device)
        return key_masks(position[-self.chunk :], position, self.spec.config)

    @cached_property
    def in_window(self) -> Tensor:
        """[L, P L], added to the scores: 0 where softmax sees the key, else -inf."""
        window = self._masks.window
        return torch.zeros_like(window, dtype=self.dtype).masked_fill_(~window, -torch.inf)

    @cached_property
    def older(self) -> Tensor:
        """[L, first keys of the band]: 1 where a key of the band enters the linear term; no later one does."""
        older = self._masks.older
        keys = older.any(0).nonzero()
        count = int(keys[-1]) + 1 if self.spec.has_linear and len(keys) else 0
        return older[:, :count].to(self.dtype)

    def row_slices(self, rows: int) -> Iterator[RowSlice]:
        """They cover all rows in order."""
        per_key_head = self.num_heads // self.num_key_value_heads
        for row in range(0, rows, self.tile_rows):
            last = row + self.tile_rows - 1
            yield RowSlice(
                slice(row, last + 1),
                slice(row // per_key_head, last // per_key_head + 1),
                slice(row % self.num_heads, last % self.num_heads + 1),
            )

    def tiles(self) -> list[Tile]:
        """They cover all chunks in order."""
        edges = [*range(0, self.chunks, self.tile_chunks), self.chunks]
        return [Tile(self, first, last) for first, last in pairwise(edges)]


class RowSlice(NamedTuple):
    """The rows that are handled at once."""

    rows: slice  # of q, and of all that belongs to a query head of a sequence
    keys: slice  # of k and v
    heads: slice  # of the maps' parameters


@dataclass(frozen=True)
class Tile:
    """Some chunks of a slice's rows: of tensors [r, M L, N]."""

    plan: Plan
    first: int
    last: int

    @property
    def chunks(self) -> slice:
        return slice(self.first, self.last)

    @property
    def tokens(self) -> slice:
        return slice(self.first * self.plan.chunk, self.last * self.plan.chunk)

    @property
    def seen(self) -> slice:
        """The bands, among the keys with the zeros in front."""
        return slice(self.tokens.start, self.tokens.stop + self.plan.front)

    @property
    def own(self) -> slice:
        """The tile's tokens among those keys."""
        return slice(self.seen.start + self.plan.front, self.seen.stop)

    def of(self, x: Tensor) -> Tensor:
        """The tile's part of x [r, M L, N], as a view [r, c, L, N]."""
        part: Tensor = x[:, self.tokens].unflatten(1, (-1, self.plan.chunk))
        return part

    def queries(self, x: Tensor) -> Tensor:
        """x [r, M L, N] -> [r c, L, N]."""
        return self.of(x).flatten(0, 1)

    def by_row(self, x: Tensor) -> Tensor:
        """x [r] beside the tile's part of something: [r, 1, 1, 1]."""
        return x[:, None, None, None]

    def sink_weights(self, sinks: Tensor, m: Tensor, gamma: Tensor) -> Tensor:
        """gamma exp(sinks - m): [r c, L, 1]; m [r, M L, 1], sinks and gamma [r]."""
        return (self.by_row(gamma) * (self.by_row(sinks) - self.of(m)).exp_()).flatten(0, 1)

    def band(self, x: Tensor, first: int | None = None) -> Tensor:
        """Keys [r, (P - 1 + M) L, N] -> [r c, P L, N], or the `first` keys of it; a view, in which bands overlap."""
        size = self.plan.reach * self.plan.chunk
        return x[:, self.seen].unfold(1, size, self.plan.chunk).flatten(0, 1).transpose(-1, -2)[:, :first]

    def add_to_band(self, total: Tensor, bands: Tensor) -> None:
        """The adjoint of `band`: adds bands [r c, first keys, N] to total, the `seen` part of keys."""
        chunks = self.last - self.first
        bands, total = bands.unflatten(0, (-1, chunks)), total.unflatten(1, (-1, self.plan.chunk))
        for part, piece in enumerate(bands.split(self.plan.chunk, 2)):
            total[:, part : part + chunks, : piece.shape[2]].add_(piece)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[r c, L, P L]: scaling q . k, capped, and -inf for what softmax does not see."""
        plan, spec = self.plan, self.plan.spec
        scores = self.queries(q) @ self.band(k).transpose(-1, -2)
        if spec.softcap is None:
            scores *= spec.scaling
        else:
            scores.mul_(spec.scaling / spec.softcap).tanh_().mul_(spec.softcap)
        scores += plan.in_window
        if self.first == 0 and plan.reach > 1:  # nothing lies before the first chunk
            scores.unflatten(0, (-1, self.last))[:, 0, :, : plan.chunk] = -torch.inf
        return scores

    def window(self, scores: Tensor, m: Tensor, gamma: Tensor) -> Tensor:
        """gamma exp(scores - m), in the place of scores; m [r, M L, 1], gamma [r]."""
        scores.sub_(self.queries(m)).clamp_(min=_LEAST_EXPONENT).exp_()
        weights = scores.unflatten(0, (-1, self.last - self.first))
        weights *= torch.where(self.plan.in_window == 0, self.by_row(gamma), 0)
        return scores

    def add_older(self, window: Tensor | None, weighted_q: Tensor, phi_k: Tensor) -> Tensor:
        """window, in its place, plus weighted_q [r c, L, F'] . phi_k for the band's keys older than the window."""
        older = self.plan.older
        if older.shape[1] == 0 and window is not None:
            return window
        linear = weighted_q @ self.band(phi_k, older.shape[1]).transpose(-1, -2)
        linear *= older
        if window is None:
            return linear
        window[..., : older.shape[1]] += linear
        return window


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [r, c, I, N] += a [r, c, I, J] @ b [r c, J, N]; of one row without room for the product."""
    if total.shape[0] == 1:
        total[0].baddbmm_(a[0], b)
    else:
        total += a @ b.view(*total.shape[:2], *b.shape[1:])


def pad_chunks(x: Tensor, plan: Plan, front: int = 0) -> Tensor:
    """[., T, N] -> [., front + M L, N], zeros before and after."""
    missing = plan.chunks * plan.chunk - x.shape[1]
    return pad(x, (0, 0, front, missing)) if front or missing else x.contiguous()
