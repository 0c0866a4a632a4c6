"""Triton kernels of hybrid attention over whole rows, backward. Letters as in `triton_parts`."""

from .triton_parts import (
    dot,
    end_block,
    features_backward,
    features_of,
    first_block,
    indices,
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
def backward_queries(
    q,
    k,
    v,
    q_weight,
    k_weight,
    q_bias,
    k_bias,
    logits,
    key_logits,
    gamma,
    factor,
    sums,
    norms,
    top,
    best,
    inverse,
    grad,
    delta,  # [B, H, J]: -(dy . y) / denominator, the gradient of the denominator
    phi,  # out [B, H, J, N]: the queries' features times the linear term's weight
    dlinear,  # out [B, H, J]: the gradient of the logarithm of that weight
    dq,  # out [B, H, J, D], or unused
    dy_q,  # out [B, H, J, F]: gradient of q W + b, or unused
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
    NEED_X: tl.constexpr,
    NEED_MAP: tl.constexpr,
    L: tl.constexpr,
    DP: tl.constexpr,
    VP: tl.constexpr,
    BV: tl.constexpr,
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
    largest = vector(top + r * J, m * L, J, L)
    grad += b * grad_batch + h * grad_head
    scale = vector(inverse + r * J, m * L, J, L)
    dd = vector(delta + r * J, m * L, J, L)

    phi_q = features_of(x, q_weight, q_bias, h, D, F, MAP, L, DP, FP, PRECISION)
    at = r * (M + 1) + first
    dphi = dd[:, None] * tl.load(norms + at * N + tl.arange(0, N))[None, :]
    for column in range(0, V, BV):
        part = tile(grad + column, m * L, grad_time, J, V - column, L, BV).to(tl.float32) * scale[:, None]
        state = tile(sums + at * N * V + column, 0, V, N, V - column, N, BV)
        dphi += dot(part, tl.trans(state), PRECISION)
    dn = tile(grad, m * L, grad_time, J, V, L, VP).to(tl.float32) * scale[:, None]
    last_start = window_start(m * L + L - 1, WINDOW, TERRACED)
    for j in range(first, tl.cdiv(last_start, L)):
        i = j * L + tl.arange(0, L)
        y, z = tile(k, j * L, k_time, J, D, L, DP), tile(v, j * L, v_time, J, V, L, VP).to(tl.float32)
        phi_k = features_of(y, k_weight, k_bias, h, D, F, MAP, L, DP, FP, PRECISION)
        if EXP:
            phi_k *= key_weight(key_logits + r * J, j * L, J, L)[:, None]
        dweights = dot(dn, tl.trans(z), PRECISION) + dd[:, None]
        dweights = tl.where(is_old(n, i, WINDOW, TERRACED), dweights, 0)
        dphi += dot(dweights, phi_k, PRECISION)
    share = linear_weight(vector(logits + r * J, m * L, J, L), largest, EXP, HAS_WINDOW, L)
    share *= tl.load(factor + h)
    put(phi + r * J * N, phi_q * share[:, None], m * L, N, J, N, L, N)
    dphi *= share[:, None]
    dweight = tl.sum(phi_q * dphi, 1)
    dx = tl.zeros([L, DP], tl.float32)
    if NEED_X or NEED_MAP:
        dx, dy = features_backward(x, phi_q, dphi, q_weight, h, D, F, MAP, L, DP, FP, PRECISION)
        if NEED_MAP:
            put(dy_q + r * J * F, dy, m * L, F, J, F, L, FP)
    put_vector(dlinear + r * J, dweight, m * L, J, L)

    if NEED_X:
        if HAS_WINDOW:
            g = tl.load(gamma + h)
            # c_n shifts the window's weights only, so they pass a gradient to the key that has it: as all weights'
            # gradients sum to 0, the linear term's. With "exp" c_n cancels. Scores of other tiles may round otherwise,
            # so the key is not looked for again.
            index = indices(best + r * J, m * L, J, L)
            for j in range(first, m + 1):
                i = j * L + tl.arange(0, L)
                y, z = tile(k, j * L, k_time, J, D, L, DP), tile(v, j * L, v_time, J, V, L, VP).to(tl.float32)
                scores, slope = window_scores(x, y, n, i, scaling, softcap, SOFTCAP, WINDOW, TERRACED, PRECISION)
                dscores = dot(dn, tl.trans(z), PRECISION) + dd[:, None]
                dscores *= g * tl.exp(scores - largest[:, None])
                if not EXP:
                    dscores += tl.where(i[None, :] == index[:, None], dweight[:, None], 0)
                dscores *= scaling * slope
                dx += dot(dscores, y.to(tl.float32), PRECISION)
        put(dq + r * J * D, dx, m * L, D, J, D, L, DP)


@triton.jit
def sum_queries(
    phi,
    inverse,
    grad,
    delta,
    end_sums,  # [B, H, N, V] and [B, H, N]: gradients of the sums after the last block
    end_norms,
    dsums,  # out [B, H, M + 1, N, V]: at m over the queries of block m and later; at M the end's
    dnorms,  # out [B, H, M + 1, N]
    grad_batch,
    grad_head,
    grad_time,
    J,
    V,
    M,
    H: tl.constexpr,
    L: tl.constexpr,
    BV: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = r // H, r % H
    grad += b * grad_batch + h * grad_head + part * BV
    dsums += r * (M + 1) * N * V + part * BV
    dnorms += r * (M + 1) * N
    columns = V - part * BV
    feature, column = tl.arange(0, N), tl.arange(0, BV)
    place = feature[:, None] * V + column[None, :]
    inside = column[None, :] < columns
    total = tl.load(end_sums + r * N * V + part * BV + place, mask=inside, other=0)
    norm = tl.load(end_norms + r * N + feature)
    tl.store(dsums + M * N * V + place, total, mask=inside)
    if part == 0:
        tl.store(dnorms + M * N + feature, norm)
    for step in range(0, M):
        m = M - 1 - step
        features = tile(phi + r * J * N, m * L, N, J, N, L, N)
        dn = tile(grad, m * L, grad_time, J, columns, L, BV).to(tl.float32)
        dn *= vector(inverse + r * J, m * L, J, L)[:, None]
        total += dot(tl.trans(features), dn, PRECISION)
        norm += tl.sum(features * vector(delta + r * J, m * L, J, L)[:, None], 0)
        tl.store(dsums + m * N * V + place, total, mask=inside)
        if part == 0:
            tl.store(dnorms + m * N + feature, norm)


@triton.jit
def backward_keys(
    q,
    k,
    v,
    k_weight,
    k_bias,
    key_logits,
    gamma,
    top,
    best,
    inverse,
    grad,
    delta,
    phi,
    dlinear,
    dsums,
    dnorms,
    count,
    dk,  # out [B, K, J, D], or unused
    dy_k,  # out [B, H, J, F]: gradient of k W + b, or unused
    dkey,  # out [B, H, J]: gradient of the logarithm of the key's weight, with EXP
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
    NEED_X: tl.constexpr,
    NEED_MAP: tl.constexpr,
    L: tl.constexpr,
    DP: tl.constexpr,
    VP: tl.constexpr,
    BV: tl.constexpr,
    FP: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    j, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, head = pair // (H // GROUP), pair % (H // GROUP)
    k += b * k_batch + head * k_head
    v += b * v_batch + head * v_head
    i = j * L + tl.arange(0, L)
    end = end_block(j, M, L, WINDOW, TERRACED)
    y, z = tile(k, j * L, k_time, J, D, L, DP), tile(v, j * L, v_time, J, V, L, VP).to(tl.float32)
    summed = (i < tl.load(count + b))[:, None]
    dy_sum = tl.zeros([L, DP], tl.float32)
    for member in range(0, GROUP):
        h = head * GROUP + member
        r = b * H + h
        g = tl.load(gamma + h)
        at = r * (M + 1) + end
        dphi = tl.zeros([L, N], tl.float32) + tl.load(dnorms + at * N + tl.arange(0, N))[None, :]
        for column in range(0, V, BV):
            part = tile(v + column, j * L, v_time, J, V - column, L, BV).to(tl.float32)
            state = tile(dsums + at * N * V + column, 0, V, N, V - column, N, BV)
            dphi += dot(part, tl.trans(state), PRECISION)
        dphi = tl.where(summed, dphi, 0)
        for m in range(j, end):
            n = m * L + tl.arange(0, L)
            x = tile(q + b * q_batch + h * q_head, m * L, q_time, J, D, L, DP)
            largest = vector(top + r * J, m * L, J, L)
            dn = tile(grad + b * grad_batch + h * grad_head, m * L, grad_time, J, V, L, VP).to(tl.float32)
            dn *= vector(inverse + r * J, m * L, J, L)[:, None]
            dweights = dot(dn, tl.trans(z), PRECISION)
            dweights += vector(delta + r * J, m * L, J, L)[:, None]
            if HAS_WINDOW and NEED_X:
                scores, slope = window_scores(x, y, n, i, scaling, softcap, SOFTCAP, WINDOW, TERRACED, PRECISION)
                dscores = g * tl.exp(scores - largest[:, None]) * dweights
                if not EXP:
                    index = indices(best + r * J, m * L, J, L)
                    dtop = vector(dlinear + r * J, m * L, J, L)
                    dscores += tl.where(i[None, :] == index[:, None], dtop[:, None], 0)
                dscores *= scaling * slope
                dy_sum += dot(tl.trans(dscores), x.to(tl.float32), PRECISION)
            if j * L < window_start(m * L + L - 1, WINDOW, TERRACED):
                old = is_old(n, i, WINDOW, TERRACED)
                phi_q = tile(phi + r * J * N, m * L, N, J, N, L, N)
                dphi += dot(tl.trans(tl.where(old, dweights, 0)), phi_q, PRECISION)
        phi_k = features_of(y, k_weight, k_bias, h, D, F, MAP, L, DP, FP, PRECISION)
        if EXP:
            dphi *= key_weight(key_logits + r * J, j * L, J, L)[:, None]
            put_vector(dkey + r * J, tl.sum(phi_k * dphi, 1), j * L, J, L)
        if NEED_X or NEED_MAP:
            dx, dy = features_backward(y, phi_k, dphi, k_weight, h, D, F, MAP, L, DP, FP, PRECISION)
            dy_sum += dx
            if NEED_MAP:
                put(dy_k + r * J * F, dy, j * L, F, J, F, L, FP)
    if NEED_X:
        put(dk + pair * J * D, dy_sum, j * L, D, J, D, L, DP)


@triton.jit
def backward_values(
    q,
    k,
    k_weight,
    k_bias,
    key_logits,
    gamma,
    top,
    inverse,
    grad,
    phi,
    dsums,
    count,
    dv,  # out [B, K, J, V]
    q_batch,
    q_head,
    q_time,
    k_batch,
    k_head,
    k_time,
    grad_batch,
    grad_head,
    grad_time,
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
    BV: tl.constexpr,
    FP: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    j, pair, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, head = pair // (H // GROUP), pair % (H // GROUP)
    column = part * BV
    i = j * L + tl.arange(0, L)
    end = end_block(j, M, L, WINDOW, TERRACED)
    y = tile(k + b * k_batch + head * k_head, j * L, k_time, J, D, L, DP)
    summed = (i < tl.load(count + b))[:, None]
    total = tl.zeros([L, BV], tl.float32)
    for member in range(0, GROUP):
        h = head * GROUP + member
        r = b * H + h
        g = tl.load(gamma + h)
        phi_k = features_of(y, k_weight, k_bias, h, D, F, MAP, L, DP, FP, PRECISION)
        if EXP:
            phi_k *= key_weight(key_logits + r * J, j * L, J, L)[:, None]
        state = tile(dsums + (r * (M + 1) + end) * N * V + column, 0, V, N, V - column, N, BV)
        total += dot(tl.where(summed, phi_k, 0), state, PRECISION)
        for m in range(j, end):
            n = m * L + tl.arange(0, L)
            dn = tile(grad + b * grad_batch + h * grad_head + column, m * L, grad_time, J, V - column, L, BV)
            dn = dn.to(tl.float32) * vector(inverse + r * J, m * L, J, L)[:, None]
            weights = tl.zeros([L, L], tl.float32)
            if HAS_WINDOW:
                x = tile(q + b * q_batch + h * q_head, m * L, q_time, J, D, L, DP)
                scores, _ = window_scores(x, y, n, i, scaling, softcap, SOFTCAP, WINDOW, TERRACED, PRECISION)
                weights += g * tl.exp(scores - vector(top + r * J, m * L, J, L)[:, None])
            if j * L < window_start(m * L + L - 1, WINDOW, TERRACED):
                phi_q = tile(phi + r * J * N, m * L, N, J, N, L, N)
                linear = dot(phi_q, tl.trans(phi_k), PRECISION)
                weights += tl.where(is_old(n, i, WINDOW, TERRACED), linear, 0)
            total += dot(tl.trans(weights), dn, PRECISION)
    put(dv + pair * J * V + column, total, j * L, V, J, V - column, L, BV)
