"""The attention of the chunked path, forward and backward: linear time, and memory for inputs and outputs only.

Shapes: R rows = batch x query heads, G query heads per key head, T time, D head, Dv value head, F' features,
L block, M blocks, P blocks in a band (2; 1 where no query sees by softmax beyond its block), r, m: of one tile.

The time is cut in blocks of L tokens, L at least the window. A query sees by softmax keys of its band: its own
block and the one before. Keys of the band that are older than its window enter the linear term one by one; the
blocks before the band enter it by their sums S and z, running sums over blocks.

On CPU one row is handled after the other, in tiles of some blocks: what is neither input nor output stays in the
cache, and backward computes it again instead of keeping it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from .maps import QUERY_BOUND, HybridConfig
from .reference import key_masks

_MIN_BLOCK = 64  # smaller blocks mean more block sums, larger ones more masked work
# exp is several times slower where it underflows, and always on -inf. e^-80 is nothing beside the window's e^0.
_LEAST_EXPONENT = -80.0
_TILE_SCORES = 2**18  # scores held at a time on CPU: 1 MB in fp32
_ROUND = 16  # columns that a product over some of a band's keys takes at least, and multiples: vectors of a CPU


@dataclass(frozen=True)
class Plan:
    """How one call is cut, and what it sums."""

    block: int  # L
    blocks: int  # M
    reach: int  # P
    group: int  # G
    scaling: float
    softcap: float | None
    win: Tensor | None  # [L, P L], added to the scores: 0 where softmax sees the key, else -inf; None: no window
    old: Tensor  # [L, columns]: 1 where a key of the band enters the linear term; all lie in these columns
    sums: bool  # whether the linear term reaches before the band
    tile_rows: int
    tile_blocks: int

    def tiles(self, rows: int) -> "Iterator[list[_Tile]]":
        """For each group of rows its tiles, which cover all blocks in order. The first block has no block before it,
        and where others have, a tile of its own."""
        alone = self.reach - 1
        edges = [*range(alone), *range(alone, self.blocks, self.tile_blocks), self.blocks]
        for row in range(0, rows, self.tile_rows):
            row_slice = slice(row, row + self.tile_rows)
            key_slice = slice(row // self.group, (row + self.tile_rows - 1) // self.group + 1)
            yield [_Tile(self, row_slice, key_slice, first, last) for first, last in pairwise(edges)]


def make_plan(
    q: Tensor,
    group: int,
    config: HybridConfig,
    *,
    scaling: float,
    softcap: float | None = None,
    terms: str,
    has_state: bool,
) -> Plan:
    """The plan for q [R, T, D]. Unless G is 1 or the device is a CPU, rows must share no keys."""
    rows, time, _ = q.shape
    window = config.window
    block = max(window, _MIN_BLOCK)
    if config.layout == "terraced" and window:
        block = -(-block // window) * window  # a block must not end inside a terrace
    block = min(block, time)
    blocks = -(-time // block)
    reach = 2 if window and blocks > 1 else 1
    position = torch.arange(reach * block, device=q.device)
    win, old = key_masks(position[-block:], position, config)
    has_window, has_linear = bool(window) and terms != "linear", terms != "window"
    old_keys = old.any(0).nonzero()
    columns = -(-(int(old_keys[-1]) + 1) // _ROUND) * _ROUND if has_linear and len(old_keys) else 0
    cpu = q.device.type == "cpu"
    assert cpu or group == 1
    return Plan(
        block=block,
        blocks=blocks,
        reach=reach,
        group=group,
        scaling=scaling,
        softcap=softcap,
        win=torch.zeros_like(win, dtype=q.dtype).masked_fill_(~win, -torch.inf) if has_window else None,
        old=old[:, :columns].to(q.dtype),
        sums=has_linear and (has_state or blocks > reach),
        tile_rows=1 if cpu else rows,
        tile_blocks=max(1, _TILE_SCORES // (reach * block * block)) if cpu else blocks,
    )


@dataclass(frozen=True)
class _Tile:
    """Some blocks of some rows, of tensors [., M L, N]."""

    plan: Plan
    rows: slice
    keys: slice  # the rows of k and v
    first: int
    last: int

    @property
    def before(self) -> int:
        """Columns of a band that lie before the row: all bands of a tile begin inside it, or it is the first block."""
        return 0 if self.first else (self.plan.reach - 1) * self.plan.block

    @property
    def old(self) -> Tensor:
        return self.plan.old[:, self.before :]

    def of(self, x: Tensor, shift: int = 0) -> Tensor:
        """The tile's part of x [r, M L, N], as a view [r, m, L, N]; or that part of it `shift` blocks later."""
        block = self.plan.block
        return x[:, (self.first + shift) * block : (self.last + shift) * block].unflatten(1, (-1, block))

    def queries(self, x: Tensor) -> Tensor:
        """x [R, M L, N] -> [r m, L, N]."""
        return self.of(x[self.rows]).flatten(0, 1)

    def band(self, x: Tensor, rows: slice, columns: int | None = None) -> Tensor:
        """x [., M L, N] -> [r m, P L, N], or the first columns of it; on CPU a view, in which bands overlap."""
        block = self.plan.block
        size = self.plan.reach * block - self.before
        x = x[rows, (self.first + 1) * block - size : self.last * block]
        return x.unfold(1, size, block).flatten(0, 1).transpose(-1, -2)[:, :columns]

    def add(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total [R, M L, N] += a @ b, [r m, L, .] and [r m, ., N], in the tile's place."""
        _add_product(self.of(total[self.rows]), a.unflatten(0, (-1, self.last - self.first)), b)

    def add_to_band(self, total: Tensor, rows: slice, bands: Tensor) -> None:
        """The adjoint of `band`: adds bands [r m, columns, N] to total [., M L, N]."""
        block = self.plan.block
        bands = bands.unflatten(0, (-1, self.last - self.first))
        shift = 1 - (self.plan.reach - self.before // block)
        for part, piece in enumerate(bands.split(block, 2)):
            self.of(total[rows], shift + part)[:, :, : piece.shape[2]].add_(piece)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """[r m, L, P L]: scaling q . k, capped, and -inf for what softmax does not see."""
        plan = self.plan
        assert plan.win is not None
        scores = self.queries(q) @ self.band(k, self.keys).transpose(-1, -2)
        if plan.softcap is None:
            scores *= plan.scaling
        else:
            scores.mul_(plan.scaling / plan.softcap).tanh_().mul_(plan.softcap)
        scores += plan.win[:, self.before :]
        return scores

    def window(self, scores: Tensor, top: Tensor, gamma: Tensor) -> Tensor:
        """gamma exp(scores - top), in the place of scores; top [R, M L, 1]."""
        assert self.plan.win is not None
        scores.sub_(self.queries(top)).clamp_(min=_LEAST_EXPONENT).exp_()
        weights = scores.unflatten(0, (-1, self.last - self.first))
        weights *= torch.where(self.plan.win[:, self.before :] == 0, gamma[self.rows, None, None, None], 0)
        return scores

    def add_linear(self, window: Tensor | None, fq: Tensor, fk: Tensor) -> Tensor:
        """window, in its place, plus phi_q . phi_k for the band's keys that are older than the window."""
        columns = self.old.shape[1]
        if columns == 0 and window is not None:
            return window
        linear = self.queries(fq) @ self.band(fk, self.rows, columns).transpose(-1, -2)
        linear *= self.old
        if window is None:
            return linear
        window[..., :columns] += linear
        return window


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total [r, m, I, N] += a [r, m, I, J] @ b [r m, J, N]; of one row without room for the product."""
    if total.shape[0] == 1:
        total[0].baddbmm_(a[0], b)
    else:
        total += a @ b.view(*total.shape[:2], *b.shape[1:])


def _pad(x: Tensor, plan: Plan) -> Tensor:
    """[., T, N] -> [., M L, N], zeros after."""
    missing = plan.blocks * plan.block - x.shape[1]
    return pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def _blocks(x: Tensor, plan: Plan) -> Tensor:
    """[r, M L, N] -> [r, M, L, N]."""
    return x.unflatten(1, (-1, plan.block))


def _summed(x: Tensor, plan: Plan) -> Tensor:
    """[r, M L, N] -> [r, M - P, L, N]: the blocks of keys that are before some band, as a view."""
    return _blocks(x, plan)[:, : plan.blocks - plan.reach]


def _prefix_sums(fk: Tensor, v: Tensor, start: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor]:
    """S [r, M, F', Dv] and z [r, M, F'], per block, over all keys before its band, the state's included."""
    rows, _, features = fk.shape
    sums, norms = fk.new_empty(rows, plan.blocks, features, v.shape[2]), fk.new_zeros(rows, plan.blocks, features)
    sums[:, : plan.reach] = 0 if start is None else start[:, None, :, :-1]
    if plan.blocks > plan.reach:
        keys, values = _summed(fk, plan), _summed(v, plan)
        # A loop: on CPU, cumsum over a dimension that is not the last takes several times as long.
        after = sums.unbind(1)
        for block, product in enumerate((keys.transpose(-1, -2) @ values).unbind(1), plan.reach):
            torch.add(after[block - 1], product, out=after[block])
        norms[:, plan.reach :] = keys.sum(2).cumsum(1)
    if start is not None:
        norms += start[:, None, :, -1]
    return sums, norms


class BlockAttention(torch.autograd.Function):
    """Eq. 7 for contiguous rows without padding. All tensors of one dtype, fp32 or fp64.

    q [R, T, D], k [R / G, T, D], v [R / G, T, Dv], phi_q and phi_k [R, T, F'] (None when `terms` is "window"),
    gamma [R], factor [R] or None (1), logits [R, T] ("exp") or None, start [R, F', Dv + 1] (S and z of the state) or
    None -> out [R, T, Dv].
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        phi_q: Tensor | None,
        phi_k: Tensor | None,
        gamma: Tensor,
        factor: Tensor | None,
        logits: Tensor | None,
        start: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        ctx.plan, ctx.time = plan, q.shape[1]
        q, k, v = (_pad(x, plan) for x in (q, k, v))
        # Without a linear term there are no features.
        fq, fk = (q[..., :0] if x is None else _pad(x, plan) for x in (phi_q, phi_k))
        if factor is not None:
            fq = fq * factor[:, None, None]
        plain, share = fq, None  # share of the linear term beside the window's largest: what logits become
        if logits is not None:
            share = _pad(logits[..., None], plan).clone()
            fq = torch.empty_like(plain)
        rows, total, size = q.shape[0], q.shape[1], v.shape[2]
        out = q.new_empty(rows, total, size)
        inverse = q.new_empty(rows, total, 1)  # of the denominator; 0 where nothing was summed
        top = q.new_empty(rows, total, 1)  # c_n
        for tiles in plan.tiles(rows):
            here, keys = tiles[0].rows, tiles[0].keys
            if plan.sums:
                sums, norms = _prefix_sums(fk[here], v[keys], _some(start, here), plan)
            for tile in tiles:
                weights = None
                if plan.win is not None:
                    scores = tile.scores(q, k)
                    part = tile.of(top[here])
                    part.copy_(scores.amax(-1).view(part.shape))
                    weights = tile.window(scores, top, gamma)
                if share is not None:
                    part = tile.of(share[here])
                    part.sub_(tile.of(top[here])).clamp_(max=QUERY_BOUND).exp_()
                    torch.mul(tile.of(plain[here]), part, out=tile.of(fq[here]))
                weights = tile.add_linear(weights, fq, fk)
                y = weights @ tile.band(v, keys, weights.shape[-1])
                denominator = weights.sum(-1, keepdim=True)
                if plan.sums:
                    features = tile.queries(fq)
                    y.baddbmm_(features, sums[:, tile.first : tile.last].flatten(0, 1))
                    denominator += (features * norms[:, tile.first : tile.last].flatten(0, 1)[:, None]).sum(
                        -1, keepdim=True
                    )
                part = tile.of(inverse[here])
                part.copy_(torch.where(denominator > 0, denominator.reciprocal(), 0).view(part.shape))
                torch.mul(y.view(*part.shape[:-1], size), part, out=tile.of(out[here]))
        ctx.save_for_backward(q, k, v, fq, fk, gamma, factor, share, start, out, inverse, top)
        return out[:, : ctx.time].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):  # sums stay in fp32
            return BlockAttention._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, fq, fk, gamma, factor, share, start, out, inverse, top = ctx.saved_tensors
        plan: Plan = ctx.plan
        rows = q.shape[0]
        need_q, need_k, need_v, need_fq, need_fk, need_gamma, need_factor, need_logits, need_start, _ = (
            ctx.needs_input_grad
        )
        need_scores = plan.win is not None and (need_q or need_k)
        need_gamma = need_gamma and plan.win is not None and fq.shape[2] > 0  # else it cancels
        grad = _pad(grad, plan)

        def zeros(needed: bool, x: Tensor | None) -> Tensor | None:
            return torch.zeros_like(x) if needed and x is not None else None

        dq, dk, dv, dstart = zeros(need_q, q), zeros(need_k, k), zeros(need_v, v), zeros(need_start, start)
        dfq = torch.empty_like(fq) if need_fq or need_factor or need_logits or need_gamma else None
        dfk = torch.empty_like(fk) if need_fk else None
        linear = torch.zeros_like(gamma)  # the linear weights times their gradients, summed
        for tiles in plan.tiles(rows):
            here, keys = tiles[0].rows, tiles[0].keys
            # y = n / d: dn = dy / d, and dd = -(dy . y) / d.
            dn = grad[here] * inverse[here]
            dd = (dn * out[here]).sum(-1, keepdim=True).neg_()
            if dfq is not None and not plan.sums:
                dfq[here] = 0
            if dfk is not None:
                dfk[here] = 0
            if plan.sums:
                queries, dn_blocks, dd_blocks = (_blocks(x, plan) for x in (fq[here], dn, dd))
                if dfq is not None:
                    sums, norms = _prefix_sums(fk[here], v[keys], _some(start, here), plan)
                    part = _blocks(dfq[here], plan)
                    torch.mul(dd_blocks, norms[:, :, None], out=part)
                    _add_product(part, dn_blocks, sums.flatten(0, 1).transpose(-1, -2))
                # Of each block's sums, then of all that it enters: as in `_prefix_sums`, from the end.
                dsums = queries.transpose(-1, -2) @ dn_blocks
                dnorms = (dd_blocks.transpose(-1, -2) @ queries)[:, :, 0].flip(1).cumsum(1).flip(1)
                before = dsums.unbind(1)
                for block in range(plan.blocks - 2, -1, -1):
                    before[block].add_(before[block + 1])
                if dstart is not None:
                    dstart[here] = torch.cat([dsums[:, 0], dnorms[:, 0, :, None]], -1)
                if plan.blocks > plan.reach:
                    later = dsums[:, plan.reach :].flatten(0, 1)
                    if dfk is not None:
                        part = _summed(dfk[here], plan)
                        part.copy_(dnorms[:, plan.reach :, None].expand_as(part))
                        _add_product(part, _summed(v[keys], plan), later.transpose(-1, -2))
                    if dv is not None:
                        _add_product(_summed(dv[keys], plan), _summed(fk[here], plan), later)
            for tile in tiles:
                columns = tile.old.shape[1]
                if not (need_scores or dv is not None or columns):
                    continue
                dn_tile, dd_tile = tile.of(dn).flatten(0, 1), tile.of(dd).flatten(0, 1)
                # of every key's weight; for the maps alone, of the old keys'
                dweights = dn_tile @ tile.band(v, keys, None if need_scores else columns).transpose(-1, -2)
                dweights += dd_tile
                window = None
                if plan.win is not None and (need_scores or dv is not None):
                    scores = tile.scores(q, k)
                    # tanh's slope; 0 for what is not seen, -inf
                    slope = 1 - (scores / plan.softcap).clamp_(min=-1).square_() if plan.softcap else None
                    if need_scores and share is None:
                        is_top = (scores >= tile.queries(top)).to(scores.dtype)
                    window = tile.window(scores, top, gamma)
                    if need_scores:
                        dscores = window * dweights
                        if share is None:
                            # c_n shifts the window's scores only, so its gradient does not vanish (ties share it).
                            dtop = dscores.sum(-1, keepdim=True) / is_top.sum(-1, keepdim=True).clamp_(min=1)
                            dscores -= dtop * is_top
                        dscores *= plan.scaling
                        if slope is not None:
                            dscores *= slope
                        if dq is not None:
                            tile.add(dq, dscores, tile.band(k, keys))
                        if dk is not None:
                            tile.add_to_band(dk, keys, dscores.transpose(-1, -2) @ tile.queries(q))
                if dv is not None:
                    weights = tile.add_linear(window, fq, fk)
                    tile.add_to_band(dv, keys, weights.transpose(-1, -2) @ dn_tile)
                if columns:
                    dlinear = dweights[..., :columns]
                    dlinear *= tile.old
                    if dfq is not None:
                        tile.add(dfq, dlinear, tile.band(fk, here, columns))
                    if dfk is not None:
                        tile.add_to_band(dfk, here, dlinear.transpose(-1, -2) @ tile.queries(fq))
            if dfq is not None and (need_gamma or need_factor):
                linear[here] = torch.linalg.vecdot(dfq[here], fq[here]).sum(-1)
        # All weights of a query times their gradients sum to 0: what the window's give is what the linear ones lack.
        dgamma = -linear / gamma if need_gamma else torch.zeros_like(gamma)
        dfactor, dlogits = None if factor is None else linear / factor, None
        if dfq is not None and factor is not None:  # fq is phi_q times factor
            dfq.mul_(factor[:, None, None])
        if dfq is not None and share is not None:  # fq is phi_q times share
            if need_logits:
                dlogits = (dfq * fq).sum(-1).masked_fill_(share[..., 0] >= math.exp(QUERY_BOUND), 0)
            dfq.mul_(share)

        def cut(x: Tensor | None, needed: bool = True) -> Tensor | None:
            return None if x is None or not needed else x[:, : ctx.time]

        return (
            cut(dq),
            cut(dk),
            cut(dv),
            cut(dfq, need_fq),
            cut(dfk),
            dgamma,
            dfactor,
            cut(dlogits),
            dstart,
            None,
        )


def _some(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]
