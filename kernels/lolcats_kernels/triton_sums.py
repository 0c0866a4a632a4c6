"""Triton kernels of whole rows that forward and backward share: features of keys, and running sums over the chunks of a
row. Letters: see ../README.md and `triton_parts`.

A row's M chunks are cut into segments. `run_sums` walks all segments at the same time. For every chunk it writes
the sums over the chunks before it *within its segment*, and at the end the segment's total; the totals are then added
up from segment to segment by `join_segments`. So the sums over all chunks before one are those of the chunk plus those
of its segment.
"""

from .triton_parts import (
    dot,
    features,
    key_weight,
    operand,
    put,
    slope_logits,
    tile,
    tl,
    triton,
    vector,
)


@triton.jit
def key_features(
    k,
    weight,
    bias,
    slope,  # [H, D], with EXP
    num_summed,  # [B]: keys of the row that may enter sums
    phi_k,  # out [B, H, T, N]
    k_batch,
    k_head,
    k_time,
    T,
    D,
    F,
    H: tl.constexpr,
    G: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXP: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    c, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = r // H, r % H
    x = tile(k + b * k_batch + (h // G) * k_head, c * L, k_time, T, D, L, BLOCK_D)
    phi = features(x, weight, bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, BLOCK_D, BLOCK_F, PRECISION)
    if EXP:
        phi *= key_weight(slope_logits(x, slope, h, D, BLOCK_D))[:, None]
    phi = tl.where((c * L + tl.arange(0, L) < tl.load(num_summed + b))[:, None], phi, 0)
    put(phi_k + r * T * N, phi, c * L, N, T, N, L, N)


@triton.jit
def run_sums(
    a,  # [B, H, T, N]: phi_k; with REVERSE the weighted phi_q
    b,  # [B, K, T, Dv]: v; with REVERSE the gradient of out, [B, H, T, Dv]
    delta,  # [B, H, T], with REVERSE: the gradient of the queries' denominators, with the other sign
    sums,  # out [B, H, M, N, Dv]: at c over the chunks of its segment before it; with REVERSE, after it
    norms,  # out [B, H, M, N]
    totals,  # out [B, H, segments, N, Dv]: of segment s at s; with REVERSE, at segments - 1 - s
    total_norms,  # out [B, H, segments, N]
    b_batch,
    b_head,
    b_time,
    T,
    Dv,
    M,
    segment,
    segments,
    H: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    PART_N: tl.constexpr,
    PART_DV: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    s, r, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first_n, first_dv = part % (N // PART_N) * PART_N, part // (N // PART_N) * PART_DV
    width = Dv - first_dv
    a += r * T * N + first_n
    b += (r // H) * b_batch + (r % H // G) * b_head + first_dv
    feature, value = first_n + tl.arange(0, PART_N), first_dv + tl.arange(0, PART_DV)
    place, inside = feature[:, None] * Dv + value[None, :], value[None, :] < Dv
    total, norm = tl.zeros([PART_N, PART_DV], tl.float32), tl.zeros([PART_N], tl.float32)
    first, last = s * segment, tl.minimum(s * segment + segment, M) - 1
    for step in tl.range(first, last + 1, num_stages=2):
        c = step
        if REVERSE:
            c = first + last - step
        tl.store(sums + (r * M + c) * N * Dv + place, operand(total, PRECISION), mask=inside)
        x = tile(a, c * L, N, T, PART_N, L, PART_N)
        total += dot(tl.trans(x), tile(b, c * L, b_time, T, width, L, PART_DV), PRECISION)
        if first_dv == 0:
            tl.store(norms + (r * M + c) * N + feature, norm)
            rounded = x.to(tl.float32)  # so that numerators and denominators err together
            if REVERSE:
                rounded *= -vector(delta + r * T, c * L, T, L)[:, None]
            norm += tl.sum(rounded, 0)
    at = r * segments + (segments - 1 - s if REVERSE else s)
    tl.store(totals + at * N * Dv + place, total, mask=inside)
    if first_dv == 0:
        tl.store(total_norms + at * N + feature, norm)


@triton.jit
def join_segments(
    totals,  # [rows, segments, SIZE]
    initial,  # [rows, SIZE], with HAS_INITIAL: what comes before the first segment
    starts,  # out [rows, segments, SIZE]: at s over all segments before s
    last,  # out [rows, SIZE]: over all
    SIZE,
    segments,
    HAS_INITIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        total += tl.load(initial + r * SIZE + i, mask=inside, other=0)
    for s in range(0, segments):
        place = (r * segments + s) * SIZE + i
        tl.store(starts + place, total.to(starts.dtype.element_ty), mask=inside)
        total += tl.load(totals + place, mask=inside, other=0)
    tl.store(last + r * SIZE + i, total, mask=inside)
