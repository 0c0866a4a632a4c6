"""Hybrid attention as it is defined: quadratic, fp32 (fp64 for fp64 inputs). All else is compared with this.

Letters: see ../README.md. Source: LoLCATs, arXiv 2410.10254, eq. 7. For the query at position n, with win the keys
that it sees by softmax, old the keys before those, s_ni = scaling q_n . k_i (capped if the model caps it), and
c_n = max_win s_ni:

          sum_win gamma exp(s_ni - c_n) v_i  +  lambda phi_q(q_n) . sum_old phi_k(k_i) v_i^T
    y_n = ----------------------------------------------------------------------------------
          sum_win gamma exp(s_ni - c_n)      +  lambda phi_q(q_n) . sum_old phi_k(k_i)

gamma = sigmoid(window_logit); lambda is 1, or 1 - gamma ("affine"). The linear term is not shifted by c_n, so
c_n is part of the meaning, for the gradients too. With "exp" gamma is 1 and lambda is exp(query_logits - c_n), so
that c_n cancels as in a softmax. A head's sink b is one more key of every window, with the score b and the value 0.

With `decay`, phi_k(k_i) is multiplied by exp(-sum g_j), over the keys j of old after i: g_j = softplus(b + a . k_j).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .equation import KeyMasks, bounded_exp, cap_scores, key_masks, repeat_heads, safe_divide, summed_keys
from .maps import HybridMaps
from .spec import CallSpec, compute_dtype
from .state import KVState, masked_sums, next_ring


def _unnormalised(
    q: Tensor,
    k: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    masks: KeyMasks,
    sinks: Tensor | None,
    forgotten: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every key's weight before the division, [B, H, T, keys]; what is below the line, and lambda, [B, H, T, 1].
    masks: bool [B, 1, T, keys]. forgotten [B, H, T, keys]: the exponents of the decay, if there is one."""
    gamma, linear_weight = (x[:, None, None] for x in maps.term_weights(q.dtype))
    scores = cap_scores(q @ k.transpose(-1, -2) * spec.scaling, spec.softcap).masked_fill(~masks.window, -torch.inf)
    # c_n; any number will do where there is no window
    has_window = masks.window.any(-1, keepdim=True)
    m = scores.amax(-1, keepdim=True)
    b = None if sinks is None else sinks.to(q.dtype)[:, None, None]
    m = torch.where(has_window, m if b is None else torch.maximum(m, b), 0)
    logits = maps.query_logits(q)
    if logits is not None:
        m = m.detach()  # it cancels
        # 1 where there is no window: the linear term alone is divided by itself
        linear_weight = bounded_exp(torch.where(has_window, logits[..., None] - m, 0))
    window = gamma * torch.exp(scores - m)
    linear = linear_weight * (phi_q @ phi_k.transpose(-1, -2)).masked_fill(~masks.older, 0)
    if forgotten is not None:
        linear = linear * torch.exp(-forgotten)
    weights = window + linear
    denominator = weights.sum(-1, keepdim=True)
    if b is not None:
        denominator = denominator + torch.where(has_window, gamma * torch.exp(b - m), 0)
    return weights, denominator, linear_weight


def hybrid_attention_weights(
    q: Tensor,
    k: Tensor,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
    terms: str = "both",
) -> Tensor:
    """The weights [B, H, T, T] that hybrid attention gives each key; fp32 (fp64 for fp64 inputs).

    q [B, H, T, D]; k [B, K, T, D]; valid [B, T] bool; options as for `hybrid_attention`. Quadratic.
    The rows sum to 1, with sinks to less; rows of invalid queries, and of queries that see no key, are 0.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _weights(q, k, maps, CallSpec(maps.config, scaling, softcap, terms), sinks, valid)


def _weights(
    q: Tensor, k: Tensor, maps: HybridMaps, spec: CallSpec, sinks: Tensor | None, valid: Tensor | None
) -> Tensor:
    batch, _, time, _ = q.shape
    valid = torch.ones(batch, time, dtype=torch.bool, device=q.device) if valid is None else valid
    mask = valid[:, None, :, None]
    dtype = compute_dtype(q.dtype)
    q, k = (torch.where(mask, x, 0).to(dtype) for x in (q, k))
    position = valid.cumsum(1) - 1
    masks = _masks(position, position, valid, valid, spec)
    phi_q, phi_k = maps.q_features(q), maps.k_features(k)
    g = maps.decays(k)
    forgotten = None if g is None else masks.older.to(dtype) @ _later_decays(g, position)
    k = repeat_heads(k, maps.num_heads)
    weights, denominator, _ = _unnormalised(q, k, phi_q, phi_k, maps, spec, masks, sinks, forgotten)
    return safe_divide(weights, denominator)


def _later_decays(g: Tensor, position: Tensor) -> Tensor:
    """g [B, H, keys] of each key for every key before it, else 0: [B, H, keys, keys before]."""
    return g[..., None] * (position[:, :, None] > position[:, None, :])[:, None]


def _masks(query: Tensor, key: Tensor, query_valid: Tensor, key_valid: Tensor, spec: CallSpec) -> KeyMasks:
    """`key_masks` [B, 1, T, keys] among valid tokens, emptied of what `terms` leaves out."""
    window, older = key_masks(query, key, spec.config)
    seen = query_valid[:, :, None] & key_valid[:, None, :]
    return KeyMasks((window & seen & spec.has_window)[:, None], (older & seen & spec.has_linear)[:, None])


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
    initial_state: KVState | None = None,
    return_state: bool = False,
    consume_state: bool = False,
    waiting: int = 0,
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
    if initial_state is not None:
        position = position + initial_state.length[:, None]
        length = length + initial_state.length
        held = initial_state.live_slots(config)
        key_position, live = torch.cat([held.position, position], 1), torch.cat([held.live, valid], 1)
        k, v = torch.cat([initial_state.keys, k], 2), torch.cat([initial_state.values, v], 2)

    masks = _masks(position, key_position, valid, live, spec)
    qs, ks, vs = q.to(dtype), repeat_heads(k, heads).to(dtype), repeat_heads(v, heads).to(dtype)
    phi_q, phi_k = maps.q_features(q), maps.k_features(k)
    g = maps.decays(k)
    later = None if g is None else _later_decays(g, key_position)
    older = masks.older.to(dtype)
    forgotten = None if later is None else older @ later
    weights, denominator, linear_weight = _unnormalised(qs, ks, phi_q, phi_k, maps, spec, masks, sinks, forgotten)
    numerator = weights @ vs
    if initial_state is not None and spec.has_linear:
        left_over = linear_weight if g is None else linear_weight * torch.exp(-(older @ g[..., None]))
        numerator = numerator + left_over * (phi_q @ initial_state.sums)
        denominator = denominator + left_over * (phi_q @ initial_state.norms[..., None])
    out = torch.where(mask, safe_divide(numerator, denominator), 0).to(q.dtype)
    if not return_state:
        return out, None
    left = live & (key_position < summed_keys(length, config, waiting)[:, None])
    if later is not None and g is not None:
        entered = left[:, None, None].to(dtype)  # [B, 1, 1, keys]
        phi_k = phi_k * torch.exp(-(entered @ later)).transpose(-1, -2)
        if initial_state is not None:
            initial_state = initial_state.decayed((entered @ g[..., None])[:, :, 0, 0])
    sums = masked_sums(phi_k, v, left, initial_state)
    return out, KVState(*sums, *next_ring(config, k, v, key_position, live, length, waiting), length)
