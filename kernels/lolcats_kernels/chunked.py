"""Hybrid attention in linear time and memory, in PyTorch: what runs wherever there is no better kernel.

Shapes: B batch, H query heads, K key heads, T time, D head, Dv value head, C window slots of a state, J = C + T.

`blocks` computes rows of tokens without gaps. Here rows become such rows: the keys that a state still holds come
first, padding goes to the end, where causal queries do not see it.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from .blocks import BlockAttention, make_plan
from .decoding import decode_step
from .features import k_features, q_features
from .maps import HybridMaps, compute_dtype, repeat_heads
from .state import KVState, masked_sums, next_ring, window_start


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x [B, H, J, D] with its tokens in the order [B, J']."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class Rows(Protocol):
    """What computes rows of tokens without gaps, the first of which comes after the sums of `state`.

    q [B, H, J, D], k [B, K, J, D], v [B, K, J, Dv], contents of padding finite.
    -> out [B, H, J, Dv]; and with count [B], S and z over the first `count` keys of each row and those of `state`.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        count: Tensor | None,
        maps: HybridMaps,
        *,
        scaling: float,
        softcap: float | None,
        state: KVState | None,
        terms: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


def attend_in_rows(
    rows: Rows,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None = None,
    valid: Tensor | None = None,
    state: KVState | None = None,
    return_state: bool = False,
    terms: str = "both",
) -> tuple[Tensor, KVState | None]:
    """Hybrid attention by what computes rows without gaps; the other arguments as for `hybrid_attention`."""
    batch, _, time, _ = q.shape
    held = 0 if state is None else state.keys.shape[2]
    if valid is not None:
        # What lies in padding must not matter, not even NaN.
        mask = valid[:, None, :, None]
        q, k, v = (torch.where(mask, x, 0) for x in (q, k, v))
    live = q.new_ones(batch, time, dtype=torch.bool) if valid is None else valid
    position = live.cumsum(1) - 1
    length = live.sum(1)
    if state is not None:
        position, length = position + state.length[:, None], length + state.length
        if held:
            # Queries of the held keys are computed in vain: their number is constant, and rows stay simple.
            held_position, held_live = state.live_slots(maps.config)
            position, live = torch.cat([held_position, position], 1), torch.cat([held_live, live], 1)
            q = torch.cat([q.new_zeros(batch, q.shape[1], held, q.shape[3]), q], 2)
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)

    # Terraces count from the first token: the held keys begin at a multiple of the window, so they still do.
    back = None
    if held or (valid is not None and not bool((valid[:, 1:] <= valid[:, :-1]).all())):
        order = torch.where(live, position, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
        back = order.argsort(dim=1)[:, held:]
        q, k, v = (_take(x, order) for x in (q, k, v))
        position, live = position.gather(1, order), live.gather(1, order)

    count = None
    if return_state:
        count = (live & (position < window_start(length, maps.config)[:, None])).sum(1)
    out, sums, norms = rows(q, k, v, count, maps, scaling=scaling, softcap=softcap, state=state, terms=terms)
    if back is not None:
        out = _take(out, back)
    if valid is not None:
        out = torch.where(mask, out, 0)
    out = out.to(q.dtype)
    if not return_state:
        return out, None
    assert sums is not None and norms is not None
    return out, KVState(sums, norms, *next_ring(maps.config, k, v, position, live, length), length)


def _block_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor | None,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None,
    state: KVState | None,
    terms: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """By `BlockAttention`."""
    phi_k = k_features(maps, k) if terms != "window" or count is not None else None
    out = _attend(q, k, v, phi_k, maps, scaling, softcap, state, terms)
    if count is None:
        return out, None, None
    assert phi_k is not None
    old = torch.arange(k.shape[2], device=k.device) < count[:, None]
    return out, *masked_sums(phi_k, v, old, state)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_k: Tensor | None,
    maps: HybridMaps,
    scaling: float,
    softcap: float | None,
    state: KVState | None,
    terms: str,
) -> Tensor:
    """[B, H, J, Dv] in the compute dtype."""
    batch, heads = q.shape[:2]
    dtype = compute_dtype(q.dtype)
    linear = terms != "window"
    phi_q = q_features(maps, q) if linear else None
    if q.device.type != "cpu":
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    start = None
    if state is not None and linear:
        start = torch.cat([state.sums, state.norms[..., None]], -1).flatten(0, 1)
    gamma, factor = (x.repeat(batch) for x in maps.factors(dtype))
    rows = q.to(dtype).flatten(0, 1)
    plan = make_plan(
        rows,
        heads // k.shape[1],
        maps.config,
        scaling=scaling,
        softcap=softcap,
        terms=terms,
        has_state=start is not None,
    )
    if plan.win is None and not plan.old.numel() and not plan.sums:  # `terms` leaves nothing to sum
        return rows.new_zeros(batch, heads, q.shape[2], v.shape[3])
    logits = maps.query_logits(q) if linear and plan.win is not None else None
    if logits is not None:
        logits = logits.flatten(0, 1)
    out = BlockAttention.apply(
        rows,
        k.to(dtype).flatten(0, 1),
        v.to(dtype).flatten(0, 1),
        phi_q.flatten(0, 1) if phi_q is not None else None,
        phi_k.flatten(0, 1) if phi_k is not None and linear else None,
        gamma,
        factor if maps.config.linear_factor == "affine" else None,  # None: 1
        logits,
        start,
        plan,
    )
    return out.unflatten(0, (batch, heads))


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    valid: Tensor | None = None,
    state: KVState | None = None,
    consume_state: bool = False,
    **options: Any,
) -> tuple[Tensor, KVState | None]:
    """Hybrid attention by blocks, or of one token after a state; arguments as for `hybrid_attention`."""
    if valid is not None and bool(valid.all()):
        valid = None
    if state is not None and q.shape[2] == 1 and valid is None:
        return decode_step(q, k, v, maps, state=state, consume_state=consume_state, **options)
    return attend_in_rows(_block_rows, q, k, v, maps, valid=valid, state=state, **options)
