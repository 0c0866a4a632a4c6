"""Triton kernel of hybrid attention over whole rows, forward. Letters: see ../README.md and `triton_parts`."""

from .triton_parts import (
    dot,
    features,
    first_chunk,
    forgotten,
    has_older,
    is_older,
    kept,
    kept_of,
    lambda_of,
    operand,
    put,
    put_vector,
    tile,
    tl,
    triton,
    window_scores,
    window_start,
)


@triton.jit
def attend(
    q,
    k,
    v,
    q_weight,
    q_bias,
    q_slope,  # [H, D], with EXP
    linear_logit,  # [H], with EXP
    gamma,  # [H]
    linear_weight,  # [H]: constant λ
    sinks,  # [H], with HAS_SINKS
    phi_k,  # of `key_features`
    sums,  # of `run_sums`, as are norms
    norms,
    starts,  # [B, H, segments, N, Dv]: at s over all segments before s
    start_norms,  # [B, H, segments, N]
    entered,  # [B, H, T + 1], with DECAY, see `forgotten`
    out,
    m,  # out [B, H, T]: c_n, the window's largest score (0 where there is no window)
    m_index,  # out [B, H, T], int32: the first key that has it; -1 for the sink. Not with EXP
    inv_denominator,  # out [B, H, T]: 1 / denominator; 0 where nothing was summed
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    out_batch,
    out_head,
    out_time,
    T,
    D,
    Dv,
    F,
    M,
    segment,
    segments,
    H: tl.constexpr,
    G: tl.constexpr,
    scaling,
    softcap,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
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
    PART_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    c, r, first_dv = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * PART_DV
    b, h = r // H, r % H
    k += b * k_batch + (h // G) * k_head
    v += b * v_batch + (h // G) * v_head + first_dv
    phi_k += r * T * N
    width = Dv - first_dv
    n = c * L + tl.arange(0, L)
    first = first_chunk(c, L, WINDOW, TERRACED)
    x = tile(q + b * q_batch + h * q_head, c * L, q_time, T, D, L, BLOCK_D)

    # The largest score comes first: then λ is known, and both terms are one sum.
    m_i, index = tl.full([L], float("-inf"), tl.float32), tl.zeros([L], tl.int32)
    if HAS_SINKS:
        m_i, index = tl.zeros([L], tl.float32) + tl.load(sinks + h), index - 1
    if HAS_WINDOW:
        for j in range(first, c + 1):
            products = dot(x, tl.trans(tile(k, j * L, k_time, T, D, L, BLOCK_D)), PRECISION)
            i = j * L + tl.arange(0, L)
            scores = window_scores(products, n[:, None], i[None, :], scaling, softcap, SOFTCAP, WINDOW, TERRACED)[0]
            here = tl.max(scores, 1)
            if not EXP:
                index = tl.where(here > m_i, j * L + tl.argmax(scores, 1), index)
            m_i = tl.maximum(m_i, here)
    m_i = tl.where(m_i == float("-inf"), 0, m_i)

    phi_q = features(x, q_weight, q_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, BLOCK_D, BLOCK_F, PRECISION)
    lambda_n = lambda_of(x, m_i, linear_weight, linear_logit, q_slope, h, D, EXP, HAS_WINDOW, BLOCK_D)[0]
    weighted_q = operand(phi_q * lambda_n[:, None], PRECISION)
    at, start, feature = r * M + first, r * segments + first // segment, tl.arange(0, N)
    result = dot(weighted_q, tile(starts + start * N * Dv + first_dv, 0, Dv, N, width, N, PART_DV), PRECISION)
    norm = tl.load(start_norms + start * N + feature)
    if DECAY:
        entered += r * (T + 1)
        of_start = kept(entered, first // segment * segment * L, first * L, T)
        result *= of_start
        norm *= of_start
    result += dot(weighted_q, tile(sums + at * N * Dv + first_dv, 0, Dv, N, width, N, PART_DV), PRECISION)
    norm += tl.load(norms + at * N + feature)
    total = tl.sum(weighted_q.to(tl.float32) * norm[None, :], 1)
    if DECAY:
        query = forgotten(entered, first * L, window_start(n, WINDOW, TERRACED), T)
        result *= tl.exp(-query)[:, None]
        total *= tl.exp(-query)

    g = tl.load(gamma + h)
    if HAS_SINKS:
        total += g * tl.exp(tl.load(sinks + h) - m_i)
    for j in range(first, c + 1):
        i = j * L + tl.arange(0, L)
        weights = tl.zeros([L, L], tl.float32)
        if HAS_WINDOW:
            products = dot(x, tl.trans(tile(k, j * L, k_time, T, D, L, BLOCK_D)), PRECISION)
            scores = window_scores(products, n[:, None], i[None, :], scaling, softcap, SOFTCAP, WINDOW, TERRACED)[0]
            weights += g * tl.exp(scores - m_i[:, None])
        if has_older(c, j, L, WINDOW, TERRACED):
            linear = dot(weighted_q, tl.trans(tile(phi_k, j * L, N, T, N, L, N)), PRECISION)
            if DECAY:
                linear *= kept_of(forgotten(entered, first * L, i + 1, T)[None, :], query[:, None])
            weights += tl.where(is_older(n[:, None], i[None, :], WINDOW, TERRACED), linear, 0)
        total += tl.sum(weights, 1)
        result += dot(weights, tile(v, j * L, v_time, T, width, L, PART_DV), PRECISION)

    scale = tl.where(total > 0, 1 / tl.where(total > 0, total, 1), 0)
    result *= scale[:, None]
    put(out + b * out_batch + h * out_head + first_dv, result, c * L, out_time, T, width, L, PART_DV)
    if first_dv == 0:
        put_vector(m + r * T, m_i, c * L, T, L)
        put_vector(inv_denominator + r * T, scale, c * L, T, L)
        if not EXP:
            put_vector(m_index + r * T, index, c * L, T, L)
