"""Triton kernels of hybrid attention over whole rows, backward. Letters: see ../README.md and `triton_parts`.

With p_ni, the weight of key i for query n after the division, and dy, the gradient of out: p_ni has the gradient
dy_n . v_i - delta_n, where delta_n = dy_n . y_n.
"""

from .triton_parts import (
    KEY_BOUND,
    dot,
    end_chunk,
    features,
    features_backward,
    first_chunk,
    forgotten,
    has_older,
    head_slope,
    indices,
    is_older,
    kept,
    kept_of,
    key_weight,
    lambda_of,
    later_ends,
    put,
    put_vector,
    slope_logits,
    tile,
    tl,
    triton,
    vector,
    window_scores,
    window_start,
)


@triton.jit
def backward_queries(
    q,
    k,
    v,
    q_weight,
    q_bias,
    q_slope,
    linear_logit,
    gamma,
    linear_weight,
    phi_k,
    sums,
    norms,
    starts,
    start_norms,
    entered,
    out,
    m,
    m_index,
    inv_denominator,
    grad,
    delta,  # out [B, H, T]
    weighted_q,  # out [B, H, T, N]: the queries' features times λ / denominator
    dlog_weight,  # out [B, H, T]: the gradient of log λ; with EXP that of l + u . q, 0 at its bound
    dlinear,  # out [B, H, T], with DECAY: the gradient of the log of the linear term's weights
    straddling,  # out [B, H, M, BANDS], with DECAY: see `decay_gradients`
    dq,  # out [B, H, T, D], or unused
    dy_q,  # out [B, H, T, F]: gradient of q W + b, or unused
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
    grad_batch,
    grad_head,
    grad_time,
    T,
    D,
    Dv,
    F,
    M,
    segment,
    segments,
    BANDS,
    H: tl.constexpr,
    G: tl.constexpr,
    scaling,
    softcap,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXP: tl.constexpr,
    DECAY: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PART_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_MAP: tl.constexpr,
):
    c, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = r // H, r % H
    k += b * k_batch + (h // G) * k_head
    v += b * v_batch + (h // G) * v_head
    grad += b * grad_batch + h * grad_head
    n = c * L + tl.arange(0, L)
    first = first_chunk(c, L, WINDOW, TERRACED)
    x = tile(q + b * q_batch + h * q_head, c * L, q_time, T, D, L, BLOCK_D)
    dy = tile(grad, c * L, grad_time, T, Dv, L, BLOCK_DV)
    y = tile(out + b * out_batch + h * out_head, c * L, out_time, T, Dv, L, BLOCK_DV)
    delta_n = tl.sum(dy.to(tl.float32) * y.to(tl.float32), 1)
    m_i, scale = vector(m + r * T, c * L, T, L), vector(inv_denominator + r * T, c * L, T, L)

    phi_q = features(x, q_weight, q_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, BLOCK_D, BLOCK_F, PRECISION)
    lambda_n, inside = lambda_of(x, m_i, linear_weight, linear_logit, q_slope, h, D, EXP, HAS_WINDOW, BLOCK_D)
    share = lambda_n * scale
    put(weighted_q + r * T * N, phi_q * share[:, None], c * L, N, T, N, L, N)
    put_vector(delta + r * T, delta_n, c * L, T, L)

    at, start, feature = r * M + first, r * segments + first // segment, tl.arange(0, N)
    norm = tl.load(start_norms + start * N + feature)
    if DECAY:
        entered += r * (T + 1)
        of_start = kept(entered, first // segment * segment * L, first * L, T)
        norm *= of_start
        query = forgotten(entered, first * L, window_start(n, WINDOW, TERRACED), T)
    norm += tl.load(norms + at * N + feature)
    dphi = -delta_n[:, None] * norm[None, :]
    for dv in range(0, Dv, PART_DV):
        part = tile(grad + dv, c * L, grad_time, T, Dv - dv, L, PART_DV)
        dphi += dot(part, tl.trans(tile(sums + at * N * Dv + dv, 0, Dv, N, Dv - dv, N, PART_DV)), PRECISION)
        more = dot(part, tl.trans(tile(starts + start * N * Dv + dv, 0, Dv, N, Dv - dv, N, PART_DV)), PRECISION)
        if DECAY:
            more *= of_start
        dphi += more
    if DECAY:
        dphi *= tl.exp(-query)[:, None]
    last_start = window_start(c * L + L - 1, WINDOW, TERRACED)
    for j in range(first, tl.cdiv(last_start, L)):
        i = j * L + tl.arange(0, L)
        dweights = dot(dy, tl.trans(tile(v, j * L, v_time, T, Dv, L, BLOCK_DV)), PRECISION) - delta_n[:, None]
        if DECAY:
            before = tl.where(window_start(n, WINDOW, TERRACED) > j * L, tl.sum(phi_q * dphi, 1) * share, 0)
            tl.store(straddling + (r * M + c) * BANDS + j - first, tl.sum(before, 0))
            dweights *= kept_of(forgotten(entered, first * L, i + 1, T)[None, :], query[:, None])
        dweights = tl.where(is_older(n[:, None], i[None, :], WINDOW, TERRACED), dweights, 0)
        dphi += dot(dweights, tile(phi_k + r * T * N, j * L, N, T, N, L, N), PRECISION)
    dphi *= share[:, None]
    dlog_n = tl.sum(phi_q * dphi, 1)
    if DECAY:
        put_vector(dlinear + r * T, dlog_n, c * L, T, L)
    if EXP:
        dlog_n = tl.where(inside, dlog_n, 0)
    put_vector(dlog_weight + r * T, dlog_n, c * L, T, L)
    if NEED_X or NEED_MAP:
        dx, dy_n = features_backward(phi_q, dphi, q_weight, h, D, F, GRADIENT, HAS_WEIGHT, BLOCK_D, BLOCK_F, PRECISION)
        if NEED_MAP:
            put(dy_q + r * T * F, dy_n, c * L, F, T, F, L, BLOCK_F)
        if NEED_X:
            if EXP:
                dx += dlog_n[:, None] * head_slope(q_slope, h, D, BLOCK_D)
            if HAS_WINDOW:
                scale *= tl.load(gamma + h)
                # c_n shifts the window's weights only, so they pass a gradient to the key that has it: as all weights'
                # gradients sum to 0, the linear term's. With "exp" c_n cancels. Scores of other tiles may round
                # otherwise, so the key is not looked for again.
                index = n
                if not EXP:
                    index = indices(m_index + r * T, c * L, T, L)
                for j in range(first, c + 1):
                    i = j * L + tl.arange(0, L)
                    keys = tile(k, j * L, k_time, T, D, L, BLOCK_D)
                    products = dot(x, tl.trans(keys), PRECISION)
                    scores, slope = window_scores(
                        products, n[:, None], i[None, :], scaling, softcap, SOFTCAP, WINDOW, TERRACED
                    )
                    dweights = dot(dy, tl.trans(tile(v, j * L, v_time, T, Dv, L, BLOCK_DV)), PRECISION)
                    dscores = (dweights - delta_n[:, None]) * scale[:, None] * tl.exp(scores - m_i[:, None])
                    if not EXP:
                        dscores += tl.where(i[None, :] == index[:, None], dlog_n[:, None], 0)
                    dx += dot(dscores * scaling * slope, keys, PRECISION)
            put(dq + r * T * D, dx, c * L, D, T, D, L, BLOCK_D)


@triton.jit
def backward_keys(
    q,
    k,
    v,
    k_weight,
    k_bias,
    k_slope,
    gamma,
    m,
    m_index,
    inv_denominator,
    grad,
    delta,
    weighted_q,
    dlog_weight,
    dsums,  # of `run_sums` with REVERSE, as are dnorms
    dnorms,
    later,  # [B, H, segments, N, Dv]: at segments - 1 - s over all segments after s
    later_norms,  # [B, H, segments, N]
    entered,
    num_summed,
    dk,  # out [B, K, T, D], or unused
    dy_k,  # out [B, H, T, F]: gradient of k W + b, or unused
    dkey_logits,  # out [B, H, T]: gradient of w . k, with EXP
    dentering,  # out [B, H, T], with DECAY: the gradient of the log of the key's features
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    v_batch,
    v_head,
    v_time,
    grad_batch,
    grad_head,
    grad_time,
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
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXP: tl.constexpr,
    DECAY: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PART_DV: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_MAP: tl.constexpr,
):
    j, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head = pair // (H // G), pair % (H // G)
    v += b * v_batch + head * v_head
    i = j * L + tl.arange(0, L)
    end = end_chunk(j, M, L, WINDOW, TERRACED)
    x = tile(k + b * k_batch + head * k_head, j * L, k_time, T, D, L, BLOCK_D)
    values = tile(v, j * L, v_time, T, Dv, L, BLOCK_DV)
    summed = (i < tl.load(num_summed + b))[:, None]
    if DECAY:
        sums_at, segment_end = later_ends(end, M, T, segment, L, WINDOW, TERRACED)
    dx_sum = tl.zeros([L, BLOCK_D], tl.float32)
    for member in range(0, G):
        h = head * G + member
        r = b * H + h
        g = tl.load(gamma + h)
        at, start, feature = r * M + end - 1, r * segments + segments - 1 - (end - 1) // segment, tl.arange(0, N)
        norm = tl.load(later_norms + start * N + feature)
        if DECAY:
            asked = entered + r * (T + 1)
            of_later = kept(asked, sums_at, segment_end, T)
            norm *= of_later
            key = forgotten(asked, j * L, i + 1, T)
        norm += tl.load(dnorms + at * N + feature)
        dphi = tl.zeros([L, N], tl.float32) + norm[None, :]
        for dv in range(0, Dv, PART_DV):
            part = tile(v + dv, j * L, v_time, T, Dv - dv, L, PART_DV)
            dphi += dot(part, tl.trans(tile(dsums + at * N * Dv + dv, 0, Dv, N, Dv - dv, N, PART_DV)), PRECISION)
            more = dot(part, tl.trans(tile(later + start * N * Dv + dv, 0, Dv, N, Dv - dv, N, PART_DV)), PRECISION)
            if DECAY:
                more *= of_later
            dphi += more
        if DECAY:
            dphi *= kept(asked, i + 1, sums_at, T)[:, None]
        dphi = tl.where(summed, dphi, 0)
        for c in range(j, end):
            older = has_older(c, j, L, WINDOW, TERRACED)
            if older or (HAS_WINDOW and NEED_X):
                n = c * L + tl.arange(0, L)
                dy = tile(grad + b * grad_batch + h * grad_head, c * L, grad_time, T, Dv, L, BLOCK_DV)
                dweights = dot(values, tl.trans(dy), PRECISION) - vector(delta + r * T, c * L, T, L)[None, :]
                if HAS_WINDOW and NEED_X:
                    queries = tile(q + b * q_batch + h * q_head, c * L, q_time, T, D, L, BLOCK_D)
                    products = dot(x, tl.trans(queries), PRECISION)
                    scores, slope = window_scores(
                        products, n[None, :], i[:, None], scaling, softcap, SOFTCAP, WINDOW, TERRACED
                    )
                    dscores = dweights * tl.exp(scores - vector(m + r * T, c * L, T, L)[None, :])
                    dscores *= g * vector(inv_denominator + r * T, c * L, T, L)[None, :]
                    if not EXP:
                        at_top = i[:, None] == indices(m_index + r * T, c * L, T, L)[None, :]
                        dscores += tl.where(at_top, vector(dlog_weight + r * T, c * L, T, L)[None, :], 0)
                    dx_sum += dot(dscores * scaling * slope, queries, PRECISION)
                if older:
                    dweights = tl.where(is_older(n[None, :], i[:, None], WINDOW, TERRACED), dweights, 0)
                    if DECAY:
                        query = forgotten(asked, j * L, window_start(n, WINDOW, TERRACED), T)
                        dweights *= kept_of(key[:, None], query[None, :])
                    dphi += dot(dweights, tile(weighted_q + r * T * N, c * L, N, T, N, L, N), PRECISION)
        phi = features(x, k_weight, k_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, BLOCK_D, BLOCK_F, PRECISION)
        if EXP:
            logits = slope_logits(x, k_slope, h, D, BLOCK_D)
            dphi *= key_weight(logits)[:, None]
            dlogits = tl.where(tl.abs(logits) < KEY_BOUND, tl.sum(phi * dphi, 1), 0)
            put_vector(dkey_logits + r * T, dlogits, j * L, T, L)
            dx_sum += dlogits[:, None] * head_slope(k_slope, h, D, BLOCK_D)
        if DECAY:
            put_vector(dentering + r * T, tl.sum(phi * dphi, 1), j * L, T, L)
        dx, dy_i = features_backward(phi, dphi, k_weight, h, D, F, GRADIENT, HAS_WEIGHT, BLOCK_D, BLOCK_F, PRECISION)
        dx_sum += dx
        if NEED_MAP:
            put(dy_k + r * T * F, dy_i, j * L, F, T, F, L, BLOCK_F)
    if NEED_X:
        put(dk + pair * T * D, dx_sum, j * L, D, T, D, L, BLOCK_D)


@triton.jit
def backward_values(
    q,
    k,
    gamma,
    m,
    inv_denominator,
    grad,
    phi_k,
    weighted_q,
    dsums,
    later,
    entered,
    dv,  # out [B, K, T, Dv]
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    grad_batch,
    grad_head,
    grad_time,
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
    DECAY: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PART_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    j, pair, first_dv = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * PART_DV
    b, head, width = pair // (H // G), pair % (H // G), Dv - first_dv
    i = j * L + tl.arange(0, L)
    end = end_chunk(j, M, L, WINDOW, TERRACED)
    x = tile(k + b * k_batch + head * k_head, j * L, k_time, T, D, L, BLOCK_D)
    total = tl.zeros([L, PART_DV], tl.float32)
    if DECAY:
        sums_at, segment_end = later_ends(end, M, T, segment, L, WINDOW, TERRACED)
    for member in range(0, G):
        h = head * G + member
        r = b * H + h
        g = tl.load(gamma + h)
        phi = tile(phi_k + r * T * N, j * L, N, T, N, L, N)
        at, start = (
            (r * M + end - 1) * N * Dv + first_dv,
            (r * segments + segments - 1 - (end - 1) // segment) * N * Dv + first_dv,
        )
        if DECAY:
            asked = entered + r * (T + 1)
            key = forgotten(asked, j * L, i + 1, T)
            of_sums = dot(phi, tile(later + start, 0, Dv, N, width, N, PART_DV), PRECISION)
            of_sums *= kept(asked, sums_at, segment_end, T)
            of_sums += dot(phi, tile(dsums + at, 0, Dv, N, width, N, PART_DV), PRECISION)
            total += of_sums * kept(asked, i + 1, sums_at, T)[:, None]
        else:
            total += dot(phi, tile(dsums + at, 0, Dv, N, width, N, PART_DV), PRECISION)
            total += dot(phi, tile(later + start, 0, Dv, N, width, N, PART_DV), PRECISION)
        for c in range(j, end):
            n = c * L + tl.arange(0, L)
            weights = tl.zeros([L, L], tl.float32)
            if HAS_WINDOW:
                queries = tile(q + b * q_batch + h * q_head, c * L, q_time, T, D, L, BLOCK_D)
                products = dot(x, tl.trans(queries), PRECISION)
                scores = window_scores(products, n[None, :], i[:, None], scaling, softcap, SOFTCAP, WINDOW, TERRACED)[0]
                weights += tl.exp(scores - vector(m + r * T, c * L, T, L)[None, :])
                weights *= g * vector(inv_denominator + r * T, c * L, T, L)[None, :]
            if has_older(c, j, L, WINDOW, TERRACED):
                linear = dot(phi, tl.trans(tile(weighted_q + r * T * N, c * L, N, T, N, L, N)), PRECISION)
                if DECAY:
                    query = forgotten(asked, j * L, window_start(n, WINDOW, TERRACED), T)
                    linear *= kept_of(key[:, None], query[None, :])
                weights += tl.where(is_older(n[None, :], i[:, None], WINDOW, TERRACED), linear, 0)
            dy = tile(grad + b * grad_batch + h * grad_head + first_dv, c * L, grad_time, T, width, L, PART_DV)
            total += dot(weights, dy, PRECISION)
    put(dv + pair * T * Dv + first_dv, total, j * L, Dv, T, width, L, PART_DV)


@triton.jit
def map_gradients(
    x,  # q or k
    dy,  # [B, H, T, F]: gradient of x W + b
    dlogits,  # [B, H, T]: gradient of the slope's logits, with EXP
    dweight,  # out [B, H, segments, D, F]: of one segment, as are the next two
    dbias,  # out [B, H, segments, F]
    dslope,  # out [B, H, segments, D]
    x_batch,
    x_head,
    x_time,
    T,
    D,
    F,
    M,
    segment,
    H: tl.constexpr,
    G: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXP: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART_F: tl.constexpr,
    PRECISION: tl.constexpr,
):
    s, r, first_f = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2) * PART_F
    x += (r // H) * x_batch + (r % H // G) * x_head
    weight, bias = tl.zeros([BLOCK_D, PART_F], tl.float32), tl.zeros([PART_F], tl.float32)
    slope = tl.zeros([BLOCK_D], tl.float32)
    for c in tl.range(s * segment, tl.minimum(s * segment + segment, M), num_stages=2):
        tokens = tile(x, c * L, x_time, T, D, L, BLOCK_D)
        if HAS_WEIGHT:
            part = tile(dy + r * T * F + first_f, c * L, F, T, F - first_f, L, PART_F)
            weight += dot(tl.trans(tokens), part, PRECISION)
            if HAS_BIAS:
                bias += tl.sum(part.to(tl.float32), 0)
        if EXP:
            slope += tl.sum(tokens.to(tl.float32) * vector(dlogits + r * T, c * L, T, L)[:, None], 0)
    at = r * tl.num_programs(0) + s
    d, f = tl.arange(0, BLOCK_D), first_f + tl.arange(0, PART_F)
    if HAS_WEIGHT:
        tl.store(dweight + (at * D + d[:, None]) * F + f[None, :], weight, mask=(d[:, None] < D) & (f[None, :] < F))
        if HAS_BIAS:
            tl.store(dbias + at * F + f, bias, mask=f < F)
    if EXP:
        tl.store(dslope + at * D + d, slope, mask=d < tl.where(first_f == 0, D, 0))
