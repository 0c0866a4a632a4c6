"""Backward of the chunked path, a tile at a time: through the sums before the bands, and through the bands' weights.

Shapes: r rows of a group, m blocks of a tile, L block, M blocks, P blocks in a band, Dv value head, F' features.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .tiles import Plan, Tile, add_product


@dataclass
class GroupGradients:
    """The gradients of a group's rows, from the last tile to the first; of what is not asked for they are None."""

    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    fk: Tensor  # phi_k
    sums: Tensor
    norms: Tensor
    gamma: Tensor
    top: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    need_fq: bool
    need_fk: bool
    top_counts: bool  # whether c_n has a gradient: it shifts the window's scores only
    # Of S and z in front of the P blocks after the tile, through all that comes later; of phi_k in the block before it.
    dsums: Tensor = field(init=False)
    dnorms: Tensor = field(init=False)
    dfk: Tensor | None = None

    def __post_init__(self) -> None:
        self.dsums = torch.zeros_like(self.sums[:, : self.plan.reach])
        self.dnorms = torch.zeros_like(self.norms[:, : self.plan.reach])

    def tile(self, tile: Tile, fq: Tensor, dn: Tensor, dd: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of fq (phi_q and the linear term's weight) [r m, L, F'] and of phi_k [r, m L, F'], where needed.

        dn [r m, L, Dv] and dd [r m, L, 1] are those of the numerators and denominators.
        """
        make = torch.empty_like if self.plan.sums else torch.zeros_like
        dfq = make(fq) if self.need_fq else None
        dfk = make(self.fk[:, tile.seen]) if self.need_fk else None
        own = slice(tile.own.start - tile.seen.start, None)
        if self.plan.sums:
            if dfk is not None:
                dfk[:, : own.start] = 0
            self._through_sums(tile, fq, dn, dd, dfq, None if dfk is None else dfk[:, own])
        self._through_bands(tile, fq, dn, dd, dfq, dfk)
        if dfk is None:
            return dfq, None
        if self.dfk is not None:
            dfk[:, dfk.shape[1] - self.dfk.shape[1] :] += self.dfk
        self.dfk = dfk[:, : own.start]
        return dfq, dfk[:, own]

    def _through_sums(
        self, tile: Tile, fq: Tensor, dn: Tensor, dd: Tensor, dfq: Tensor | None, dfk: Tensor | None
    ) -> None:
        """Through S and z; fills dfq and dfk."""
        plan, rows, blocks = self.plan, len(self.q), tile.last - tile.first
        if dfq is not None:
            torch.mul(dd, self.norms[:, tile.blocks].flatten(0, 1)[:, None], out=dfq)
            dfq.baddbmm_(dn, self.sums[:, tile.blocks].flatten(0, 1).transpose(-1, -2))
        # Of each block's sums, then of all that it enters: as in `blocks`, from the end.
        dsums = fq.new_empty(rows, blocks + plan.reach, *self.dsums.shape[2:])
        dsums[:, blocks:] = self.dsums
        if rows == 1:
            torch.bmm(fq.transpose(-1, -2), dn, out=dsums[0, :blocks])
        else:
            dsums[:, :blocks] = (fq.transpose(-1, -2) @ dn).unflatten(0, (rows, -1))
        dnorms = torch.cat([(fq.transpose(-1, -2) @ dd).view(rows, blocks, -1), self.dnorms], 1)
        after = dsums.unbind(1)
        for block in range(blocks - 1, -1, -1):
            after[block].add_(after[block + 1])
        dnorms[:, : blocks + 1] = dnorms[:, : blocks + 1].flip(1).cumsum(1).flip(1)
        self.dsums, self.dnorms = dsums[:, : plan.reach], dnorms[:, : plan.reach]
        later = dsums[:, plan.reach :].flatten(0, 1)
        if dfk is not None:
            part = dfk.unflatten(1, (blocks, -1))
            part.copy_(dnorms[:, plan.reach :, None].expand_as(part))
            add_product(part, self.v[:, tile.own].unflatten(1, (blocks, -1)), later.transpose(-1, -2))
        if self.dv is not None:
            keys = self.fk[:, tile.own].unflatten(1, (blocks, -1))
            add_product(self.dv[:, tile.own].unflatten(1, (blocks, -1)), keys, later)

    def _through_bands(
        self, tile: Tile, fq: Tensor, dn: Tensor, dd: Tensor, dfq: Tensor | None, dfk: Tensor | None
    ) -> None:
        """Through the weights of the keys in the tile's bands; dfk is of all `seen` tokens."""
        columns = self.plan.old.shape[1]
        scored = self.plan.windowed and (self.dq is not None or self.dk is not None)
        if not (scored or self.dv is not None or columns):
            return
        # of every key's weight; for the maps alone, of the old keys'
        dweights = dn @ tile.band(self.v, None if scored else columns).transpose(-1, -2)
        dweights += dd
        window = self._through_window(tile, dweights if scored else None)
        if self.dv is not None:
            weights = tile.add_linear(window, fq, self.fk)
            tile.add_to_band(self.dv[:, tile.seen], weights.transpose(-1, -2) @ dn)
        if columns:
            dlinear = dweights[..., :columns]
            dlinear *= self.plan.old
            if dfq is not None:
                dfq.baddbmm_(dlinear, tile.band(self.fk, columns))
            if dfk is not None:
                tile.add_to_band(dfk, dlinear.transpose(-1, -2) @ fq)

    def _through_window(self, tile: Tile, dweights: Tensor | None) -> Tensor | None:
        """The window's weights, where they are needed; with dweights the gradients through them, of q and k."""
        plan = self.plan
        if not plan.windowed or (dweights is None and self.dv is None):
            return None
        scores = tile.scores(self.q, self.k)
        if dweights is None:
            return tile.window(scores, self.top, self.gamma)
        # tanh's slope; 0 for what is not seen, -inf
        slope = 1 - (scores / plan.softcap).clamp_(min=-1).square_() if plan.softcap else None
        is_top = (scores >= tile.queries(self.top)).to(scores.dtype) if self.top_counts else None
        window = tile.window(scores, self.top, self.gamma)
        dscores = window * dweights
        if is_top is not None:
            dtop = dscores.sum(-1, keepdim=True) / is_top.sum(-1, keepdim=True).clamp_(min=1)  # ties share it
            dscores -= dtop * is_top
        dscores *= plan.scaling
        if slope is not None:
            dscores *= slope
        if self.dq is not None:
            add_product(tile.of(self.dq), dscores.unflatten(0, (len(self.q), -1)), tile.band(self.k))
        if self.dk is not None:
            tile.add_to_band(self.dk[:, tile.seen], dscores.transpose(-1, -2) @ tile.queries(self.q))
        return window
