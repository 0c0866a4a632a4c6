"""Backward of the chunked path, a tile at a time: through the sums before the bands, and through the bands' weights.

Letters: see ../README.md; r rows of a slice, c chunks of a tile, P chunks in a band.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .torch_tiles import Plan, Tile, add_product


@dataclass
class SliceGradients:
    """The gradients of a slice's rows, from the last tile to the first; of what is not asked for they are None."""

    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    phi_k: Tensor
    sums: Tensor
    norms: Tensor
    gamma: Tensor
    sinks: Tensor | None
    m: Tensor
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    need_phi_q: bool
    need_phi_k: bool
    m_has_gradient: bool  # whether c_n has a gradient: it shifts the window's scores only
    # Of S and z in front of the P chunks after the tile, through all that comes later; of phi_k in the chunk before it.
    dsums: Tensor = field(init=False)
    dnorms: Tensor = field(init=False)
    dphi_k: Tensor | None = None

    def __post_init__(self) -> None:
        self.dsums = torch.zeros_like(self.sums[:, : self.plan.reach])
        self.dnorms = torch.zeros_like(self.norms[:, : self.plan.reach])

    def tile(self, tile: Tile, weighted_q: Tensor, dn: Tensor, dd: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weighted_q (phi_q times the linear weight) [r c, L, F'] and of phi_k [r, c L, F'], where needed.

        dn [r c, L, Dv] and dd [r c, L, 1] are those of the numerators and denominators.
        """
        make = torch.empty_like if self.plan.has_sums else torch.zeros_like
        dweighted_q = make(weighted_q) if self.need_phi_q else None
        dphi_k = make(self.phi_k[:, tile.seen]) if self.need_phi_k else None
        own = slice(tile.own.start - tile.seen.start, None)
        if self.plan.has_sums:
            if dphi_k is not None:
                dphi_k[:, : own.start] = 0
            self._through_sums(tile, weighted_q, dn, dd, dweighted_q, None if dphi_k is None else dphi_k[:, own])
        self._through_bands(tile, weighted_q, dn, dd, dweighted_q, dphi_k)
        if dphi_k is None:
            return dweighted_q, None
        if self.dphi_k is not None:
            dphi_k[:, dphi_k.shape[1] - self.dphi_k.shape[1] :] += self.dphi_k
        self.dphi_k = dphi_k[:, : own.start]
        return dweighted_q, dphi_k[:, own]

    def _through_sums(
        self, tile: Tile, weighted_q: Tensor, dn: Tensor, dd: Tensor, dweighted_q: Tensor | None, dphi_k: Tensor | None
    ) -> None:
        """Through S and z; fills dweighted_q and dphi_k."""
        plan, rows, chunks = self.plan, len(self.q), tile.last - tile.first
        if dweighted_q is not None:
            torch.mul(dd, self.norms[:, tile.chunks].flatten(0, 1)[:, None], out=dweighted_q)
            dweighted_q.baddbmm_(dn, self.sums[:, tile.chunks].flatten(0, 1).transpose(-1, -2))
        # Of each chunk's sums, then of all that it enters: as in `torch_chunks`, from the end.
        dsums = weighted_q.new_empty(rows, chunks + plan.reach, *self.dsums.shape[2:])
        dsums[:, chunks:] = self.dsums
        if rows == 1:
            torch.bmm(weighted_q.transpose(-1, -2), dn, out=dsums[0, :chunks])
        else:
            dsums[:, :chunks] = (weighted_q.transpose(-1, -2) @ dn).unflatten(0, (rows, -1))
        dnorms = torch.cat([(weighted_q.transpose(-1, -2) @ dd).view(rows, chunks, -1), self.dnorms], 1)
        after = dsums.unbind(1)
        for chunk in range(chunks - 1, -1, -1):
            after[chunk].add_(after[chunk + 1])
        dnorms[:, : chunks + 1] = dnorms[:, : chunks + 1].flip(1).cumsum(1).flip(1)
        self.dsums, self.dnorms = dsums[:, : plan.reach], dnorms[:, : plan.reach]
        later = dsums[:, plan.reach :].flatten(0, 1)
        if dphi_k is not None:
            part = dphi_k.unflatten(1, (chunks, -1))
            part.copy_(dnorms[:, plan.reach :, None].expand_as(part))
            add_product(part, self.v[:, tile.own].unflatten(1, (chunks, -1)), later.transpose(-1, -2))
        if self.dv is not None:
            keys = self.phi_k[:, tile.own].unflatten(1, (chunks, -1))
            add_product(self.dv[:, tile.own].unflatten(1, (chunks, -1)), keys, later)

    def _through_bands(
        self, tile: Tile, weighted_q: Tensor, dn: Tensor, dd: Tensor, dweighted_q: Tensor | None, dphi_k: Tensor | None
    ) -> None:
        """Through the weights of the keys in the tile's bands; dphi_k is of all `seen` tokens."""
        num_older = self.plan.older.shape[1]
        scored = self.plan.spec.has_window and (self.dq is not None or self.dk is not None)
        if not (scored or self.dv is not None or num_older):
            return
        # of every key's weight; for the maps alone, of the older keys'
        dweights = dn @ tile.band(self.v, None if scored else num_older).transpose(-1, -2)
        dweights += dd
        window = self._through_window(tile, dweights if scored else None, dd)
        if self.dv is not None:
            weights = tile.add_older(window, weighted_q, self.phi_k)
            tile.add_to_band(self.dv[:, tile.seen], weights.transpose(-1, -2) @ dn)
        if num_older:
            dlinear = dweights[..., :num_older]
            dlinear *= self.plan.older
            if dweighted_q is not None:
                dweighted_q.baddbmm_(dlinear, tile.band(self.phi_k, num_older))
            if dphi_k is not None:
                tile.add_to_band(dphi_k, dlinear.transpose(-1, -2) @ weighted_q)

    def _through_window(self, tile: Tile, dweights: Tensor | None, dd: Tensor) -> Tensor | None:
        """The window's weights, where they are needed; with dweights the gradients through them, of q and k."""
        plan = self.plan
        if not plan.spec.has_window or (dweights is None and self.dv is None):
            return None
        scores = tile.scores(self.q, self.k)
        if dweights is None:
            return tile.window(scores, self.m, self.gamma)
        # tanh's slope; 0 for what is not seen, -inf
        slope = 1 - (scores / plan.spec.softcap).clamp_(min=-1).square_() if plan.spec.softcap else None
        is_max = (scores >= tile.queries(self.m)).to(scores.dtype) if self.m_has_gradient else None
        window = tile.window(scores, self.m, self.gamma)
        dscores = window * dweights
        if is_max is not None:
            dm, count = dscores.sum(-1, keepdim=True), is_max.sum(-1, keepdim=True)
            if self.sinks is not None:  # a sink's value is 0; where it is the largest, it keeps the gradient
                dm += tile.sink_weights(self.sinks, self.m, self.gamma) * dd
                count += (tile.by_row(self.sinks) >= tile.of(self.m)).flatten(0, 1)
            dscores -= dm / count.clamp_(min=1) * is_max  # ties share it
        dscores *= plan.spec.scaling
        if slope is not None:
            dscores *= slope
        if self.dq is not None:
            add_product(tile.of(self.dq), dscores.unflatten(0, (len(self.q), -1)), tile.band(self.k))
        if self.dk is not None:
            tile.add_to_band(self.dk[:, tile.seen], dscores.transpose(-1, -2) @ tile.queries(self.q))
        return window
