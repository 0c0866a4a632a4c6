"""The attention of the chunked path for maps with a decay: linear time, one chunk after the other.

Letters: see ../README.md; J keys of a chunk's band, l its queries. Autograd differentiates it. The band of a chunk is
the chunk itself and, where there is a window, the chunk before: softmax sees no key before it. Keys of the band that
are older than a query's window enter its linear term one by one, and those before the band by their sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .equation import bounded_exp, cap_scores, forgetting, key_masks, repeat_heads, safe_divide, window_start
from .maps import HybridMaps
from .rows import RowResults
from .spec import CallSpec, compute_dtype
from .state import KeySums, KVState
from .torch_tiles import chunk_size


class Band(NamedTuple):
    """The keys that a chunk's queries see one by one."""

    k: Tensor  # [B, K, J, D]
    v: Tensor  # [B, H, J, Dv]
    phi_k: Tensor  # [B, H, J, F']
    g: Tensor  # [B, H, J]


def decaying_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    sinks: Tensor | None,
    initial_state: KVState | None,
    num_summed: Tensor | None,
    waiting: int,
) -> RowResults:
    """Rows without gaps, as `attend_in_rows` asks for."""
    dtype, time, size = compute_dtype(q.dtype), q.shape[2], chunk_size(spec.config)
    sums = None if initial_state is None else KeySums(initial_state.sums, initial_state.norms)
    total = sums
    before: Band | None = None
    outs = []
    # Each is cut once: the gradient of a slice is as long as the row.
    for number, (queries, keys, values) in enumerate(zip(*(x.split(size, 2) for x in (q, k, v)), strict=True)):
        g = maps.decays(keys)
        assert g is not None, "maps with a decay"
        own = Band(keys.to(dtype), repeat_heads(values, q.shape[1]).to(dtype), maps.k_features(keys), g)
        band = own if before is None else Band(*(torch.cat(pair, 2) for pair in zip(before, own, strict=True)))
        end = number * size + queries.shape[2]
        position = torch.arange(end - band.k.shape[2], end, device=q.device)
        outs.append(_attend(queries.to(dtype), band, position, maps, spec, sinks, sums))
        # What the next chunk's queries do not see one by one; and at the end of the row, all.
        leaving = band if end == time or not spec.config.window else before
        if leaving is not None and (end < time or num_summed is not None):
            summed = None if num_summed is None else position[: leaving.k.shape[2]] < num_summed[:, None]
            if waiting:  # queries see keys that the state's sums do not hold yet
                total, summed = _fold(leaving, summed, total), None
            sums = _fold(leaving, summed, sums)
        before = own if spec.config.window else None
    return RowResults(torch.cat(outs, 2), None if num_summed is None else total if waiting else sums)


def _attend(
    q: Tensor,
    band: Band,
    position: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    sinks: Tensor | None,
    sums: KeySums | None,
) -> Tensor:
    """Eq. 7 for the last queries of a band: q [B, H, l, D], position [J], sums before the band -> [B, H, l, Dv]."""
    k, v, phi_k, g = band
    own = position[-q.shape[2] :]
    masks = key_masks(own, position, spec.config)
    gamma, factor = (x[:, None, None] for x in maps.term_weights(q.dtype))
    phi_q, logits = maps.q_features(q), maps.query_logits(q)
    weights = q.new_zeros(*q.shape[:3], len(position))
    sink_weight: Tensor | float = 0.0
    if spec.has_window:
        scores = cap_scores(q @ repeat_heads(k, q.shape[1]).transpose(-1, -2) * spec.scaling, spec.softcap)
        scores = scores.masked_fill(~masks.window, -torch.inf)
        m = scores.amax(-1, keepdim=True)
        if sinks is not None:
            m = torch.maximum(m, sinks[:, None, None])
        if logits is not None:
            m = m.detach()  # it cancels
            factor = bounded_exp(logits[..., None] - m)
        weights = gamma * torch.exp(scores - m)
        sink_weight = 0.0 if sinks is None else gamma * torch.exp(sinks[:, None, None] - m)
    initial: tuple[Tensor | float, Tensor | float] = 0.0, 0.0
    if spec.has_linear:
        forgotten = forgetting(g, window_start(own, spec.config) - position[0], masks.older)
        weights = weights + factor * (phi_q @ phi_k.transpose(-1, -2)) * torch.exp(-forgotten.of_keys)
        if sums is not None:
            asked = factor * phi_q * torch.exp(-forgotten.before)[..., None]
            initial = asked @ sums.sums, asked @ sums.norms[..., None]
    return safe_divide(weights @ v + initial[0], weights.sum(-1, keepdim=True) + initial[1] + sink_weight)


def _fold(band: Band, mask: Tensor | None, sums: KeySums | None) -> KeySums:
    """The sums after more keys, in order; of those where mask [B, J], if there is one."""
    phi, g = band.phi_k, band.g
    if mask is not None:
        phi, g = phi * mask[:, None, :, None], g * mask[:, None]
    later = g.flip(-1).cumsum(-1).flip(-1) - g  # the sum over the keys after each
    phi = phi * torch.exp(-later)[..., None]
    added = KeySums(phi.transpose(-1, -2) @ band.v, phi.sum(2))
    if sums is None:
        return added
    kept = torch.exp(-g.sum(-1))[..., None]
    return KeySums(sums.sums * kept[..., None] + added.sums, sums.norms * kept + added.norms)
