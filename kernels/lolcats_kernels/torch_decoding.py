"""One token after a state: constant time and memory, a small constant number of operations.

Letters: see ../README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .equation import bounded_exp, cap_scores, safe_divide, summed_keys, window_start
from .maps import HybridMaps
from .spec import CallSpec, compute_dtype
from .state import KVState, slot_positions


def decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    sinks: Tensor | None,
    initial_state: KVState,
    return_state: bool,
    consume_state: bool = False,
    valid: Tensor | None = None,
) -> tuple[Tensor, KVState | None]:
    """Hybrid attention for T = 1; q [B, H, 1, D], k [B, K, 1, D], v [B, K, 1, Dv].

    consume_state: the state returned may lie in the tensors of the one given.
    valid [B, 1] bool: False is padding, which changes nothing and gets 0.
    """
    if valid is not None:
        mask = valid[:, None, :, None]
        q, k, v = (torch.where(mask, x, 0) for x in (q, k, v))
    state = initial_state
    in_place = consume_state and return_state
    scatter = Tensor.scatter_ if in_place else Tensor.scatter
    config = maps.config
    num_key_value_heads, slots = k.shape[1], state.keys.shape[2]
    dtype = compute_dtype(q.dtype)
    length = state.length + (1 if valid is None else valid[:, 0])
    if not slots:  # pure linear: the query's own key is in the sums that it sees
        take = None if valid is None else mask
        sums, norms = _fold(maps, state.sums, state.norms, k, v, take, in_place=in_place)
        after = KVState(sums, norms, state.keys, state.values, length)
        out = safe_divide(*_linear(maps, q, sums, norms, None)).to(q.dtype)
        if not spec.has_linear:
            out = torch.zeros_like(out)
        return (out if valid is None else out * mask), after if return_state else None

    # The new token takes the slot of one that has left the window.
    slot = torch.remainder(state.length, slots)[:, None, None, None]
    if valid is not None:
        k, v = (
            torch.where(mask, x, ring.gather(2, slot.expand_as(x))) for x, ring in ((k, state.keys), (v, state.values))
        )
    keys = scatter(state.keys, 2, slot.expand_as(k), k)
    values = scatter(state.values, 2, slot.expand_as(v), v)
    numerator: Tensor | None = None
    denominator: Tensor | None = None
    m: Tensor | None = None
    if spec.has_window:
        gamma = maps.term_weights(dtype).gamma.view(num_key_value_heads, -1, 1)
        query = q.to(dtype).unflatten(1, (num_key_value_heads, -1)).squeeze(3)  # [B, K, G, D]
        scores = cap_scores(query @ keys.to(dtype).transpose(-1, -2) * spec.scaling, spec.softcap)  # [B, K, G, C]
        seen = slot_positions(length, slots) >= window_start(state.length, config)[:, None]
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        m = scores.amax(-1, keepdim=True)
        if valid is not None:
            m = m.masked_fill(m == -torch.inf, 0)  # padding may see no key
        b = None if sinks is None else sinks.view(num_key_value_heads, -1, 1)
        if b is not None:
            m = torch.maximum(m, b)
        weights = gamma * torch.exp(scores - m)
        total = weights.sum(-1, keepdim=True)
        if b is not None:
            total = total + gamma * torch.exp(b - m)
        m = m.flatten(1, 2)[:, :, None]
        numerator = (weights @ values.to(dtype)).flatten(1, 2)[:, :, None]
        denominator = total.flatten(1, 2)[:, :, None]
    waiting = state.waiting(config)
    begin, end = summed_keys(state.length, config, waiting), summed_keys(length, config, waiting)

    def folded(end: Tensor, in_place: bool) -> tuple[Tensor, Tensor]:
        """S and z with the keys before `end` [B]."""
        count = waiting or (1 if config.layout == "sliding" else config.window)
        leaving = begin[:, None] + torch.arange(count, device=begin.device)
        index = torch.remainder(leaving, slots)[:, None, :, None]
        return _fold(
            maps,
            state.sums,
            state.norms,
            keys.gather(2, index.expand(-1, num_key_value_heads, -1, keys.shape[3])),
            values.gather(2, index.expand(-1, num_key_value_heads, -1, values.shape[3])),
            (leaving < end[:, None])[:, None, :, None],
            in_place=in_place,
        )

    if spec.has_linear:
        sums, norms = state.sums, state.norms
        if waiting:
            sums, norms = folded(window_start(state.length, config), in_place=False)
        linear, linear_norm = _linear(maps, q, sums, norms, m)
        numerator = linear if numerator is None else numerator + linear
        denominator = linear_norm if denominator is None else denominator + linear_norm
    if numerator is None or denominator is None:  # the window's term of pure linear attention
        out = torch.zeros_like(v[:, :1]).expand(-1, q.shape[1], -1, -1)
    else:
        out = safe_divide(numerator, denominator).to(q.dtype)
    if valid is not None:
        out = out * mask
    if not return_state:
        return out, None

    # Keys that the next query does not see by softmax any more go into the sums: one a step (sliding), a whole block
    # when a block is full (terraced), or, where keys wait, all that may wait.
    # Most steps of a terrace fold nothing. A compiled step has no branches, and folds nothing by the mask.
    if config.layout == "terraced" and not torch.compiler.is_compiling() and not bool((end > begin).any()):
        same = (state.sums, state.norms) if in_place else (state.sums.clone(), state.norms.clone())
        return out, KVState(*same, keys, values, length)
    return out, KVState(*folded(end, in_place), keys, values, length)


def _linear(maps: HybridMaps, q: Tensor, sums: Tensor, norms: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor]:
    """Numerator [B, H, 1, Dv] and denominator [B, H, 1, 1] of the linear term; m: c_n [B, H, 1, 1], if any."""
    phi = maps.q_features(q)
    logits = maps.query_logits(q)
    if logits is None:
        phi = phi * maps.term_weights(phi.dtype).linear_weight[:, None, None]
    elif m is not None:
        phi = phi * bounded_exp(logits[..., None] - m)
    return phi @ sums, phi @ norms[..., None]


def _fold(
    maps: HybridMaps,
    sums: Tensor,
    norms: Tensor,
    keys: Tensor,
    values: Tensor,
    take: Tensor | None = None,
    *,
    in_place: bool,
) -> tuple[Tensor, Tensor]:
    """S and z with the keys [B, K, N, D], in order, added where take [B, 1, N, 1]."""
    phi, g = maps.k_features(keys), maps.decays(keys)
    if take is not None:
        phi = phi * take
    if g is not None:
        if take is not None:
            g = g * take[..., 0]
        total = g.sum(-1, keepdim=True)  # [B, H, 1]
        phi = phi * torch.exp(g.cumsum(-1) - total)[..., None]
        shrink = Tensor.mul_ if in_place else Tensor.mul
        sums, norms = shrink(sums, torch.exp(-total)[..., None]), shrink(norms, torch.exp(-total))
    batch, heads, _, features = phi.shape
    # Query heads of one key head lie together, so that they share its values without a copy.
    grouped = phi.unflatten(1, (keys.shape[1], -1)).permute(0, 1, 2, 4, 3).flatten(2, 3)  # [B, K, G F', N]
    added = (grouped @ values.to(phi.dtype)).view(batch, heads, features, values.shape[3])
    add = Tensor.add_ if in_place else Tensor.add
    return add(sums, added), add(norms, phi.sum(2))
