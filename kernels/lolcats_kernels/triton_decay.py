"""Triton kernel of the gradient of a decay. Letters: see ../README.md and `triton_parts`.

A key j of the sums shrinks all pairs of a key before j and a query whose window begins after j. So the gradient of g_j
is that of the log of the weights of these pairs, summed, with the other sign. Gradients of such logs are known where
they are sums over all keys of a query (`dlinear`), or over all queries of a key (`dentering`). The sum over the pairs
that all keys of a chunk shrink, which have a key before the chunk, is known by chunk. From there it goes on from key to
key: pairs of the key itself are new, and pairs of queries whose window begins at the key are gone. To go on like this
through a whole row would add up the errors of all its tokens.
"""

from .triton_parts import end_chunk, first_chunk, kept, later_ends, put_vector, tile, tl, triton, vector, window_start


@triton.jit
def decay_gradients(
    decay_logits,
    entered,
    sums,  # of `run_sums`, as are norms; starts and start_norms of `join_segments`
    norms,
    starts,
    start_norms,
    dsums,  # of `run_sums` with REVERSE, as are dnorms; later and later_norms of `join_segments`
    dnorms,
    later,
    later_norms,
    dlinear,  # [B, H, T]: of each query
    dentering,  # [B, H, T]: of each key
    straddling,  # [B, H, M, BANDS]: of the queries of a chunk whose window begins after the beginning of the nth chunk
    # from `first_chunk` on, with the keys before that chunk
    ddecay_logits,  # out [B, H, T]
    T,
    Dv,
    M,
    segment,
    segments,
    BANDS,
    L: tl.constexpr,
    N: tl.constexpr,
    PART_DV: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
):
    c, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    entered += r * (T + 1)
    end = end_chunk(c, M, L, WINDOW, TERRACED)
    sums_at, segment_end = later_ends(end, M, T, segment, L, WINDOW, TERRACED)
    of_start = kept(entered, c // segment * segment * L, c * L, T)
    of_later = kept(entered, sums_at, segment_end, T)
    at, start, feature = r * M + c, r * segments + c // segment, tl.arange(0, N)
    at_later, start_later = r * M + end - 1, r * segments + segments - 1 - (end - 1) // segment

    # Queries from chunk `end` on have windows after this chunk.
    norm = tl.load(norms + at * N + feature) + of_start * tl.load(start_norms + start * N + feature)
    dnorm = tl.load(dnorms + at_later * N + feature) + of_later * tl.load(later_norms + start_later * N + feature)
    products = norm * dnorm
    for dv in range(0, Dv, PART_DV):
        s = tile(sums + at * N * Dv + dv, 0, Dv, N, Dv - dv, N, PART_DV).to(tl.float32)
        s += of_start * tile(starts + start * N * Dv + dv, 0, Dv, N, Dv - dv, N, PART_DV).to(tl.float32)
        ds = tile(dsums + at_later * N * Dv + dv, 0, Dv, N, Dv - dv, N, PART_DV).to(tl.float32)
        ds += of_later * tile(later + start_later * N * Dv + dv, 0, Dv, N, Dv - dv, N, PART_DV).to(tl.float32)
        products += tl.sum(s * ds, 1)
    before = tl.sum(products, 0) * kept(entered, c * L, sums_at, T)

    j = c * L + tl.arange(0, L)
    new = tl.where(j[None, :] < j[:, None], vector(dentering + r * T, c * L, T, L)[None, :], 0)
    shrunk = tl.sum(new, 1)
    for other in range(c, end):
        first = first_chunk(other, L, WINDOW, TERRACED)
        if c * L < window_start(other * L + L - 1, WINDOW, TERRACED):
            before += tl.load(straddling + (r * M + other) * BANDS + c - first)
        begin = window_start(other * L + tl.arange(0, L), WINDOW, TERRACED)[None, :]
        gone = vector(dlinear + r * T, other * L, T, L)[None, :]
        shrunk -= tl.sum(tl.where((begin > c * L) & (begin <= j[:, None]), gone, 0), 1)
    dg = -(before + shrunk)
    put_vector(ddecay_logits + r * T, dg * tl.sigmoid(vector(decay_logits + r * T, c * L, T, L)), c * L, T, L)
