"""Triton kernels of whole rows that forward and backward share: features of keys, and running sums over the chunks of a
row. Letters: see ../README.md and `triton_parts`.

A row's M chunks are cut into segments. `run_sums` walks all segments at the same time. For every chunk it writes
the sums over the chunks before it *within its segment*, and at the end the segment's total; the totals are then added
up from segment to segment by `join_segments`. So the sums over all chunks before one are those of the chunk plus those
of its segment.

With a decay, sums have a key at which they are taken: later keys make them smaller. Those of keys are taken at the
first key of their chunk. Those of queries, which run from the end, are taken at the end of the sums that their chunk
sees. What is added up was taken elsewhere, and shrinks by what was forgotten in between.
"""

from .triton_parts import (
    dot,
    features,
    kept,
    key_weight,
    operand,
    put,
    put_vector,
    slope_logits,
    sums_end,
    tile,
    tl,
    triton,
    vector,
    window_start,
)


@triton.jit
def key_features(
    k,
    weight,
    bias,
    slope,  # [H, D], with EXP
    decay_slope,  # [H, D], with DECAY
    decay_bias,  # [H], with DECAY
    num_summed,  # [B]: of how many first keys the row's state has the sums
    waiting,  # so many more may be older than some query's window
    phi_k,  # out [B, H, T, N]
    decay_logits,  # out [B, H, T], with DECAY: b + a . k; -inf for keys that enter no sums
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
    DECAY: tl.constexpr,
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
    enters = c * L + tl.arange(0, L) < tl.load(num_summed + b) + waiting
    phi = tl.where(enters[:, None], phi, 0)
    put(phi_k + r * T * N, phi, c * L, N, T, N, L, N)
    if DECAY:
        logits = slope_logits(x, decay_slope, h, D, BLOCK_D) + tl.load(decay_bias + h)
        put_vector(decay_logits + r * T, tl.where(enters, logits, float("-inf")), c * L, T, L)


@triton.jit
def run_sums(
    a,  # [B, H, T, N]: phi_k; with REVERSE the weighted phi_q
    b,  # [B, K, T, Dv]: v; with REVERSE the gradient of out, [B, H, T, Dv]
    delta,  # [B, H, T], with REVERSE: the gradient of the queries' denominators, with the other sign
    entered,  # [B, H, T + 1], with DECAY, see `forgotten`
    num_summed,  # [B], without REVERSE: over how many first keys
    sums,  # out [B, H, M, N, Dv]: at c over the chunks of its segment before it; with REVERSE, after it
    norms,  # out [B, H, M, N]
    totals,  # out [B, H, segments, N, Dv]: of segment s at s; with REVERSE, at segments - 1 - s
    total_norms,  # out [B, H, segments, N]
    shrinks,  # out [B, H, segments], with DECAY: what the segment leaves of the sums before it; in the order of totals
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
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
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
    row = entered + r * (T + 1)
    # Keys that wait lie in the last chunk that a query sees by its own keys. So they matter to the total alone.
    summed = T
    if not REVERSE:
        summed = tl.load(num_summed + r // H).to(tl.int32)
    for step in tl.range(first, last + 1, num_stages=2):
        c = step
        if REVERSE:
            c = first + last - step
        tl.store(sums + (r * M + c) * N * Dv + place, operand(total, PRECISION), mask=inside)
        t = c * L + tl.arange(0, L)
        x = tile(a, c * L, N, summed, PART_N, L, PART_N)
        if DECAY:
            if REVERSE:
                begin, end = sums_end(c, M, T, L, WINDOW, TERRACED), sums_end(c + 1, M, T, L, WINDOW, TERRACED)
                own = kept(row, begin, window_start(t, WINDOW, TERRACED), T)
            else:
                begin, end = tl.minimum(c * L, summed), tl.minimum(c * L + L, summed)
                own = kept(row, tl.minimum(t + 1, end), end, T)
            x = operand(x.to(tl.float32) * own[:, None], PRECISION)
            shrink = kept(row, begin, end, T)
            total *= shrink
        total += dot(tl.trans(x), tile(b, c * L, b_time, T, width, L, PART_DV), PRECISION)
        if first_dv == 0:
            tl.store(norms + (r * M + c) * N + feature, norm)
            rounded = x.to(tl.float32)  # so that numerators and denominators err together
            if REVERSE:
                rounded *= -vector(delta + r * T, c * L, T, L)[:, None]
            if DECAY:
                norm *= shrink
            norm += tl.sum(rounded, 0)
    at = r * segments + (segments - 1 - s if REVERSE else s)
    tl.store(totals + at * N * Dv + place, total, mask=inside)
    if first_dv == 0:
        tl.store(total_norms + at * N + feature, norm)
    if DECAY:
        begin, end = tl.minimum(first * L, summed), tl.minimum(last * L + L, summed)
        if REVERSE:
            begin, end = sums_end(first, M, T, L, WINDOW, TERRACED), sums_end(last + 1, M, T, L, WINDOW, TERRACED)
        if part == 0:
            tl.store(shrinks + at, kept(row, begin, end, T))


@triton.jit
def join_segments(
    totals,  # [rows, segments, SIZE]
    initial,  # [rows, SIZE], with HAS_INITIAL: what comes before the first segment
    starts,  # out [rows, segments, SIZE]: at s over all segments before s
    last,  # out [rows, SIZE]: over all
    shrinks,  # [rows, segments], with DECAY: what a segment leaves of what comes before it
    SIZE,
    segments,
    HAS_INITIAL: tl.constexpr,
    DECAY: tl.constexpr,
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
        if DECAY:
            total *= tl.load(shrinks + r * segments + s)
        total += tl.load(totals + place, mask=inside, other=0)
    tl.store(last + r * SIZE + i, total, mask=inside)
