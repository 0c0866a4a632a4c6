"""Hybrid attention in linear time and memory, in PyTorch: what runs wherever there is no better kernel.

Shapes: B batch, H query heads, K key heads, T time, D head, Dv value head, C window slots of a state, J = C + T.

`blocks` computes rows of tokens without gaps. Here rows become such rows: the keys that a state still holds come
first, padding goes to the end, where causal queries do not see it.
"""

from dataclasses import astuple
from typing import Any, Protocol

import torch
from torch import Tensor

from .blocks import block_attention
from .decoding import decode_step
from .features import parameters
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
    """By `block_attention`."""
    batch, heads = q.shape[:2]
    dtype = compute_dtype(q.dtype)
    linear = terms != "window"
    if q.device.type != "cpu":
        k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    start = None
    if state is not None and linear:
        start = torch.cat([state.sums, state.norms[..., None]], -1).flatten(0, 1)
    gamma, factor = (x.repeat(batch) for x in maps.factors(dtype))
    logits = maps.query_logits(q) if linear and maps.config.window and terms != "linear" else None
    # The sums of a state come with the attention, unless autograd follows them or nothing else needs the features.
    together = linear and not torch.is_grad_enabled()
    tensors = [
        *(x.to(dtype).flatten(0, 1) for x in (q, k, v)),
        gamma,
        factor if maps.config.linear_factor == "affine" else None,  # None: 1
        None if logits is None else logits.flatten(0, 1),
        start,
        *parameters(maps, dtype),
    ]
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    options = *astuple(maps.config), heads, heads // k.shape[1], scaling, softcap, terms, keep
    results = block_attention(*tensors, count if together else None, *options)
    out, sums, norms = (x.unflatten(0, (batch, -1)) for x in results[:3])
    if count is None:
        return out, None, None
    if not together:
        old = torch.arange(k.shape[2], device=k.device) < count[:, None]
        return out, *masked_sums(maps.k_features(k), v, old, state)
    return out, *((sums, norms) if state is None else (sums + state.sums, norms + state.norms))


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
