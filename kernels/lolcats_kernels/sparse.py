"""Hybrid attention with LoLA's sparse cache (arXiv 2505.23666), at inference: constant memory, one token at a time.

The keys that the sums would recall worst are kept unchanged. `tests/kernels/test_sparse.py` has the definition. The
choice of keys depends on all earlier tokens, so a prompt is read token by token too.

Letters: see ../README.md; N kept keys.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .equation import bounded_exp, cap_scores, repeat_heads, safe_divide, window_start
from .maps import HybridMaps
from .spec import CallSpec, common_dtype, compute_dtype
from .state import BatchState, KVState


@dataclass(frozen=True, eq=False)
class SparseState(BatchState):
    """What a layer remembers: sums, norms, the window's keys and values, and length as in `KVState`, and

    kept_keys [B, K, N, D], kept_values [B, K, N, Dv]: in the inputs' dtype. Those that left the window first lie there
        in order, until all slots are full.
    """

    sums: Tensor
    norms: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor
    kept_keys: Tensor
    kept_values: Tensor

    @classmethod
    def empty(cls, maps: HybridMaps, k: Tensor, v: Tensor, size: int) -> SparseState:
        """The state before the first token of k [B, K, T, D] and v [B, K, T, Dv]."""
        plain = KVState.empty(maps, k.shape[0], k.shape[1], value_dim=v.shape[3], dtype=k.dtype, device=k.device)
        kept = (x.new_zeros(*x.shape[:2], size, x.shape[3]) for x in (k, v))
        return cls(plain.sums, plain.norms, plain.keys, plain.values, plain.length, *kept)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    size: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
    initial_state: SparseState | None = None,
) -> tuple[Tensor, SparseState]:
    """Hybrid attention that keeps `size` keys of those that have left the window; other arguments as for
    `hybrid_attention`, which also says what becomes of padding. -> out [B, H, T, Dv] in q's dtype, and the state.

    Raises ValueError for a window of 0, maps with a decay, and a state of another size.
    """
    if not maps.config.window:
        raise ValueError("A sparse cache holds keys that left the window, and this student has no window (window=0).")
    if maps.config.decay:
        raise ValueError("A sparse cache is not for students whose linear term forgets (decay).")
    spec, state = CallSpec(maps.config, scaling, softcap), initial_state
    wanted = q.dtype
    q, k, v = (x.to(common_dtype(q, k, v)) for x in (q, k, v))
    if valid is not None and bool(valid.all()):
        valid = None
    if valid is not None:  # what lies in padding must not matter, not even NaN
        q, k, v = (torch.where(valid[:, None, :, None], x, 0) for x in (q, k, v))
    if state is None:
        state = SparseState.empty(maps, k, v, size)
    elif state.kept_keys.shape[2] != size:
        raise ValueError(f"The state keeps {state.kept_keys.shape[2]} keys, and {size} were asked for.")
    outs = []
    with torch.autocast(q.device.type, enabled=False):
        for t in range(q.shape[2]):
            now = slice(t, t + 1)
            out, after = _step(q[:, :, now], k[:, :, now], v[:, :, now], maps, spec, sinks, state)
            if valid is not None:
                real = valid[:, t]
                pairs = zip(after.tensors(), state.tensors(), strict=True)
                after = SparseState(
                    *(torch.where(real.view(-1, *[1] * (new.ndim - 1)), new, old) for new, old in pairs)
                )
                out = out * real[:, None, None, None]
            outs.append(out)
            state = after
    return torch.cat(outs, 2).to(wanted), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, maps: HybridMaps, spec: CallSpec, sinks: Tensor | None, state: SparseState
) -> tuple[Tensor, SparseState]:
    """One token: q [B, H, 1, D], k [B, K, 1, D], v [B, K, 1, Dv]."""
    config, dtype, num_key_value_heads = maps.config, compute_dtype(q.dtype), k.shape[1]
    begin, end = window_start(state.length, config), window_start(state.length + 1, config)
    slots, size = state.keys.shape[2], state.kept_keys.shape[2]
    slot = torch.remainder(state.length, slots)[:, None, None, None]
    keys = state.keys.scatter(2, slot.expand_as(k), k)
    values = state.values.scatter(2, slot.expand_as(v), v)
    position = KVState(state.sums, state.norms, keys, values, state.length + 1).slot_positions()
    # As many have stayed as have left the window, and no more than there are slots.
    seen = torch.cat([position >= begin[:, None], torch.arange(size, device=q.device) < begin[:, None]], 1)

    query = q.to(dtype).unflatten(1, (num_key_value_heads, -1)).squeeze(3)  # [B, K, G, D]
    exact_keys, exact_values = (
        torch.cat(x, 2).to(dtype) for x in ((keys, state.kept_keys), (values, state.kept_values))
    )
    scores = cap_scores(query @ exact_keys.transpose(-1, -2) * spec.scaling, spec.softcap)
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    m = scores[..., :slots].amax(-1, keepdim=True)
    b = None if sinks is None else sinks.to(dtype).view(num_key_value_heads, -1, 1)
    if b is not None:
        m = torch.maximum(m, b)
    gamma, linear_weight = (x.view(num_key_value_heads, -1, 1) for x in maps.term_weights(dtype))
    weights = gamma * bounded_exp(scores - m)
    total = weights.sum(-1, keepdim=True)
    if b is not None:
        total = total + gamma * torch.exp(b - m)
    logits = maps.query_logits(q)
    if logits is not None:
        linear_weight = bounded_exp(logits.view(*m.shape) - m)
    phi = linear_weight.flatten(-3, -2)[..., None] * maps.q_features(q)  # [B, H, 1, F']
    numerator = (weights @ exact_values).flatten(1, 2)[:, :, None] + phi @ state.sums
    denominator = total.flatten(1, 2)[:, :, None] + phi @ state.norms[..., None]
    out = safe_divide(numerator, denominator).to(q.dtype)

    after = SparseState(state.sums, state.norms, keys, values, state.length + 1, state.kept_keys, state.kept_values)
    if config.layout == "terraced" and not bool((end > begin).any()):
        return out, after
    for i in range(1 if config.layout == "sliding" else config.window):
        after = _leave(maps, after, begin + i, begin + i < end)
    return out, after


def _leave(maps: HybridMaps, state: SparseState, position: Tensor, leaves: Tensor) -> SparseState:
    """The key at `position` [B] leaves the window where leaves [B]: it stays, and what is recalled best does not."""
    slots, size = state.keys.shape[2], state.kept_keys.shape[2]
    index = torch.remainder(position, slots)[:, None, None, None]
    keys, values = (
        torch.cat([kept, x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))], 2)
        for kept, x in ((state.kept_keys, state.keys), (state.kept_values, state.values))
    )  # [B, K, N + 1, ·]: the new one last
    heads = maps.num_heads
    ask = maps.q_features(repeat_heads(keys, heads))
    recalled = safe_divide(ask @ state.sums, ask @ state.norms[..., None])
    error = (recalled - repeat_heads(values, heads).to(recalled.dtype)).square().sum(-1)
    recalled_best = error.unflatten(1, (keys.shape[1], -1)).sum(2).argmin(-1)  # [B, K]
    full = (position >= size)[:, None]
    # The new one takes the place of the one that goes, or a free one; the last place is cut off.
    place = torch.where(leaves[:, None], torch.where(full, recalled_best, position[:, None].clamp(max=size)), size)
    goes = recalled_best[..., None, None]
    going, value = (x.gather(2, goes.expand(-1, -1, -1, x.shape[3])) for x in (keys, values))
    phi = maps.k_features(going) * (leaves & full[:, 0])[:, None, None, None]  # [B, H, 1, F']
    kept_keys, kept_values = (
        x.scatter(2, place[..., None, None].expand(-1, -1, -1, x.shape[3]), x[:, :, size:])[:, :, :size]
        for x in (keys, values)
    )
    sums = state.sums + phi.transpose(-1, -2) * repeat_heads(value, heads).to(phi.dtype)
    return SparseState(
        sums, state.norms + phi.squeeze(2), state.keys, state.values, state.length, kept_keys, kept_values
    )
