"""The attention of the chunked path, forward and backward: linear time, and memory for inputs and outputs only.

Shapes: R rows = batch x query heads, G query heads per key head, T time, D head, Dv value head, F' features,
L block, M blocks, P blocks in a band (2; 1 where no query sees by softmax beyond its block), r, m: of one tile.

The time is cut in blocks of L tokens, L at least the window. A query sees by softmax keys of its band: its own
block and the one before. Keys of the band that are older than its window enter the linear term one by one; the
blocks before the band enter it by their sums S and z, which are one cumulative sum over blocks. Values carry a
column of ones, so that numerator and denominator are one product.

On CPU one row is handled after the other, in tiles of some blocks: what is neither input nor output stays in the
cache, and backward computes it again instead of keeping it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .maps import QUERY_BOUND, HybridConfig
from .reference import key_masks

_MIN_BLOCK = 64  # smaller blocks mean more block sums, larger ones more masked work
# exp is several times slower where it underflows, and always on -inf. e^-80 is nothing beside the window's e^0.
_LEAST_EXPONENT = -80.0
_TILE_SCORES = 2**18  # scores held at a time on CPU: 1 MB in fp32


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

    @property
    def front(self) -> int:
        """Tokens of padding before the keys: the first block has a band too."""
        return (self.reach - 1) * self.block

    def tiles(self, rows: int) -> "Iterator[list[_Tile]]":
        """For each group of rows its tiles, which cover all blocks in order."""
        for row in range(0, rows, self.tile_rows):
            row_slice = slice(row, row + self.tile_rows)
            key_slice = slice(row // self.group, (row + self.tile_rows - 1) // self.group + 1)
            yield [
                _Tile(self, row_slice, key_slice, first, min(first + self.tile_blocks, self.blocks))
                for first in range(0, self.blocks, self.tile_blocks)
            ]


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
    columns = int(old_keys[-1]) + 1 if has_linear and len(old_keys) else 0
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
    """Some blocks of some rows. Tensors are padded: [R, M L, N] for queries, [., front + M L, N] for keys."""

    plan: Plan
    rows: slice
    keys: slice  # the rows of k and v
    first: int
    last: int

    def of(self, x: Tensor, front: int = 0, shift: int = 0) -> Tensor:
        """The tile's part of x [r, front + M L, N], as a view [r, m, L, N]."""
        block = self.plan.block
        start = front + (self.first + shift) * block
        return x[:, start : start + (self.last - self.first) * block].unflatten(1, (-1, block))

    def queries(self, x: Tensor) -> Tensor:
        """x [R, M L, N] -> [r m, L, N]."""
        return self.of(x[self.rows]).flatten(0, 1)

    def band(self, x: Tensor, rows: slice) -> Tensor:
        """x [., front + M L, N] -> [r m, P L, N]; on CPU a view, in which bands overlap."""
        block, reach = self.plan.block, self.plan.reach
        x = x[rows, self.first * block : (self.last + reach - 1) * block]
        return x.unfold(1, reach * block, block).flatten(0, 1).transpose(-1, -2)

    def add_to_band(self, total: Tensor, rows: slice, bands: Tensor) -> None:
        """The adjoint of `band`: adds bands [r m, columns, N] to total [., front + M L, N]."""
        block = self.plan.block
        bands = bands.unflatten(0, (-1, self.last - self.first))
        for part, piece in enumerate(bands.split(block, 2)):
            self.of(total[rows], shift=part)[:, :, : piece.shape[2]].add_(piece)

    def scores(self, qp: Tensor, kp: Tensor) -> Tensor:
        """[r m, L, P L]: scaling q . k, capped, and -inf for what softmax does not see."""
        plan = self.plan
        assert plan.win is not None
        keys = self.band(kp, self.keys).transpose(-1, -2)
        if plan.softcap is None:
            scores = torch.baddbmm(plan.win, self.queries(qp), keys, alpha=plan.scaling)
        else:
            scores = (self.queries(qp) @ keys).mul_(plan.scaling / plan.softcap).tanh_().mul_(plan.softcap)
            scores += plan.win
        if plan.reach == 2 and self.first == 0:  # the padding before the first key
            scores.unflatten(0, (-1, self.last))[:, 0, :, : plan.block] = -torch.inf
        return scores

    def window(self, scores: Tensor, top: Tensor, gamma: Tensor) -> Tensor:
        """gamma exp(scores - top), in the place of scores; top [R, M L, 1]."""
        assert self.plan.win is not None
        scores.sub_(self.queries(top)).clamp_(min=_LEAST_EXPONENT).exp_()
        weights = scores.unflatten(0, (-1, self.last - self.first))
        weights *= torch.where(self.plan.win == 0, gamma[self.rows, None, None, None], 0)
        if self.plan.reach == 2 and self.first == 0:
            weights[:, 0, :, : self.plan.block] = 0
        return scores

    def add_linear(self, window: Tensor | None, fq: Tensor, fk: Tensor) -> Tensor:
        """window, in its place, plus phi_q . phi_k for the band's keys that are older than the window."""
        columns = self.plan.old.shape[1]
        if columns == 0 and window is not None:
            return window
        linear = self.queries(fq) @ self.band(fk, self.rows)[:, :columns].transpose(-1, -2)
        linear *= self.plan.old
        if window is None:
            return linear
        window[..., :columns] += linear
        return window


def _pad(x: Tensor, plan: Plan, front: int = 0, ones: bool = False) -> Tensor:
    """[., T, N] -> [., front + M L, N]: zeros before and after; `ones` adds a column of ones, 0 in the front."""
    rows, time, size = x.shape
    total = front + plan.blocks * plan.block
    if total == time and not ones:
        return x.contiguous()
    out = x.new_empty(rows, total, size + ones)
    out[:, :front] = 0
    out[:, front : front + time, :size] = x
    out[:, front + time :] = 0
    if ones:
        out[:, front:, size] = 1
    return out


def _prefix_sums(fk: Tensor, vp: Tensor, start: Tensor | None, plan: Plan) -> Tensor:
    """[r, M, F', Dv + 1]: per block, S and z over all keys before its band, the state's included."""
    sums = fk.new_zeros(fk.shape[0], plan.blocks, fk.shape[2], vp.shape[2])
    if plan.blocks > plan.reach:
        keys, values = _summed(fk, plan), _summed(vp, plan)
        torch.cumsum(keys.transpose(-1, -2) @ values, 1, out=sums[:, plan.reach :])
    if start is not None:
        sums += start[:, None]
    return sums


def _summed(x: Tensor, plan: Plan) -> Tensor:
    """[., front + M L, N] -> [., M - P, L, N]: the blocks of keys that are before some band, as a view."""
    count = (plan.blocks - plan.reach) * plan.block
    return x[:, plan.front : plan.front + count].unflatten(1, (-1, plan.block))


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
        qp, kp, vp, fq, fk = _padded(q, k, v, phi_q, phi_k, factor, plan)
        share = None  # of the linear term beside the window's largest: what logits become
        if logits is not None:
            share = _pad(logits[..., None], plan).clone()
            fq = fq.clone()
        rows, total, size = qp.shape[0], qp.shape[1], v.shape[2]
        out = qp.new_empty(rows, total, size)
        inverse = qp.new_empty(rows, total, 1)  # of the denominator; 0 where nothing was summed
        top = qp.new_empty(rows, total, 1)  # c_n
        for tiles in plan.tiles(rows):
            here, keys = tiles[0].rows, tiles[0].keys
            sums = _prefix_sums(fk[here], vp[keys], _some(start, here), plan) if plan.sums else None
            for tile in tiles:
                weights = None
                if plan.win is not None:
                    scores = tile.scores(qp, kp)
                    tile.of(top[here]).copy_(scores.amax(-1).view(tile.of(top[here]).shape))
                    weights = tile.window(scores, top, gamma)
                if share is not None:
                    part = tile.of(share[here])
                    part.sub_(tile.of(top[here])).clamp_(max=QUERY_BOUND).exp_()
                    tile.of(fq[here]).mul_(part)
                weights = tile.add_linear(weights, fq, fk)
                y = weights @ tile.band(vp, keys)[:, : weights.shape[-1]]
                if sums is not None:
                    y.baddbmm_(tile.queries(fq), sums[:, tile.first : tile.last].flatten(0, 1))
                y = y.unflatten(0, (-1, tile.last - tile.first))
                total = y[..., size:]
                tile.of(inverse[here]).copy_(torch.where(total > 0, total.reciprocal(), 0))
                torch.mul(y[..., :size], tile.of(inverse[here]), out=tile.of(out[here]))
        ctx.plan = plan
        ctx.time = q.shape[1]
        ctx.save_for_backward(qp, kp, vp, fq, fk, gamma, factor, share, start, out, inverse, top)
        return out[:, : ctx.time].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grads[0].device.type, enabled=False):  # sums stay in fp32
            return BlockAttention._backward(ctx, grads[0])

    @staticmethod
    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qp, kp, vp, fq, fk, gamma, factor, share, start, out, inverse, top = ctx.saved_tensors
        plan: Plan = ctx.plan
        time, rows, size = ctx.time, qp.shape[0], out.shape[2]
        need_q, need_k, need_v, need_fq, need_fk, need_gamma, need_factor, need_logits, need_start, _ = (
            ctx.needs_input_grad
        )
        need_scores = need_q or need_k
        need_window = plan.win is not None and (need_scores or need_v or need_gamma or need_factor)
        grad = _pad(grad, plan)

        def zeros(needed: bool, x: Tensor | None) -> Tensor | None:
            return torch.zeros_like(x) if needed and x is not None else None

        dq, dk, dv = zeros(need_q, qp), zeros(need_k, kp), zeros(need_v, vp)
        dfq, dfk = zeros(need_fq or need_factor or need_logits, fq), zeros(need_fk, fk)
        dgamma, dstart = torch.zeros_like(gamma), zeros(need_start, start)
        for tiles in plan.tiles(rows):
            here, keys = tiles[0].rows, tiles[0].keys
            sums = _prefix_sums(fk[here], vp[keys], _some(start, here), plan) if plan.sums else None
            parts: list[Tensor] = []  # gradients of the sums
            for tile in tiles:
                # y = n / d: dn = dy / d, and dd = -(dy . y) / d goes to the column of ones.
                dn = tile.of(grad[here]) * tile.of(inverse[here])
                dd = (dn * tile.of(out[here])).sum(-1, keepdim=True).neg_()
                dn = torch.cat([dn, dd], -1).flatten(0, 1)
                if sums is not None:
                    if dfq is not None:
                        dlinear = dn @ sums[:, tile.first : tile.last].flatten(0, 1).transpose(-1, -2)
                        tile.of(dfq[here]).add_(dlinear.view(tile.of(dfq[here]).shape))
                    dsums = tile.queries(fq).transpose(-1, -2) @ dn
                    parts.append(dsums.unflatten(0, (-1, tile.last - tile.first)))
                dweights = dn @ tile.band(vp, keys).transpose(-1, -2)
                window = None
                if need_window:
                    scores = tile.scores(qp, kp)
                    # tanh's slope; 0 for what is not seen, -inf
                    slope = 1 - (scores / plan.softcap).clamp_(min=-1).square_() if plan.softcap else None
                    if need_scores and share is None:
                        is_top = (scores >= tile.queries(top)).to(scores.dtype)
                    window = tile.window(scores, top, gamma)
                    each = window.view(here.stop - here.start, 1, -1), dweights.view(here.stop - here.start, -1, 1)
                    dgamma[here] += torch.bmm(*each)[:, 0, 0]
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
                            tile.of(dq[here]).add_((dscores @ tile.band(kp, keys)).view(tile.of(dq[here]).shape))
                        if dk is not None:
                            tile.add_to_band(dk, keys, dscores.transpose(-1, -2) @ tile.queries(qp))
                if dv is not None:
                    weights = tile.add_linear(window, fq, fk)
                    tile.add_to_band(dv, keys, weights.transpose(-1, -2) @ dn)
                columns = plan.old.shape[1]
                if columns:
                    dlinear = dweights[..., :columns] * plan.old
                    if dfq is not None:
                        product = dlinear @ tile.band(fk, here)[:, :columns]
                        tile.of(dfq[here]).add_(product.view(tile.of(dfq[here]).shape))
                    if dfk is not None:
                        tile.add_to_band(dfk, here, dlinear.transpose(-1, -2) @ tile.queries(fq))
            if not parts:
                continue
            dsums = torch.cat(parts, 1)
            if dstart is not None:
                dstart[here] = dsums.sum(1)
            if plan.blocks > plan.reach:
                later = dsums[:, plan.reach :].flip(1).cumsum(1).flip(1)
                if dfk is not None:
                    _summed(dfk[here], plan).add_(_summed(vp[keys], plan) @ later.transpose(-1, -2))
                if dv is not None:
                    _summed(dv[keys], plan).add_(_summed(fk[here], plan) @ later)
        dfactor = None
        if dfq is not None and factor is not None:  # fq is phi_q times factor
            dfactor = (dfq * fq).sum((1, 2)) / factor if need_factor else None
            dfq = dfq * factor[:, None, None]
        dlogits = None
        if dfq is not None and share is not None:  # fq is phi_q times share
            if need_logits:
                dlogits = (dfq * fq).sum(-1).masked_fill_(share[..., 0] >= math.exp(QUERY_BOUND), 0)[:, :time]
            dfq = dfq.mul_(share)
        front = plan.front
        return (
            None if dq is None else dq[:, :time],
            None if dk is None else dk[:, front : front + time],
            None if dv is None else dv[:, front : front + time, :size],
            None if dfq is None or not need_fq else dfq[:, :time],
            None if dfk is None else dfk[:, front : front + time],
            dgamma / gamma if need_gamma else None,
            dfactor,
            dlogits,
            dstart,
            None,
        )


def _some(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _padded(
    q: Tensor, k: Tensor, v: Tensor, phi_q: Tensor | None, phi_k: Tensor | None, factor: Tensor | None, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs padded, keys in front too; phi_q with the linear term's factor in it."""
    qp, kp, vp = _pad(q, plan), _pad(k, plan, plan.front), _pad(v, plan, plan.front, ones=True)
    if phi_q is None or phi_k is None:
        return qp, kp, vp, qp[..., :0], kp[..., :0]
    fq = phi_q if factor is None else phi_q * factor[:, None, None]
    return qp, kp, vp, _pad(fq, plan), _pad(phi_k, plan, plan.front)
