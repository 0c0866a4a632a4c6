"""Hybrid attention for a server: the new tokens of many sequences lie in one flat batch, and their states in slots.

Letters: see ../README.md; A all tokens of the flat batch, R sequences, N slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .equation import summed_keys
from .hybrid import backend_for, hybrid_attention
from .maps import HybridMaps
from .spec import CallSpec, HybridConfig
from .state import KVState, SlotStates


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Sequences with similar numbers of new tokens, as rows of one batch with padding to the right.

    index [R, T] int64: where each row's tokens lie in the flat batch; that of padding may be any token's.
    valid [R, T] bool: False is padding; None if there is none.
    slots [R], length [R] int64: as for `decode_in_slots`, without padding.
    fresh: they all begin here, so what their slots hold is not read.
    """

    index: Tensor
    valid: Tensor | None
    slots: Tensor
    length: Tensor
    fresh: bool


def pad_rows(starts: Tensor, length: Tensor, slots: Tensor) -> list[PaddedRows]:
    """Groups of sequences of which none has more than twice the new tokens of another, those that begin apart.

    starts [R + 1] int: sequence r's new tokens are those from starts[r] to starts[r + 1], at least one; length [R] int:
    tokens that it has seen before; both on the CPU. slots [R] int, on the device of the tokens.
    """
    count = starts.diff().long()
    kind = 2 * torch.log2(count).long() + (length == 0)
    groups = []
    for one in kind.unique():
        rows = (kind == one).nonzero()[:, 0]
        steps = torch.arange(int(count[rows].max()))
        valid = steps < count[rows, None]
        index = torch.minimum(starts[rows, None] + steps, starts[rows + 1, None].long() - 1)
        device = slots.device
        groups.append(
            PaddedRows(
                index.to(device),
                None if bool(valid.all()) else valid.to(device),
                slots[rows.to(device)].long(),
                length[rows].long().to(device),
                fresh=bool(one % 2),
            )
        )
    return groups


@torch.no_grad()
def decode_in_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    states: SlotStates,
    slots: Tensor,
    length: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Hybrid attention of one new token of each sequence, after the states in their slots, which are updated in place.

    q [R, H, D]; k [R, K, D], v [R, K, Dv], after RoPE. slots [R] int: which slot is a sequence's; a negative one is
    padding, which changes nothing and gets 0. length [R] int: tokens that the sequence has seen before this one.
    The other arguments are as for `hybrid_attention`. By Triton there is no synchronisation, so that it can be
    captured in a CUDA graph. -> [R, H, Dv] in q's dtype.
    """
    q, k, v = (x[:, :, None] for x in (q, k, v))
    if (backend_for(q, v, maps) if backend == "auto" else backend) == "triton":
        from .triton_decoding import triton_decode_in_slots  # an optional package

        spec = CallSpec(maps.config, scaling, softcap)
        sinks = None if sinks is None else sinks.float()
        return triton_decode_in_slots(q, k, v, maps, spec, sinks, states, slots, length)[:, :, 0]
    real = (slots >= 0).nonzero()[:, 0]
    slots, length = slots[real].long(), length[real].long()
    found, after = hybrid_attention(
        q[real],
        k[real],
        v[real],
        maps,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        initial_state=_read(states, slots, length, maps.config),
        return_state=True,
        consume_state=True,
        backend=backend,
    )
    _write(states, slots, after)
    out = found.new_zeros(len(q), *found.shape[1:])
    out[real] = found
    return out[:, :, 0]


@torch.no_grad()
def attend_in_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    states: SlotStates,
    rows: PaddedRows,
    out: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Hybrid attention of the new tokens of some sequences, after the states in their slots, updated in place.

    q [A, H, D]; k [A, K, D], v [A, K, Dv]: the flat batch, after RoPE; out [A, H, Dv], written where the rows' tokens
    lie. The other arguments are as for `hybrid_attention`.
    """
    q, k, v = (x[rows.index].transpose(1, 2) for x in (q, k, v))
    found, after = hybrid_attention(
        q,
        k,
        v,
        maps,
        scaling=scaling,
        softcap=softcap,
        sinks=sinks,
        valid=rows.valid,
        initial_state=None if rows.fresh else _read(states, rows.slots, rows.length, maps.config),
        return_state=True,
        waiting=states.keys.shape[2] - maps.config.slots,
        backend=backend,
    )
    _write(states, rows.slots, after)
    found = found.transpose(1, 2)
    if rows.valid is None:
        out[rows.index] = found
    else:
        out[rows.index[rows.valid]] = found[rows.valid]


def _read(states: SlotStates, slots: Tensor, length: Tensor, config: HybridConfig) -> KVState:
    """A copy of the states in slots [R] of sequences that have seen length [R] tokens."""
    sums, norms, keys, values = (x.index_select(0, slots) for x in states)
    state = KVState(sums, norms, keys, values, length)
    # What a slot holds beside the sequence's own is another's, and may be NaN.
    ring = state.keys.shape[2]
    young = length < max(ring, 1)
    if bool(young.any()):
        fresh = summed_keys(length, config, state.waiting(config)) == 0
        state.sums[fresh], state.norms[fresh] = 0, 0
        unwritten = torch.arange(ring, device=length.device) >= length[:, None]
        for x in (state.keys, state.values):
            x.masked_fill_(unwritten[:, None, :, None], 0)
    return state


def _write(states: SlotStates, slots: Tensor, after: KVState) -> None:
    for held, new in zip(states, after.tensors(), strict=False):  # but for the length
        held.index_copy_(0, slots, new)
