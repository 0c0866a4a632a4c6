"""Triton kernels of hybrid attention over whole rows, forward. Letters as in `triton_parts`."""

from .triton_parts import (
    dot,
    features_of,
    first_block,
    is_old,
    key_weight,
    linear_weight,
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
    key_logits,  # [B, H, J], with EXP
    start_sums,  # [B, H, N, V] and [B, H, N], or unused
    start_norms,
    count,  # [B]: keys of the row that may enter sums
    sums,  # out [B, H, M + 1, N, V]: at m over the keys before block m; at M over all
    norms,  # out [B, H, M + 1, N]
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    J,
    D,
    V,
    F,
    M,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    HAS_START: tl.constexpr,
    L: tl.constexpr,
    DP: tl.constexpr,
    BV: tl.constexpr,  # columns of v of this program
    FP: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = r // H, r % H
    k += b * k_batch + (h // GROUP) * k_head
    v += b * v_batch + (h // GROUP) * v_head + part * BV
    sums += r * (M + 1) * N * V + part * BV
    norms += r * (M + 1) * N
    columns = V - part * BV
    feature, column = tl.arange(0, N), tl.arange(0, BV)
    place = feature[:, None] * V + column[None, :]
    inside = column[None, :] < columns
    total = tl.zeros([N, BV], tl.float32)
    norm = tl.zeros([N], tl.float32)
    if HAS_START:
        total += tl.load(start_sums + r * N * V + part * BV + place, mask=inside, other=0)
        norm += tl.load(start_norms + r * N + feature)
    limit = tl.load(count + b)
    for m in range(0, M):
        tl.store(sums + m * N * V + place, total, mask=inside)
        if part == 0:
            tl.store(norms + m * N + feature, norm)
        x = tile(k, m * L, k_time, J, D, L, DP)
        phi = features_of(x, weight, bias, h, D, F, MAP, L, DP, FP, PRECISION)
        if EXP:
            phi *= key_weight(key_logits + r * J, m * L, J, L)[:, None]
        phi = tl.where((m * L + tl.arange(0, L) < limit)[:, None], phi, 0)
        y = tile(v, m * L, v_time, J, columns, L, BV).to(tl.float32)
        total += dot(tl.trans(phi), y, PRECISION)
        norm += tl.sum(phi, 0)
    tl.store(sums + M * N * V + place, total, mask=inside)
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
    logits,
    key_logits,
    gamma,  # [H]
    factor,  # [H]
    sums,
    norms,
    out,
    top,  # out [B, H, J]: c_n, the window's largest score (0 where there is no window)
    best,  # out [B, H, J], int32: the first key that has it
    inverse,  # out [B, H, J]: of the denominator; 0 where nothing was summed
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
    scaling,
    softcap,
    J,
    D,
    V,
    F,
    M,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    L: tl.constexpr,
    DP: tl.constexpr,
    VP: tl.constexpr,
    FP: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    m, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = r // H, r % H
    q += b * q_batch + h * q_head
    k += b * k_batch + (h // GROUP) * k_head
    v += b * v_batch + (h // GROUP) * v_head
    n = m * L + tl.arange(0, L)
    first = first_block(m, L, WINDOW, TERRACED)
    x = tile(q, m * L, q_time, J, D, L, DP)

    linear, linear_norm = tl.zeros([L, VP], tl.float32), tl.zeros([L], tl.float32)
    phi_q = features_of(x, q_weight, q_bias, h, D, F, MAP, L, DP, FP, PRECISION)
    at = r * (M + 1) + first
    state = tile(sums + at * N * V, 0, V, N, V, N, VP)
    linear += dot(phi_q, state, PRECISION)
    linear_norm += tl.sum(phi_q * tl.load(norms + at * N + tl.arange(0, N))[None, :], 1)

    window, window_norm = tl.zeros([L, VP], tl.float32), tl.zeros([L], tl.float32)
    largest, index = tl.full([L], float("-inf"), tl.float32), tl.zeros([L], tl.int32)
    last_start = window_start(m * L + L - 1, WINDOW, TERRACED)
    for j in range(first, m + 1):
        i = j * L + tl.arange(0, L)
        y, z = tile(k, j * L, k_time, J, D, L, DP), tile(v, j * L, v_time, J, V, L, VP)
        if HAS_WINDOW:
            scores, _ = window_scores(x, y, n, i, scaling, softcap, SOFTCAP, WINDOW, TERRACED, PRECISION)
            here = tl.max(scores, 1)
            new = tl.maximum(largest, here)
            base = tl.where(new == float("-inf"), 0, new)
            weights, shrink = tl.exp(scores - base[:, None]), tl.exp(largest - base)
            index = tl.where(here > largest, j * L + tl.argmax(scores, 1), index)
            window = window * shrink[:, None] + dot(weights.to(z.dtype), z, PRECISION)
            window_norm = window_norm * shrink + tl.sum(weights, 1)
            largest = new
        if j * L < last_start:
            phi_k = features_of(y, k_weight, k_bias, h, D, F, MAP, L, DP, FP, PRECISION)
            if EXP:
                phi_k *= key_weight(key_logits + r * J, j * L, J, L)[:, None]
            weights = dot(phi_q, tl.trans(phi_k), PRECISION)
            weights = tl.where(is_old(n, i, WINDOW, TERRACED), weights, 0)
            linear += dot(weights, z.to(tl.float32), PRECISION)
            linear_norm += tl.sum(weights, 1)

    largest = tl.where(largest == float("-inf"), 0, largest)
    share = linear_weight(vector(logits + r * J, m * L, J, L), largest, EXP, HAS_WINDOW, L)
    share *= tl.load(factor + h)
    linear, linear_norm = linear * share[:, None], linear_norm * share
    g = tl.load(gamma + h)
    total = g * window_norm + linear_norm
    scale = tl.where(total > 0, 1 / tl.where(total > 0, total, 1), 0)
    result = (g * window + linear) * scale[:, None]
    put(out + b * out_batch + h * out_head, result, m * L, out_time, J, V, L, VP)
    put_vector(top + r * J, largest, m * L, J, L)
    put_vector(best + r * J, index, m * L, J, L)
    put_vector(inverse + r * J, scale, m * L, J, L)
