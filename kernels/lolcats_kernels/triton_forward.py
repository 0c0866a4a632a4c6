"""Triton kernels of hybrid attention over whole rows, forward. Letters: see ../README.md and `triton_parts`."""

from .triton_parts import (
    dot,
    features,
    first_chunk,
    is_older,
    key_weight,
    lambda_of,
    put,
    put_vector,
    tile,
    tl,
    triton,
    vector,
    window_scores,
    window_start,
)


@triton.jit
def sum_keys(
    k,
    v,
    weight,
    bias,
    key_logits,  # [B, H, T], with EXP
    initial_sums,  # [B, H, N, Dv] and [B, H, N], or unused
    initial_norms,
    num_summed,  # [B]: keys of the row that may enter sums
    sums,  # out [B, H, M + 1, N, Dv]: at c over the keys before chunk c; at M over all
    norms,  # out [B, H, M + 1, N]
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    T,
    D,
    Dv,
    F,
    M,
    H: tl.constexpr,
    G: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXP: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PART_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):
    r, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = r // H, r % H
    k += b * k_batch + (h // G) * k_head
    v += b * v_batch + (h // G) * v_head + part * PART_DV
    sums += r * (M + 1) * N * Dv + part * PART_DV
    norms += r * (M + 1) * N
    width = Dv - part * PART_DV
    feature, value = tl.arange(0, N), tl.arange(0, PART_DV)
    place = feature[:, None] * Dv + value[None, :]
    inside = value[None, :] < width
    total = tl.zeros([N, PART_DV], tl.float32)
    norm = tl.zeros([N], tl.float32)
    if HAS_INITIAL:
        total += tl.load(initial_sums + r * N * Dv + part * PART_DV + place, mask=inside, other=0)
        norm += tl.load(initial_norms + r * N + feature)
    limit = tl.load(num_summed + b)
    for c in range(0, M):
        tl.store(sums + c * N * Dv + place, total, mask=inside)
        if part == 0:
            tl.store(norms + c * N + feature, norm)
        x = tile(k, c * L, k_time, T, D, L, BLOCK_D)
        phi = features(x, weight, bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, L, BLOCK_D, BLOCK_F, PRECISION)
        if EXP:
            phi *= key_weight(vector(key_logits + r * T, c * L, T, L))[:, None]
        phi = tl.where((c * L + tl.arange(0, L) < limit)[:, None], phi, 0)
        y = tile(v, c * L, v_time, T, width, L, PART_DV).to(tl.float32)
        total += dot(tl.trans(phi), y, PRECISION)
        norm += tl.sum(phi, 0)
    tl.store(sums + M * N * Dv + place, total, mask=inside)
    if part == 0:
        tl.store(norms + M * N + feature, norm)


@triton.jit
def attend(
    q,
    k,
    v,
    q_weight,
    k_weight,
    q_bias,
    k_bias,
    query_logits,
    key_logits,
    gamma,  # [H]
    linear_weight,  # [H]: constant λ
    sinks,  # [H], with HAS_SINKS
    sums,
    norms,
    out,
    m,  # out [B, H, T]: c_n, the window's largest score (0 where there is no window)
    m_index,  # out [B, H, T], int32: the first key that has it; -1 for the sink
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
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PART_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    c, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = r // H, r % H
    q += b * q_batch + h * q_head
    k += b * k_batch + (h // G) * k_head
    v += b * v_batch + (h // G) * v_head
    n = c * L + tl.arange(0, L)
    first = first_chunk(c, L, WINDOW, TERRACED)
    x = tile(q, c * L, q_time, T, D, L, BLOCK_D)

    linear, linear_norm = tl.zeros([L, BLOCK_DV], tl.float32), tl.zeros([L], tl.float32)
    phi_q = features(x, q_weight, q_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, L, BLOCK_D, BLOCK_F, PRECISION)
    at = r * (M + 1) + first
    state = tile(sums + at * N * Dv, 0, Dv, N, Dv, N, BLOCK_DV)
    linear += dot(phi_q, state, PRECISION)
    linear_norm += tl.sum(phi_q * tl.load(norms + at * N + tl.arange(0, N))[None, :], 1)

    window, window_norm = tl.zeros([L, BLOCK_DV], tl.float32), tl.zeros([L], tl.float32)
    m_i, index = tl.full([L], float("-inf"), tl.float32), tl.zeros([L], tl.int32)
    if HAS_SINKS:
        m_i, index, window_norm = tl.zeros([L], tl.float32) + tl.load(sinks + h), index - 1, window_norm + 1
    last_start = window_start(c * L + L - 1, WINDOW, TERRACED)
    for j in range(first, c + 1):
        i = j * L + tl.arange(0, L)
        y, z = tile(k, j * L, k_time, T, D, L, BLOCK_D), tile(v, j * L, v_time, T, Dv, L, BLOCK_DV)
        if HAS_WINDOW:
            scores, _ = window_scores(x, y, n, i, scaling, softcap, SOFTCAP, WINDOW, TERRACED, PRECISION)
            here = tl.max(scores, 1)
            new = tl.maximum(m_i, here)
            base = tl.where(new == float("-inf"), 0, new)
            weights, shrink = tl.exp(scores - base[:, None]), tl.exp(m_i - base)
            index = tl.where(here > m_i, j * L + tl.argmax(scores, 1), index)
            window = window * shrink[:, None] + dot(weights.to(z.dtype), z, PRECISION)
            window_norm = window_norm * shrink + tl.sum(weights, 1)
            m_i = new
        if j * L < last_start:
            phi_k = features(
                y, k_weight, k_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, L, BLOCK_D, BLOCK_F, PRECISION
            )
            if EXP:
                phi_k *= key_weight(vector(key_logits + r * T, j * L, T, L))[:, None]
            weights = dot(phi_q, tl.trans(phi_k), PRECISION)
            weights = tl.where(is_older(n, i, WINDOW, TERRACED), weights, 0)
            linear += dot(weights, z.to(tl.float32), PRECISION)
            linear_norm += tl.sum(weights, 1)

    m_i = tl.where(m_i == float("-inf"), 0, m_i)
    lambda_n = lambda_of(query_logits + r * T, tl.load(linear_weight + h), m_i, c * L, T, EXP, HAS_WINDOW, L)
    linear, linear_norm = linear * lambda_n[:, None], linear_norm * lambda_n
    g = tl.load(gamma + h)
    total = g * window_norm + linear_norm
    scale = tl.where(total > 0, 1 / tl.where(total > 0, total, 1), 0)
    result = (g * window + linear) * scale[:, None]
    put(out + b * out_batch + h * out_head, result, c * L, out_time, T, Dv, L, BLOCK_DV)
    put_vector(m + r * T, m_i, c * L, T, L)
    put_vector(m_index + r * T, index, c * L, T, L)
    put_vector(inv_denominator + r * T, scale, c * L, T, L)
