"""How attention by blocks cuts its rows: the plan of a call, groups of rows, and tiles of some blocks.

Shapes: R rows = batch x query heads, H query heads, G query heads per key head, T time, L block, M blocks, P blocks in
a band, r rows of a group, m blocks of a tile.

The time is cut in blocks of L tokens, L at least the window. A query sees by softmax keys of its band: its own block
and the one before (P is 2; 1 where no query sees by softmax beyond its block).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .maps import HybridConfig
from .reference import key_masks

_MIN_BLOCK = 64  # smaller blocks mean more block sums, larger ones more masked work
# exp is several times slower where it underflows, and always on -inf. e^-80 is nothing beside the window's e^0.
_LEAST_EXPONENT = -80.0
_TILE_SCORES = 2**18  # scores held at a time on CPU: 1 MB in fp32
_ROUND = 16  # columns that a product over some of a band's keys takes at least, and multiples: vectors of a CPU


@dataclass(frozen=True)
class Plan:
    """One call: what it sums, and how it is cut. Unless the device is a CPU, G must be 1."""

    config: HybridConfig
    has_state: bool
    time: int
    device: torch.device
    dtype: torch.dtype
    heads: int  # H
    group: int  # G
    scaling: float
    softcap: float | None
    terms: str
    keep: bool  # whether there will be a backward

    @cached_property
    def block(self) -> int:
        """L."""
        window = self.config.window
        block = max(window, _MIN_BLOCK)
        if self.config.layout == "terraced" and window:
            block = -(-block // window) * window  # a block must not end inside a terrace
        return min(block, self.time)

    @cached_property
    def blocks(self) -> int:
        """M."""
        return -(-self.time // self.block)

    @cached_property
    def reach(self) -> int:
        """P."""
        return 2 if self.config.window and self.blocks > 1 else 1

    @property
    def windowed(self) -> bool:
        return self.config.window > 0 and self.terms != "linear"

    @property
    def linear(self) -> bool:
        """Whether there is a linear term."""
        return self.terms != "window"

    @property
    def sums(self) -> bool:
        """Whether it reaches before the band."""
        return self.linear and (self.has_state or self.blocks > self.reach)

    @property
    def tile_rows(self) -> int:
        """Rows of a group: on CPU one, else the heads of a sequence."""
        return 1 if self.device.type == "cpu" else self.heads

    @property
    def tile_blocks(self) -> int:
        fit = max(1, _TILE_SCORES // (self.reach * self.block**2))
        return fit if self.device.type == "cpu" else self.blocks

    @cached_property
    def _masks(self) -> tuple[Tensor, Tensor]:
        position = torch.arange(self.reach * self.block, device=self.device)
        return key_masks(position[-self.block :], position, self.config)

    @cached_property
    def win(self) -> Tensor:
        """[L, P L], added to the scores: 0 where softmax sees the key, else -inf."""
        win = self._masks[0]
        return torch.zeros_like(win, dtype=self.dtype).masked_fill_(~win, -torch.inf)

    @cached_property
    def old(self) -> Tensor:
        """[L, columns]: 1 where a key of the band enters the linear term; all lie in these columns."""
        old = self._masks[1]
        keys = old.any(0).nonzero()
        columns = -(-(int(keys[-1]) + 1) // _ROUND) * _ROUND if self.linear and len(keys) else 0
        return old[:, :columns].to(self.dtype)

    def groups(self, rows: int) -> "Iterator[Group]":
        for row in range(0, rows, self.tile_rows):
            last = row + self.tile_rows - 1
            yield Group(
                slice(row, last + 1),
                slice(row // self.group, last // self.group + 1),
                slice(row % self.heads, last % self.heads + 1),
            )

    def tiles(self) -> "list[Tile]":
        """They cover all blocks in order."""
        edges = [*range(0, self.blocks, self.tile_blocks), self.blocks]
        return [Tile(self, first, last) for first, last in pairwise(edges)]


class Group(NamedTuple):
    """The rows that are handled at once."""

    rows: slice  # of q, and of all that belongs to a query head of a sequence
    keys: slice  # of k and v
    heads: slice  # of the maps' parameters


@dataclass(frozen=True)
class Tile:
    """Some blocks of a group's rows: of tensors [r, M L, N]."""

    plan: Plan
    first: int
    last: int

    @property
    def blocks(self) -> slice:
        return slice(self.first, self.last)

    @property
    def tokens(self) -> slice:
        return slice(self.first * self.plan.block, self.last * self.plan.block)

    @property
    def seen(self) -> slice:
        """The bands, among the keys with P - 1 blocks of zeros in front."""
        return slice(self.first * self.plan.block, (self.last + self.plan.reach - 1) * self.plan.block)

    @property
    def own(self) -> slice:
        """The tile's tokens among those keys."""
        return slice(self.seen.start + (self.plan.reach - 1) * self.plan.block, self.seen.stop)

    def of(self, x: Tensor) -> Tensor:
        """The tile's part of x [r, M L, N], as a view [r, m, L, N]."""
        return x[:, self.tokens].unflatten(1, (-1, self.plan.block))

    def queries(self, x: Tensor) -> Tensor:
        """x [r, M L, N] -> [r m, L, N]."""
        return self.of(x).flatten(0, 1)

    def band(self, x: Tensor, columns: int | None = None) -> Tensor:
        """Keys [r, (P - 1 + M) L, N] -> [r m, P L, N], or the first columns of it; a view, in which bands overlap."""
        size = self.plan.reach * self.plan.block
        return x[:, self.seen].unfold(1, size, self.plan.block).flatten(0, 1).transpose(-1, -2)[:, :columns]

    def add_to_band(self, total: Tensor, bands: Tensor) -> None:
        """The adjoint of `band`: adds bands [r m, columns, N] to total, the `seen` part of keys."""
        blocks = self.last - self.first
        bands, total = bands.unflatten(0, (-1, blocks)), total.unflatten(1, (-1, self.plan.block))
        for part, piece in enumerate(bands.split(self.plan.block, 2)):
            total[:, part : part + blocks, : piece.shape[2]].add_(piece)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[r m, L, P L]: scaling q . k, capped, and -inf for what softmax does not see."""
        plan = self.plan
        scores = self.queries(q) @ self.band(k).transpose(-1, -2)
        if plan.softcap is None:
            scores *= plan.scaling
        else:
            scores.mul_(plan.scaling / plan.softcap).tanh_().mul_(plan.softcap)
        scores += plan.win
        if self.first == 0 and plan.reach > 1:  # nothing lies before the first block
            scores.unflatten(0, (-1, self.last))[:, 0, :, : plan.block] = -torch.inf
        return scores

    def window(self, scores: Tensor, top: Tensor, gamma: Tensor) -> Tensor:
        """gamma exp(scores - top), in the place of scores; top [r, M L, 1], gamma [r]."""
        scores.sub_(self.queries(top)).clamp_(min=_LEAST_EXPONENT).exp_()
        weights = scores.unflatten(0, (-1, self.last - self.first))
        weights *= torch.where(self.plan.win == 0, gamma[:, None, None, None], 0)
        return scores

    def add_linear(self, window: Tensor | None, fq: Tensor, fk: Tensor) -> Tensor:
        """window, in its place, plus fq . phi_k for the band's keys that are older than the window; fq [r m, L, F']."""
        columns = self.plan.old.shape[1]
        if columns == 0 and window is not None:
            return window
        linear = fq @ self.band(fk, columns).transpose(-1, -2)
        linear *= self.plan.old
        if window is None:
            return linear
        window[..., :columns] += linear
        return window


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [r, m, I, N] += a [r, m, I, J] @ b [r m, J, N]; of one row without room for the product."""
    if total.shape[0] == 1:
        total[0].baddbmm_(a[0], b)
    else:
        total += a @ b.view(*total.shape[:2], *b.shape[1:])


def pad_blocks(x: Tensor, plan: Plan, front: int = 0) -> Tensor:
    """[., T, N] -> [., (front + M) L, N], zeros before and after."""
    missing = plan.blocks * plan.block - x.shape[1]
    return pad(x, (0, 0, front * plan.block, missing)) if front or missing else x.contiguous()
