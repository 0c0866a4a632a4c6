"""Hybrid attention as it is defined: quadratic, fp32 (fp64 for fp64 inputs). All else is compared with this.

Shapes: B batch, H query heads, K key heads, T time, D head, Dv value head, F' features,
J keys (those that the state still holds, then the T new ones).

Source: LoLCATs, arXiv 2410.10254, eq. 7. For the query at position n, with win the keys that it sees by
softmax, old the keys before those, s_ni = scaling q_n . k_i (capped if the model
caps it), and c_n = max_win s_ni:

          sum_win gamma exp(s_ni - c_n) v_i  +  lambda phi_q(q_n) . sum_old phi_k(k_i) v_i^T
    y_n = ----------------------------------------------------------------------------------
          sum_win gamma exp(s_ni - c_n)      +  lambda phi_q(q_n) . sum_old phi_k(k_i)

gamma = sigmoid(window_logit); lambda is 1, or 1 - gamma ("affine"). The linear term is not shifted by c_n, so
c_n is part of the meaning, for the gradients too. With "exp" gamma is 1 and lambda is exp(query_logits - c_n), so
that c_n cancels as in a softmax.
"""

import torch
from torch import Tensor

from .maps import QUERY_BOUND, HybridConfig, HybridMaps, compute_dtype, repeat_heads
from .state import KVState, next_state, window_start


def key_masks(query: Tensor, key: Tensor, config: HybridConfig) -> tuple[Tensor, Tensor]:
    """(win, old), both bool [..., T, J], for query positions [..., T] and key positions [..., J]."""
    query, key = query[..., :, None], key[..., None, :]
    start = window_start(query, config)
    return (key >= start) & (key <= query), (key < start) & (key <= query)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; 0, with zero gradients, where nothing was summed."""
    return numerator / torch.where(denominator > 0, denominator, 1) * (denominator > 0)


def _unnormalised(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    maps: HybridMaps,
    scaling: float,
    softcap: float | None,
    win: Tensor,
    old: Tensor,
) -> tuple[Tensor, Tensor]:
    """[B, H, T, J], every key's weight before the division, and lambda [B, H, T, 1]. win, old: bool [B, 1, T, J]."""
    gamma, factor = (x[:, None, None] for x in maps.factors(q.dtype))
    scores = cap_scores(q @ k.transpose(-1, -2) * scaling, softcap).masked_fill(~win, -torch.inf)
    # c_n; any number will do where there is no window
    top = torch.where(win.any(-1, keepdim=True), scores.amax(-1, keepdim=True), 0)
    logits = maps.query_logits(q)
    if logits is not None:
        top = top.detach()  # it cancels
        factor = linear_weight(logits[..., None], top, win.any(-1, keepdim=True))
    window = gamma * torch.exp(scores - top)
    linear = factor * (phi_q @ phi_k.transpose(-1, -2)).masked_fill(~old, 0)
    return window + linear, factor


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(scores / softcap), as in Gemma 2; the scores themselves without a cap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def linear_weight(logits: Tensor, top: Tensor, has_window: Tensor) -> Tensor:
    """exp(logits - top), bounded; 1 where there is no window, whose linear term alone is divided by itself."""
    return torch.where(has_window, (logits - top).clamp(max=QUERY_BOUND), 0).exp()


def hybrid_attention_weights(
    q: Tensor,
    k: Tensor,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None = None,
    valid: Tensor | None = None,
    terms: str = "both",
) -> Tensor:
    """The weights [B, H, T, T] that hybrid attention gives each key; fp32 (fp64 for fp64 inputs).

    q [B, H, T, D]; k [B, K, T, D]; valid [B, T] bool; options as for `hybrid_attention`. Quadratic.
    The rows sum to 1; rows of invalid queries, and of queries that see no key, are 0.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _weights(q, k, maps, scaling, softcap, valid, terms)


def _weights(
    q: Tensor,
    k: Tensor,
    maps: HybridMaps,
    scaling: float,
    softcap: float | None,
    valid: Tensor | None,
    terms: str,
) -> Tensor:
    batch, _, time, _ = q.shape
    valid = torch.ones(batch, time, dtype=torch.bool, device=q.device) if valid is None else valid
    mask = valid[:, None, :, None]
    dtype = compute_dtype(q.dtype)
    q, k = (torch.where(mask, x, 0).to(dtype) for x in (q, k))
    position = valid.cumsum(1) - 1
    win, old = _masks(position, position, valid, valid, maps.config, terms)
    phi_q, phi_k = maps.q_features(q), maps.k_features(k)
    a, _ = _unnormalised(q, repeat_heads(k, maps.num_heads), phi_q, phi_k, maps, scaling, softcap, win, old)
    return safe_divide(a, a.sum(-1, keepdim=True))


def _masks(
    query: Tensor, key: Tensor, query_valid: Tensor, key_valid: Tensor, config: HybridConfig, terms: str
) -> tuple[Tensor, Tensor]:
    """`key_masks` [B, 1, T, J] among valid tokens, emptied of what `terms` leaves out."""
    win, old = key_masks(query, key, config)
    seen = query_valid[:, :, None] & key_valid[:, None, :]
    return (win & seen & (terms != "linear"))[:, None], (old & seen & (terms != "window"))[:, None]


def reference_attention(
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
    consume_state: bool = False,
) -> tuple[Tensor, KVState | None]:
    """Hybrid attention by the definition; arguments as for `hybrid_attention`. States are left alone in any case."""
    batch, heads, time, _ = q.shape
    config, dtype = maps.config, compute_dtype(q.dtype)
    valid = torch.ones(batch, time, dtype=torch.bool, device=q.device) if valid is None else valid

    # What lies in padding must not matter, not even NaN: 0 * NaN is NaN, so it is replaced, not multiplied.
    mask = valid[:, None, :, None]
    q, k, v = (torch.where(mask, x, 0) for x in (q, k, v))

    # Positions count valid tokens. Keys that the state still holds come first.
    position = valid.cumsum(1) - 1
    length = valid.sum(1)
    key_position, live = position, valid
    if state is not None:
        position = position + state.length[:, None]
        length = length + state.length
        held, held_live = state.live_slots(config)
        key_position, live = torch.cat([held, position], 1), torch.cat([held_live, valid], 1)
        k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)

    win, old = _masks(position, key_position, valid, live, config, terms)
    qs, ks, vs = q.to(dtype), repeat_heads(k, heads).to(dtype), repeat_heads(v, heads).to(dtype)
    phi_q, phi_k = maps.q_features(q), maps.k_features(k)
    a, factor = _unnormalised(qs, ks, phi_q, phi_k, maps, scaling, softcap, win, old)
    numerator, denominator = a @ vs, a.sum(-1, keepdim=True)
    if state is not None and terms != "window":
        numerator = numerator + factor * (phi_q @ state.sums)
        denominator = denominator + factor * (phi_q @ state.norms[..., None])
    out = safe_divide(numerator, denominator)
    out = torch.where(mask, out, 0).to(q.dtype)
    if not return_state:
        return out, None
    return out, next_state(maps, state, phi_k, k, v, key_position, live, length)
