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


def sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    size: int,
    scaling: float,
    softcap: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Hybrid attention with LoLA's sparse cache (arXiv 2505.23666), by the definition, one query after the other.

    A key that leaves the window stays as it is. When more than `size` have stayed, the one goes into S and z that these
    recall best when asked for the key itself: of least | phi_q(k_j).S / phi_q(k_j).z - v_j |^2, summed over the query
    heads. A key head chooses for all its query heads. Those that stay are weighed as the window's are, with
    gamma exp(s_nj - c_n), where c_n is the largest score in the window still, so that the linear term keeps its weight
    beside the window; the exponent is bounded. Arguments as for `hybrid_attention`; window > 0.
    """
    dtype, config, group = compute_dtype(q.dtype), maps.config, q.shape[1] // k.shape[1]
    gamma, constant = maps.factors(dtype)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype)
    for b in range(q.shape[0]):
        real = torch.arange(q.shape[2]) if valid is None else valid[b].nonzero()[:, 0]
        qs, ks, vs = (x[b : b + 1, :, real].to(dtype) for x in (q, k, v))
        phi_q, phi_k, asked = (
            maps.q_features(qs)[0],
            maps.k_features(ks)[0],
            maps.q_features(repeat_heads(ks, q.shape[1])),
        )
        logits = maps.query_logits(qs)
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            s = torch.zeros(group, phi_k.shape[2], v.shape[3], dtype=dtype)
            z = torch.zeros(group, phi_k.shape[2], dtype=dtype)
            stayed: list[int] = []
            for n in range(len(real)):
                start, after = (int(window_start(torch.tensor(i), config)) for i in (n, n + 1))
                window = list(range(start, n + 1))
                scores = cap_scores(qs[0, heads, n] @ ks[0, h, window + stayed].T * scaling, softcap)
                top = scores[:, : len(window)].amax(-1, keepdim=True)
                exact = gamma[heads, None] * (scores - top).clamp(max=QUERY_BOUND).exp()
                factor = constant[heads, None]
                if logits is not None:
                    factor = (logits[0, heads, n, None] - top).clamp(max=QUERY_BOUND).exp()
                phi = factor * phi_q[heads, n]
                numerator = exact @ vs[0, h, window + stayed] + (phi[:, None] @ s)[:, 0]
                denominator = exact.sum(-1, keepdim=True) + (phi * z).sum(-1, keepdim=True)
                out[b, heads, real[n]] = numerator / denominator
                for j in range(start, after):
                    stayed.append(j)
                    if len(stayed) > size:
                        ask = asked[0, heads][:, stayed]
                        recalled = safe_divide(ask @ s, ask @ z[..., None])
                        i = stayed.pop(int((recalled - vs[0, h, stayed]).square().sum((0, 2)).argmin()))
                        s = s + phi_k[heads, i, :, None] * vs[0, h, i]
                        z = z + phi_k[heads, i]
    return out.to(q.dtype)
