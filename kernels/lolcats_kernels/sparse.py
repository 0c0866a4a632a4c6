"""Hybrid attention with LoLA's sparse cache (arXiv 2505.23666), at inference: constant memory, prompts block by block.

The keys that the sums would recall worst are kept unchanged. They are chosen for a whole block of keys at once, when
all of it has left the window. Until then its keys wait, and are weighed exactly too. Blocks are counted from the first
token, so it does not matter in which parts a row is read. `tests/kernels/test_sparse.py` has the definition.

Letters: see ../README.md; N kept keys, P tokens of a block, Q queries, J keys that wait or lie in the window. A *place*
is a position counted from the first key that waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from .equation import bounded_exp, cap_scores, key_masks, repeat_heads, window_start
from .hybrid import backend_for
from .maps import HybridMaps
from .spec import QUERY_BOUND, CallSpec, HybridConfig, common_dtype, compute_dtype
from .state import BatchState

BLOCK = 64
TOGETHER = 4096  # queries of all rows, whose choices one Triton kernel makes before their attention
# exp is several times slower where it underflows. e^-80 is nothing beside the window's e^0.
_LEAST_EXPONENT = -80.0


def block_size(config: HybridConfig) -> int:
    """P: `BLOCK`; of terraces the least number of whole ones that has as many tokens."""
    return -(-BLOCK // config.window) * config.window if config.layout == "terraced" else BLOCK


@dataclass(frozen=True, eq=False)
class SparseState(BatchState):
    """What a layer remembers. A value has a 1 as its last number, so that what is summed of values is also summed of
    weights.

    sums [B, H, F', Dv + 1]: S and z, over the keys that were not kept; fp32 (fp64 for fp64 inputs).
    exact [B, K, N + P + w, D + Dv + 1]: keys beside their values, in the inputs' dtype. First those that are kept: all
        that were chosen among, until there are N. From slot N on, those that wait and the window's, at their places.
        Kept ones that are not there yet are 0.
    length [B]: as in `KVState`.
    """

    sums: Tensor
    exact: Tensor
    length: Tensor

    @classmethod
    def empty(cls, maps: HybridMaps, k: Tensor, v: Tensor, size: int) -> SparseState:
        """The state before the first token of k [B, K, T, D] and v [B, K, T, Dv]."""
        slots = size + block_size(maps.config) + maps.config.window
        return cls(
            k.new_zeros(k.shape[0], maps.num_heads, maps.num_features, v.shape[3] + 1, dtype=compute_dtype(k.dtype)),
            k.new_zeros(*k.shape[:2], slots, k.shape[3] + v.shape[3] + 1),
            torch.zeros(k.shape[0], dtype=torch.int64, device=k.device),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.sums, self.exact, self.length


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
    config, wanted = maps.config, q.dtype
    if not config.window:
        raise ValueError("A sparse cache holds keys that left the window, and this student has no window (window=0).")
    if config.decay:
        raise ValueError("A sparse cache is not for students whose linear term forgets (decay).")
    q, k, v = (x.to(common_dtype(q, k, v)) for x in (q, k, v))
    if valid is not None and bool(valid.all()):
        valid = None
    if valid is not None:  # what lies in padding must not matter, not even NaN
        q, k, v = (torch.where(valid[:, None, :, None], x, 0) for x in (q, k, v))
    state = SparseState.empty(maps, k, v, size) if initial_state is None else initial_state
    kept = state.exact.shape[2] - block_size(config) - config.window
    if kept != size:
        raise ValueError(f"The state keeps {kept} keys, and {size} were asked for.")
    if valid is not None and not bool(valid.any()):
        return q.new_zeros(*q.shape[:3], v.shape[3], dtype=wanted), state
    call = _Call(maps, CallSpec(config, scaling, softcap), size, sinks, backend_for(q, v, maps) == "triton")
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        out, after = call.by_blocks(q, torch.cat([k, v, torch.ones_like(v[..., :1])], -1), valid, state)
    out = (out if valid is None else torch.where(valid[:, None, :, None], out, 0)).to(wanted)
    return cast(Tensor, _NoGradients.apply(out, q, k, v, *maps.parameters())), after  # type: ignore[no-untyped-call]


class _NoGradients(torch.autograd.Function):
    """The first of some tensors, and an error where gradients of the others would be computed from it."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *others: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("Attention with a sparse cache has no gradients. Set sparse_cache_size to 0 to train.")


class _Masks(NamedTuple):
    """outside [B or 1, 1, Q, J]: -inf for keys outside the window, else 0; seen [B or 1, 1, Q, N + J] bool."""

    outside: Tensor
    seen: Tensor


@dataclass(frozen=True)
class _Call:
    maps: HybridMaps
    spec: CallSpec
    size: int  # N
    sinks: Tensor | None
    by_triton: bool

    def by_blocks(self, q: Tensor, kv: Tensor, valid: Tensor | None, state: SparseState) -> tuple[Tensor, SparseState]:
        """The queries between two choices at a time: rows of any lengths choose at the same places.

        kv [B, K, T, D + Dv + 1]: k beside v and 1; other arguments and results as for `sparse_attention`.
        """
        config, block, size, time = self.spec.config, block_size(self.spec.config), self.size, q.shape[2]
        live = torch.ones(q.shape[0], time, dtype=torch.bool, device=q.device) if valid is None else valid
        held = state.length - window_start(state.length, config) // block * block
        place, end = held[:, None] + live.cumsum(1) - 1, held + live.sum(1)
        (least, last), slots = torch.stack([end.min(), end.max()]).tolist(), state.exact.shape[2]
        exact = _put(state.exact, kv, size + place, valid, max(slots, size + last))
        first = last - 1 if time == 1 else int(held.min())
        in_order = time == 1 or (valid is None and bool((held == first).all()))
        queries = q if in_order else _put(q[:, :, :0], q, place - first, valid, last - first)

        sums, outs, blocks, begin, masks = state.sums, [], 0, first, None
        together = max(1, TOGETHER // (block * q.shape[0])) if self.by_triton else 1
        while begin < last:
            origin = blocks * block
            choice = origin + block + config.window - (config.layout == "sliding")  # its query sees none of the block
            stop = min(choice, last)
            if masks is None or blocks == 1 or stop < choice:  # all other groups are alike
                position = place if time == 1 else torch.arange(begin, stop, device=q.device)[None]
                masks = self.masks(position - origin, stop - origin)
            count = min((last - begin) // block, together) if blocks else 1
            if count > 1:
                stop = begin + count * block
            query, seen = queries[:, :, begin - first : stop - first], exact[:, :, origin : size + stop]
            if count > 1:
                out, sums = self.by_groups(query, masks, seen, sums, ((end - begin) // block).clamp(0, count))
                outs.append(out)
                begin, blocks = stop, blocks + count
                continue
            outs.append(self.attend(query, masks, seen, sums))
            if stop == choice:
                # Those that are kept take the last of the candidates' slots: in front of the next block.
                candidates = exact[:, :, origin : origin + size + block]
                sums = self.choose(candidates, None if least >= choice else end >= choice, sums)
                blocks += 1
            begin = stop
        out = torch.cat(outs, 2)
        if not in_order:
            out = _take(out, (place - first).clamp(min=0)[:, None])
        if blocks:
            start = window_start(end, config) // block * block
            exact = pad(exact, (0, 0, 0, slots))
            exact = _take(exact, (start[:, None] + torch.arange(slots, device=q.device))[:, None])
        return out, SparseState(sums, exact, state.length + live.sum(1))

    def by_groups(self, q: Tensor, masks: _Masks, exact: Tensor, sums: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Some whole groups of queries at once, by Triton: first all choices, then all attention. -> out, and the sums.

        q [B, H, M P, D]; masks: of one group; exact [B, K, N + J, D + Dv + 1]: the kept ones of the first group, then
        all others that these queries see. chosen [B]: how many of the M choices a row has made. Its last ones become
        those in front of its next block.
        """
        from .triton_sparse import triton_choices  # an optional package

        block, size, rows = block_size(self.spec.config), self.size, torch.arange(q.shape[0], device=q.device)
        count, others = q.shape[2] // block, masks.outside.shape[-1]
        kept, states = triton_choices(exact[:, :, : size + count * block], sums, self.maps, size, block)
        seen = [
            _take(exact, kept[:, :, :count].flatten(2)).unflatten(2, (count, size)),
            exact[:, :, size:].unfold(2, others, block).transpose(-1, -2),
        ]
        groups = torch.cat(seen, 3).transpose(1, 2).flatten(0, 1)
        query = q.unflatten(2, (count, block)).transpose(1, 2).flatten(0, 1)
        out = self.attend(query, masks, groups, states[:, :count].flatten(0, 1))
        slot = chosen[:, None] * block + torch.arange(size, device=q.device)
        exact[_places(exact, slot[:, None])] = _take(exact, kept[rows, :, chosen])
        return out.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3), states[rows, chosen]

    def masks(self, position: Tensor, count: int) -> _Masks:
        """For queries at position [B or 1, Q], and keys at the positions 0 ... count - 1 after the kept ones."""
        window, older = key_masks(position, torch.arange(count, device=position.device), self.spec.config)
        seen = pad(window | older, (self.size, 0), value=True)
        outside = torch.zeros_like(window, dtype=torch.float32).masked_fill_(~window, -torch.inf)
        return _Masks(outside[:, None], seen[:, None])

    def attend(self, q: Tensor, masks: _Masks, exact: Tensor, sums: Tensor) -> Tensor:
        """q [B, H, Q, D] -> [B, H, Q, Dv]. exact [B, K, N + J, D + Dv + 1]: the kept ones, then the others."""
        maps, dtype, key_heads = self.maps, sums.dtype, exact.shape[1]
        keys, values = self.split(exact.to(dtype))
        wanted, q = q.dtype, q.to(dtype)
        query = (q * self.spec.scaling).unflatten(1, (key_heads, -1)).flatten(2, 3)  # [B, K, G Q, D]
        scores = cap_scores(query @ keys.transpose(-1, -2), self.spec.softcap)
        scores = scores.unflatten(2, (-1, q.shape[2])).flatten(1, 2)  # [B, H, Q, N + J]
        m = (scores[..., self.size :] + masks.outside).amax(-1, keepdim=True)
        b = None if self.sinks is None else self.sinks.to(dtype)[:, None, None]
        m = m if b is None else torch.maximum(m, b)
        weights = scores.sub_(m).clamp_(_LEAST_EXPONENT, QUERY_BOUND).exp_().mul_(masks.seen)
        total = weights.unflatten(1, (key_heads, -1)).flatten(2, 3) @ values
        total = total.unflatten(2, (-1, q.shape[2])).flatten(1, 2)  # [B, H, Q, Dv + 1]
        if b is not None:
            total[..., -1:] += torch.exp(b - m)
        gamma, linear_weight = (x[:, None, None] for x in maps.term_weights(dtype))
        logits = maps.query_logits(q)
        if logits is not None:
            linear_weight = bounded_exp(logits[..., None] - m)
        total = total.mul_(gamma) + maps.q_features(q).mul_(linear_weight) @ sums
        return _divided(total).to(wanted)

    def choose(self, candidates: Tensor, complete: Tensor | None, sums: Tensor) -> Tensor:
        """Puts what is kept after a block in the candidates' last slots, in the rows where the block is complete [B];
        None: in all. -> the sums with the others.

        candidates [B, K, N + P, D + Dv + 1]: those kept so far, and the block.
        """
        keys, values = self.split(candidates.to(sums.dtype))
        recalled = _divided(self.maps.q_features(repeat_heads(keys, self.maps.num_heads)) @ sums)
        recalled = recalled.unflatten(1, (keys.shape[1], -1))  # [B, K, G, N + P, Dv]
        error = recalled.sub_(values[:, :, None, :, :-1]).square_().sum((2, 4))
        error.masked_fill_(values[..., -1] == 0, -1)
        order = error.argsort(dim=-1, descending=True, stable=True)
        ranked = _take(candidates, order)
        keys, values = self.split(ranked[:, :, self.size :].to(sums.dtype))
        phi, kept = self.maps.k_features(keys), ranked[:, :, : self.size]
        stays = candidates[:, :, candidates.shape[2] - self.size :]
        if complete is not None:
            phi = phi * complete[:, None, None, None]
            kept = torch.where(complete[:, None, None, None], kept, stays)
        stays.copy_(kept)
        return sums + phi.transpose(-1, -2) @ repeat_heads(values, self.maps.num_heads)

    def split(self, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, and values with their 1."""
        return exact[..., : self.maps.head_dim], exact[..., self.maps.head_dim :]


def _divided(total: Tensor) -> Tensor:
    """[..., Dv + 1] -> [..., Dv], divided by the last number; 0 where nothing was summed."""
    norm = total[..., -1:]
    return total[..., :-1] * torch.where(norm > 0, norm.reciprocal(), 0)


def _put(x: Tensor, new: Tensor, slot: Tensor, valid: Tensor | None, slots: int) -> Tensor:
    """x [B, A, S, C] in so many slots, with new [B, A, T, C] in the slots [B, T], where valid."""
    x = pad(x, (0, 0, 0, slots + (valid is not None) - x.shape[2])).contiguous()
    if valid is not None:  # padding goes to one slot more, which is cut off
        slot = torch.where(valid, slot, slots)
    x[_places(x, slot[:, None])] = new
    return x[:, :, :slots]


def _take(x: Tensor, slot: Tensor) -> Tensor:
    """x [B, A, S, C] -> [B, A, T, C], those in the slots [B, A or 1, T]."""
    return x[_places(x, slot)]


def _places(x: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    row, head = (torch.arange(n, device=x.device) for n in x.shape[:2])
    return row[:, None, None], head[:, None], slot
