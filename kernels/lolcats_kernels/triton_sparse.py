"""The choices of a sparse cache, one block after the other, by one Triton kernel. `sparse` says what is chosen.

Letters: see ../README.md, `sparse` and `triton_parts`; M blocks, S slots. A program takes one key head of one sequence,
with all its query heads. A candidate's *row* is its number among the N + P.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .equation import repeat_heads
from .maps import HybridMaps
from .triton_parts import PRECISIONS, dot, launch, operand_dtype, padded, tl, triton

# The most candidates at a time, and the most of F' and of Dv: larger ones do not fit in registers.
TILE, PART, WARPS = 128, 64, 16


@triton.jit
def candidate(kept, row, m, P, size):
    """The slot of a candidate of block m."""
    old = tl.load(kept + m * size + row, mask=row < size, other=0)
    return tl.where(row < size, old, row + m * P)


@triton.jit
def gathered(x, slot, real, stride, first, size, SIZE: tl.constexpr):
    """x[slot, first : first + SIZE]: [TILE, SIZE]; zeros where it is not real, and beyond its size."""
    i = first + tl.arange(0, SIZE)
    return tl.load(x + slot[:, None] * stride + i[None, :], mask=real[:, None] & (i < size)[None, :], other=0)


@triton.jit
def part(first_f, first_dv, num_features, Dv, PART_F: tl.constexpr, PART_DV: tl.constexpr):
    """Where a part of S lies, beside z, and whether it does."""
    f, dv = (first_f + tl.arange(0, PART_F))[:, None], (first_dv + tl.arange(0, PART_DV))[None, :]
    return f * (Dv + 1) + dv, (f < num_features) & (dv < Dv)


@triton.jit
def choose(
    exact,  # [B, K, S, D + Dv + 1]
    phi_q,  # [B, H, S, F']: of all keys, as if they were queries
    phi_k,  # [B, H, S, F']
    kept,  # [B, K, M + 1, N]: slots that are kept before each block, of which the first are given
    sums,  # [B, M + 1, H, F', Dv + 1]: S and z before each block, of which the first are given
    errors,  # [B, K, N + P] between the steps of a block
    dropped,  # [B, K, P] between the steps of a block
    exact_batch,
    exact_head,
    exact_slot,
    S,
    D,
    Dv,
    num_features,  # F'
    P,
    M,
    size,  # N
    H: tl.constexpr,
    G: tl.constexpr,
    TILE: tl.constexpr,
    PART_DV: tl.constexpr,
    PART_F: tl.constexpr,  # the features that are taken at a time
    PRECISION: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    b, h = r // (H // G), r % (H // G) * G
    exact += b * exact_batch + h // G * exact_head
    phi_q += (b * H + h) * S * num_features
    phi_k += (b * H + h) * S * num_features
    kept += r * (M + 1) * size
    head = num_features * (Dv + 1)
    sums += (b * (M + 1) * H + h) * head
    errors += r * (size + P)
    dropped += r * P
    i, f = tl.arange(0, TILE), tl.arange(0, PART_F)

    for m in range(M):
        for first in range(0, size + P, TILE):
            row = first + i
            real = row < size + P
            slot = candidate(kept, row, m, P, size).to(tl.int64)
            is_key = tl.load(exact + slot * exact_slot + D + Dv, mask=real, other=0) != 0
            error = tl.zeros([TILE], tl.float32)
            for g in range(G):
                for first_dv in range(0, Dv, PART_DV):
                    found, weight = tl.zeros([TILE, PART_DV], tl.float32), tl.zeros([TILE], tl.float32)
                    for first_f in range(0, num_features, PART_F):
                        phi = gathered(
                            phi_q + g * S * num_features, slot, real, num_features, first_f, num_features, PART_F
                        )
                        place, inside = part(first_f, first_dv, num_features, Dv, PART_F, PART_DV)
                        found += dot(phi, tl.load(sums + g * head + place, mask=inside, other=0), PRECISION)
                        feature = first_f + f
                        norm = sums + g * head + feature * (Dv + 1) + Dv
                        norm = tl.load(norm, mask=feature < num_features, other=0)
                        weight += tl.sum(phi.to(tl.float32) * norm[None, :], 1)
                    scale = tl.where(weight > 0, 1 / tl.where(weight > 0, weight, 1), 0)
                    value = gathered(exact + D, slot, real, exact_slot, first_dv, Dv, PART_DV)
                    found = found * scale[:, None] - value.to(tl.float32)
                    error += tl.sum(found * found, 1)
            tl.store(errors + row, tl.where(is_key, error, -1), mask=real)
        tl.debug_barrier()
        for first in range(0, size + P, TILE):
            row = first + i
            real = row < size + P
            error = tl.load(errors + row, mask=real, other=-2)
            rank = tl.zeros([TILE], tl.int32)
            for other_first in range(0, size + P, TILE):
                other_row = other_first + i
                other = tl.load(errors + other_row, mask=other_row < size + P, other=-2)
                equal = (other[None, :] == error[:, None]) & (other_row[None, :] < row[:, None])
                rank += tl.sum(((other[None, :] > error[:, None]) | equal).to(tl.int32), 1)
            slot = candidate(kept, row, m, P, size)
            tl.store(kept + (m + 1) * size + rank, slot, mask=real & (rank < size))
            tl.store(dropped + rank - size, slot, mask=real & (rank >= size))
        tl.debug_barrier()
        for g in range(G):
            before, after = sums + g * head, sums + (H + g) * head
            for first_f in range(0, num_features, PART_F):
                feature = first_f + f
                norm_place = feature * (Dv + 1) + Dv
                for first_dv in range(0, Dv, PART_DV):
                    place, inside = part(first_f, first_dv, num_features, Dv, PART_F, PART_DV)
                    state = tl.load(before + place, mask=inside, other=0)
                    norm = tl.load(before + norm_place, mask=feature < num_features, other=0)
                    for first in range(0, P, TILE):
                        real = first + i < P
                        slot = tl.load(dropped + first + i, mask=real, other=0).to(tl.int64)
                        real &= tl.load(exact + slot * exact_slot + D + Dv, mask=real, other=0) != 0
                        phi = gathered(
                            phi_k + g * S * num_features, slot, real, num_features, first_f, num_features, PART_F
                        )
                        value = gathered(exact + D, slot, real, exact_slot, first_dv, Dv, PART_DV)
                        state += dot(tl.trans(phi), value, PRECISION)
                        norm += tl.sum(phi.to(tl.float32), 0)
                    tl.store(after + place, state, mask=inside)
                    tl.store(after + norm_place, norm, mask=(feature < num_features) & (first_dv == 0))
        sums += H * head
        tl.debug_barrier()


def triton_choices(exact: Tensor, sums: Tensor, maps: HybridMaps, size: int, block: int) -> tuple[Tensor, Tensor]:
    """What is kept of a row, block by block, and the sums with what is not.

    exact [B, K, N + M P, D + Dv + 1]: N keys that are kept, then M blocks, as in `SparseState`.
    sums [B, H, F', Dv + 1]: S and z before the first block.

    Returns the slots in `exact` of the keys that are kept before each block and after the last, [B, K, M + 1, N], and
    the sums there, [B, M + 1, H, F', Dv + 1].
    """
    batch, key_heads, slots, _ = exact.shape
    blocks, value_size = (slots - size) // block, sums.shape[3] - 1
    keys = exact[..., : maps.head_dim].float()
    dtype = operand_dtype(exact.dtype)
    kept = torch.zeros(batch, key_heads, blocks + 1, size, dtype=torch.int32, device=exact.device)
    kept[:, :, 0] = torch.arange(size, device=exact.device)
    states = sums.new_empty(batch, blocks + 1, *sums.shape[1:])
    states[:, 0] = sums
    launch(
        choose,
        (batch * key_heads,),
        WARPS,
        {
            "exact": exact,
            "phi_q": maps.q_features(repeat_heads(keys, maps.num_heads)).to(dtype).contiguous(),
            "phi_k": maps.k_features(keys).to(dtype).contiguous(),
            "kept": kept,
            "sums": states,
            "errors": sums.new_empty(batch, key_heads, size + block),
            "dropped": kept.new_zeros(batch, key_heads, block),
            **{f"exact_{axis}": exact.stride(i) for i, axis in enumerate(("batch", "head", "slot"))},
            **{"S": slots, "D": maps.head_dim, "Dv": value_size, "num_features": maps.num_features, "P": block},
            **{"M": blocks, "size": size, "H": maps.num_heads, "G": maps.num_heads // key_heads},
            **{"TILE": min(padded(size + block), TILE), "PRECISION": PRECISIONS[exact.dtype]},
            **{"PART_DV": min(padded(value_size), PART), "PART_F": min(padded(maps.num_features), PART)},
        },
    )
    return kept, states
