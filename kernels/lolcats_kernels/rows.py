"""Makes rows without gaps, which the backends compute, of rows with padding and states.

Letters: see ../README.md. The keys that a state still holds come first; padding goes to the end, where causal queries
do not see it.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .equation import summed_keys
from .maps import HybridMaps
from .spec import CallSpec
from .state import KeySums, KVState, next_ring


class RowResults(NamedTuple):
    """out [B, H, T, Dv], and the sums over the keys that leave the window, those of the initial state included."""

    out: Tensor
    sums: KeySums | None


class Rows(Protocol):
    """Computes rows of tokens without gaps. The first token comes after the sums of `initial_state`.

    q [B, H, T, D], k [B, K, T, D] and v [B, K, T, Dv] hold finite numbers in the padding too. With num_summed [B] it
    also returns S and z over this number of first keys of each row. Fewer than `waiting` keys after those, if that is
    not 0, are older than the windows of the row's last queries. num_summed is then a multiple of it.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        maps: HybridMaps,
        spec: CallSpec,
        *,
        initial_state: KVState | None,
        num_summed: Tensor | None,
        waiting: int,
    ) -> RowResults: ...


def attend_in_rows(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    valid: Tensor | None = None,
    initial_state: KVState | None = None,
    return_state: bool = False,
    waiting: int = 0,
) -> tuple[Tensor, KVState | None]:
    """Hybrid attention by what computes rows without gaps; the other arguments as for `hybrid_attention`."""
    batch, _, time, _ = q.shape
    held = 0 if initial_state is None else initial_state.keys.shape[2]
    if valid is not None:
        # What lies in padding must not matter, not even NaN.
        mask = valid[:, None, :, None]
        q, k, v = (torch.where(mask, x, 0) for x in (q, k, v))
    live = q.new_ones(batch, time, dtype=torch.bool) if valid is None else valid
    position = live.cumsum(1) - 1
    length = live.sum(1)
    if initial_state is not None:
        position, length = position + initial_state.length[:, None], length + initial_state.length
        if held:
            # Queries of the held keys are computed in vain: their number is constant, and rows stay simple.
            slots = initial_state.live_slots(maps.config)
            position, live = torch.cat([slots.position, position], 1), torch.cat([slots.live, live], 1)
            q = torch.cat([q.new_zeros(batch, q.shape[1], held, q.shape[3]), q], 2)
            k, v = torch.cat([initial_state.keys, k], 2), torch.cat([initial_state.values, v], 2)

    # Terraces count from the first token: the held keys begin at a multiple of the window, so they still do.
    back = None
    if held or (valid is not None and not bool((valid[:, 1:] <= valid[:, :-1]).all())):
        order = torch.where(live, position, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        back = order.argsort(dim=1)[:, held:]
        q, k, v = (_take(x, order) for x in (q, k, v))
        position, live = position.gather(1, order), live.gather(1, order)

    num_summed = None
    if return_state:
        num_summed = (live & (position < summed_keys(length, maps.config, waiting)[:, None])).sum(1)
    out, sums = rows(q, k, v, maps, spec, initial_state=initial_state, num_summed=num_summed, waiting=waiting)
    if back is not None:
        out = _take(out, back)
    if valid is not None:
        out = torch.where(mask, out, 0)
    out = out.to(q.dtype)
    if not return_state:
        return out, None
    assert sums is not None
    return out, KVState(*sums, *next_ring(maps.config, k, v, position, live, length, waiting), length)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x [B, H, T, D] with its tokens in the order [B, T']."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
