"""Triton kernels of hybrid attention over whole rows, backward. Letters: see ../README.md and `triton_parts`."""

from .triton_parts import (
    dot,
    end_chunk,
    features,
    features_backward,
    first_chunk,
    indices,
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
def backward_queries(
    q,
    k,
    v,
    q_weight,
    k_weight,
    q_bias,
    k_bias,
    query_logits,
    key_logits,
    gamma,
    linear_weight,
    sums,
    norms,
    m,
    m_index,
    inv_denominator,
    grad,
    ddenominator,  # [B, H, T]: -(dy . y) / denominator, the gradient of the denominator
    weighted_q,  # out [B, H, T, N]: the queries' features times λ
    dlog_weight,  # out [B, H, T]: the gradient of log λ
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
    grad_batch,
    grad_head,
    grad_time,
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
    NEED_X: tl.constexpr,
    NEED_MAP: tl.constexpr,
):
    c, r = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = r // H, r % H
    q += b * q_batch + h * q_head
    k += b * k_batch + (h // G) * k_head
    v += b * v_batch + (h // G) * v_head
    n = c * L + tl.arange(0, L)
    first = first_chunk(c, L, WINDOW, TERRACED)
    x = tile(q, c * L, q_time, T, D, L, BLOCK_D)
    m_i = vector(m + r * T, c * L, T, L)
    grad += b * grad_batch + h * grad_head
    scale = vector(inv_denominator + r * T, c * L, T, L)
    dd = vector(ddenominator + r * T, c * L, T, L)

    phi_q = features(x, q_weight, q_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, L, BLOCK_D, BLOCK_F, PRECISION)
    at = r * (M + 1) + first
    dphi = dd[:, None] * tl.load(norms + at * N + tl.arange(0, N))[None, :]
    for first_dv in range(0, Dv, PART_DV):
        part = tile(grad + first_dv, c * L, grad_time, T, Dv - first_dv, L, PART_DV).to(tl.float32) * scale[:, None]
        state = tile(sums + at * N * Dv + first_dv, 0, Dv, N, Dv - first_dv, N, PART_DV)
        dphi += dot(part, tl.trans(state), PRECISION)
    dn = tile(grad, c * L, grad_time, T, Dv, L, BLOCK_DV).to(tl.float32) * scale[:, None]
    last_start = window_start(c * L + L - 1, WINDOW, TERRACED)
    for j in range(first, tl.cdiv(last_start, L)):
        i = j * L + tl.arange(0, L)
        y, z = tile(k, j * L, k_time, T, D, L, BLOCK_D), tile(v, j * L, v_time, T, Dv, L, BLOCK_DV).to(tl.float32)
        phi_k = features(y, k_weight, k_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, L, BLOCK_D, BLOCK_F, PRECISION)
        if EXP:
            phi_k *= key_weight(vector(key_logits + r * T, j * L, T, L))[:, None]
        dweights = dot(dn, tl.trans(z), PRECISION) + dd[:, None]
        dweights = tl.where(is_older(n, i, WINDOW, TERRACED), dweights, 0)
        dphi += dot(dweights, phi_k, PRECISION)
    lambda_n = lambda_of(query_logits + r * T, tl.load(linear_weight + h), m_i, c * L, T, EXP, HAS_WINDOW, L)
    put(weighted_q + r * T * N, phi_q * lambda_n[:, None], c * L, N, T, N, L, N)
    dphi *= lambda_n[:, None]
    dlog_weight_n = tl.sum(phi_q * dphi, 1)
    dx = tl.zeros([L, BLOCK_D], tl.float32)
    if NEED_X or NEED_MAP:
        dx, dy = features_backward(phi_q, dphi, q_weight, h, D, F, GRADIENT, HAS_WEIGHT, L, BLOCK_D, BLOCK_F, PRECISION)
        if NEED_MAP:
            put(dy_q + r * T * F, dy, c * L, F, T, F, L, BLOCK_F)
    put_vector(dlog_weight + r * T, dlog_weight_n, c * L, T, L)

    if NEED_X:
        if HAS_WINDOW:
            g = tl.load(gamma + h)
            # c_n shifts the window's weights only, so they pass a gradient to the key that has it: as all weights'
            # gradients sum to 0, the linear term's. With "exp" c_n cancels. Scores of other tiles may round otherwise,
            # so the key is not looked for again.
            index = indices(m_index + r * T, c * L, T, L)
            for j in range(first, c + 1):
                i = j * L + tl.arange(0, L)
                y, z = (
                    tile(k, j * L, k_time, T, D, L, BLOCK_D),
                    tile(v, j * L, v_time, T, Dv, L, BLOCK_DV).to(tl.float32),
                )
                scores, slope = window_scores(x, y, n, i, scaling, softcap, SOFTCAP, WINDOW, TERRACED, PRECISION)
                dscores = dot(dn, tl.trans(z), PRECISION) + dd[:, None]
                dscores *= g * tl.exp(scores - m_i[:, None])
                if not EXP:
                    dscores += tl.where(i[None, :] == index[:, None], dlog_weight_n[:, None], 0)
                dscores *= scaling * slope
                dx += dot(dscores, y.to(tl.float32), PRECISION)
        put(dq + r * T * D, dx, c * L, D, T, D, L, BLOCK_D)


@triton.jit
def sum_queries(
    weighted_q,
    inv_denominator,
    grad,
    ddenominator,
    dlast_sums,  # [B, H, N, Dv] and [B, H, N]: gradients of the sums after the last chunk
    dlast_norms,
    dsums,  # out [B, H, M + 1, N, Dv]: at c over the queries of chunk c and later; at M the end's
    dnorms,  # out [B, H, M + 1, N]
    grad_batch,
    grad_head,
    grad_time,
    T,
    D,
    Dv,
    F,
    M,
    H: tl.constexpr,
    G: tl.constexpr,
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PART_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = r // H, r % H
    grad += b * grad_batch + h * grad_head + part * PART_DV
    dsums += r * (M + 1) * N * Dv + part * PART_DV
    dnorms += r * (M + 1) * N
    width = Dv - part * PART_DV
    feature, value = tl.arange(0, N), tl.arange(0, PART_DV)
    place = feature[:, None] * Dv + value[None, :]
    inside = value[None, :] < width
    total = tl.load(dlast_sums + r * N * Dv + part * PART_DV + place, mask=inside, other=0)
    norm = tl.load(dlast_norms + r * N + feature)
    tl.store(dsums + M * N * Dv + place, total, mask=inside)
    if part == 0:
        tl.store(dnorms + M * N + feature, norm)
    for step in range(0, M):
        c = M - 1 - step
        queries = tile(weighted_q + r * T * N, c * L, N, T, N, L, N)
        dn = tile(grad, c * L, grad_time, T, width, L, PART_DV).to(tl.float32)
        dn *= vector(inv_denominator + r * T, c * L, T, L)[:, None]
        total += dot(tl.trans(queries), dn, PRECISION)
        norm += tl.sum(queries * vector(ddenominator + r * T, c * L, T, L)[:, None], 0)
        tl.store(dsums + c * N * Dv + place, total, mask=inside)
        if part == 0:
            tl.store(dnorms + c * N + feature, norm)


@triton.jit
def backward_keys(
    q,
    k,
    v,
    k_weight,
    k_bias,
    key_logits,
    gamma,
    m,
    m_index,
    inv_denominator,
    grad,
    ddenominator,
    weighted_q,
    dlog_weight,
    dsums,
    dnorms,
    num_summed,
    dk,  # out [B, K, T, D], or unused
    dy_k,  # out [B, H, T, F]: gradient of k W + b, or unused
    dkey_logits,  # out [B, H, T]: gradient of the logarithm of the key's weight, with EXP
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
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PART_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    NEED_X: tl.constexpr,
    NEED_MAP: tl.constexpr,
):
    j, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head = pair // (H // G), pair % (H // G)
    k += b * k_batch + head * k_head
    v += b * v_batch + head * v_head
    i = j * L + tl.arange(0, L)
    end = end_chunk(j, M, L, WINDOW, TERRACED)
    y, z = tile(k, j * L, k_time, T, D, L, BLOCK_D), tile(v, j * L, v_time, T, Dv, L, BLOCK_DV).to(tl.float32)
    summed = (i < tl.load(num_summed + b))[:, None]
    dy_sum = tl.zeros([L, BLOCK_D], tl.float32)
    for member in range(0, G):
        h = head * G + member
        r = b * H + h
        g = tl.load(gamma + h)
        at = r * (M + 1) + end
        dphi = tl.zeros([L, N], tl.float32) + tl.load(dnorms + at * N + tl.arange(0, N))[None, :]
        for first_dv in range(0, Dv, PART_DV):
            part = tile(v + first_dv, j * L, v_time, T, Dv - first_dv, L, PART_DV).to(tl.float32)
            state = tile(dsums + at * N * Dv + first_dv, 0, Dv, N, Dv - first_dv, N, PART_DV)
            dphi += dot(part, tl.trans(state), PRECISION)
        dphi = tl.where(summed, dphi, 0)
        for c in range(j, end):
            n = c * L + tl.arange(0, L)
            x = tile(q + b * q_batch + h * q_head, c * L, q_time, T, D, L, BLOCK_D)
            m_i = vector(m + r * T, c * L, T, L)
            dn = tile(grad + b * grad_batch + h * grad_head, c * L, grad_time, T, Dv, L, BLOCK_DV).to(tl.float32)
            dn *= vector(inv_denominator + r * T, c * L, T, L)[:, None]
            dweights = dot(dn, tl.trans(z), PRECISION)
            dweights += vector(ddenominator + r * T, c * L, T, L)[:, None]
            if HAS_WINDOW and NEED_X:
                scores, slope = window_scores(x, y, n, i, scaling, softcap, SOFTCAP, WINDOW, TERRACED, PRECISION)
                dscores = g * tl.exp(scores - m_i[:, None]) * dweights
                if not EXP:
                    index = indices(m_index + r * T, c * L, T, L)
                    dm = vector(dlog_weight + r * T, c * L, T, L)
                    dscores += tl.where(i[None, :] == index[:, None], dm[:, None], 0)
                dscores *= scaling * slope
                dy_sum += dot(tl.trans(dscores), x.to(tl.float32), PRECISION)
            if j * L < window_start(c * L + L - 1, WINDOW, TERRACED):
                older = is_older(n, i, WINDOW, TERRACED)
                queries = tile(weighted_q + r * T * N, c * L, N, T, N, L, N)
                dphi += dot(tl.trans(tl.where(older, dweights, 0)), queries, PRECISION)
        phi_k = features(y, k_weight, k_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, L, BLOCK_D, BLOCK_F, PRECISION)
        if EXP:
            dphi *= key_weight(vector(key_logits + r * T, j * L, T, L))[:, None]
            put_vector(dkey_logits + r * T, tl.sum(phi_k * dphi, 1), j * L, T, L)
        if NEED_X or NEED_MAP:
            dx, dy = features_backward(
                phi_k, dphi, k_weight, h, D, F, GRADIENT, HAS_WEIGHT, L, BLOCK_D, BLOCK_F, PRECISION
            )
            dy_sum += dx
            if NEED_MAP:
                put(dy_k + r * T * F, dy, j * L, F, T, F, L, BLOCK_F)
    if NEED_X:
        put(dk + pair * T * D, dy_sum, j * L, D, T, D, L, BLOCK_D)


@triton.jit
def backward_values(
    q,
    k,
    k_weight,
    k_bias,
    key_logits,
    gamma,
    m,
    inv_denominator,
    grad,
    weighted_q,
    dsums,
    num_summed,
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
    L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PART_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    j, pair, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, head = pair // (H // G), pair % (H // G)
    first_dv = part * PART_DV
    i = j * L + tl.arange(0, L)
    end = end_chunk(j, M, L, WINDOW, TERRACED)
    y = tile(k + b * k_batch + head * k_head, j * L, k_time, T, D, L, BLOCK_D)
    summed = (i < tl.load(num_summed + b))[:, None]
    total = tl.zeros([L, PART_DV], tl.float32)
    for member in range(0, G):
        h = head * G + member
        r = b * H + h
        g = tl.load(gamma + h)
        phi_k = features(y, k_weight, k_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, L, BLOCK_D, BLOCK_F, PRECISION)
        if EXP:
            phi_k *= key_weight(vector(key_logits + r * T, j * L, T, L))[:, None]
        state = tile(dsums + (r * (M + 1) + end) * N * Dv + first_dv, 0, Dv, N, Dv - first_dv, N, PART_DV)
        total += dot(tl.where(summed, phi_k, 0), state, PRECISION)
        for c in range(j, end):
            n = c * L + tl.arange(0, L)
            dn = tile(grad + b * grad_batch + h * grad_head + first_dv, c * L, grad_time, T, Dv - first_dv, L, PART_DV)
            dn = dn.to(tl.float32) * vector(inv_denominator + r * T, c * L, T, L)[:, None]
            weights = tl.zeros([L, L], tl.float32)
            if HAS_WINDOW:
                x = tile(q + b * q_batch + h * q_head, c * L, q_time, T, D, L, BLOCK_D)
                scores, _ = window_scores(x, y, n, i, scaling, softcap, SOFTCAP, WINDOW, TERRACED, PRECISION)
                weights += g * tl.exp(scores - vector(m + r * T, c * L, T, L)[:, None])
            if j * L < window_start(c * L + L - 1, WINDOW, TERRACED):
                queries = tile(weighted_q + r * T * N, c * L, N, T, N, L, N)
                linear = dot(queries, tl.trans(phi_k), PRECISION)
                weights += tl.where(is_older(n, i, WINDOW, TERRACED), linear, 0)
            total += dot(tl.trans(weights), dn, PRECISION)
    put(dv + pair * T * Dv + first_dv, total, j * L, Dv, T, Dv - first_dv, L, PART_DV)
