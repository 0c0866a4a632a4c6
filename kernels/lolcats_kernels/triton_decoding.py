"""One token after a state by one Triton kernel, which updates the state in place. `decoding` is its definition.

Letters as in `triton_parts`; B batch, K key heads, C window slots. A program takes one query head of one sequence. Keys
that leave the window go into its sums, L at a time; the first query head of a key head writes the ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .maps import HybridMaps, op_name
from .state import KVState
from .triton_parts import (
    KEY_BOUND,
    PRECISIONS,
    QUERY_BOUND,
    capped,
    dot,
    feature_order,
    features_of,
    launch,
    padded,
    tl,
    triton,
    window_start,
)

# By the largest head.
WARPS = {128: 8, 256: 16}


@triton.jit
def decode(
    q,
    k,
    v,
    q_weight,
    k_weight,
    q_bias,
    k_bias,
    linear_logit,  # [H], with EXP
    q_slope,  # [H, D], with EXP
    k_slope,
    gamma,  # [H]
    factor,  # [H]
    sums,  # [B, H, F', V], as in KVState; so are the next four
    norms,
    keys,
    values,
    length,  # [B]; read only
    valid,  # [B], with HAS_VALID: False is padding, which changes nothing and gets 0
    out,  # [B, H, V]
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    scaling,
    softcap,
    D,
    V,
    F,
    features,  # F'
    C,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_VALID: tl.constexpr,
    UPDATE: tl.constexpr,
    L: tl.constexpr,
    CP: tl.constexpr,  # slots at a time
    DP: tl.constexpr,
    VP: tl.constexpr,
    FP: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, column, row = tl.arange(0, DP), tl.arange(0, VP), tl.arange(0, L)
    n = tl.load(length + b)
    live = n >= 0
    if HAS_VALID:
        live = tl.load(valid + b) != 0
    query = tl.load(q + b * q_batch + h * q_head + d, mask=d < D, other=0)
    key = tl.load(k + b * k_batch + h // GROUP * k_head + d, mask=d < D, other=0)
    value = tl.load(v + b * v_batch + h // GROUP * v_head + column, mask=column < V, other=0)
    keys += (b * (H // GROUP) + h // GROUP) * C * D
    values += (b * (H // GROUP) + h // GROUP) * C * V
    r = b * H + h

    # S in the kernels' order of features.
    i = tl.arange(0, N)
    if MAP == "hedgehog":
        feature = i % 2 * F + i // 2
        inside = i // 2 < F
    else:
        feature = i
        inside = i < F
    place = sums + (r * features + feature[:, None]) * V + column[None, :]
    state = tl.load(place, mask=inside[:, None] & (column[None, :] < V), other=0)
    norm = tl.load(norms + r * features + feature, mask=inside, other=0)

    # The keys that leave with this token; pure linear attention's own comes before its query.
    if WINDOW == 0:
        begin, end = n, n + 1
    else:
        begin, end = window_start(n, WINDOW, TERRACED), window_start(n + 1, WINDOW, TERRACED)
    count = tl.where(live, end - begin, 0).to(tl.int32)

    window, window_norm, largest = value.to(tl.float32), n * 0 + 1.0, n * 0.0
    if HAS_WINDOW:
        x = query.to(tl.float32)
        largest = tl.sum(x * key.to(tl.float32), 0) * scaling
        if SOFTCAP:
            largest, _ = capped(largest, softcap)
        for first in range(0, C, CP):
            slot = first + tl.arange(0, CP)
            position = n - 1 - (n - 1 - slot + C) % C
            # The slot that the new key takes held one that has left the window.
            seen = (slot < C) & (position >= begin)
            y = tl.load(keys + slot[:, None] * D + d[None, :], mask=seen[:, None] & (d[None, :] < D), other=0)
            scores = tl.sum(y.to(tl.float32) * x[None, :], 1) * scaling
            if SOFTCAP:
                scores, _ = capped(scores, softcap)
            scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 0))
            weights, shrink = tl.exp(scores - new), tl.exp(largest - new)
            inner = seen[:, None] & (column[None, :] < V)
            z = tl.load(values + slot[:, None] * V + column[None, :], mask=inner, other=0).to(tl.float32)
            window = window * shrink + tl.sum(weights[:, None] * z, 0)
            window_norm = window_norm * shrink + tl.sum(weights, 0)
            largest = new

    phi = features_of(
        tl.where((row == 0)[:, None], query[None, :], 0), q_weight, q_bias, h, D, F, MAP, L, DP, FP, PRECISION
    )
    phi_q = tl.sum(tl.where((row == 0)[:, None], phi, 0), 0)
    share = tl.load(factor + h)
    if EXP and HAS_WINDOW:
        logit = tl.load(linear_logit + h)
        logit += tl.sum(query.to(tl.float32) * tl.load(q_slope + h * D + d, mask=d < D, other=0), 0)
        share *= tl.exp(tl.minimum(logit - largest, QUERY_BOUND))

    linear, linear_norm = tl.sum(phi_q[:, None] * state, 0), tl.sum(phi_q * norm, 0)
    for first in range(0, count, L):
        if UPDATE or WINDOW == 0:
            position = begin + first + row
            take = first + row < count
            own = (position == n)[:, None]
            y = tl.where(own, key[None, :], tl.zeros([L, DP], key.dtype))
            z = tl.where(own, value[None, :], tl.zeros([L, VP], value.dtype))
            if WINDOW > 0:
                slot = (position % C)[:, None]
                held = take[:, None] & (position < n)[:, None]
                y += tl.load(keys + slot * D + d[None, :], mask=held & (d[None, :] < D), other=0)
                z += tl.load(values + slot * V + column[None, :], mask=held & (column[None, :] < V), other=0)
            phi = features_of(y, k_weight, k_bias, h, D, F, MAP, L, DP, FP, PRECISION)
            if EXP:
                slope = tl.load(k_slope + h * D + d, mask=d < D, other=0)
                logits = tl.sum(y.to(tl.float32) * slope[None, :], 1)
                phi *= tl.exp(tl.minimum(tl.maximum(logits, -KEY_BOUND), KEY_BOUND))[:, None]
            phi = tl.where(take[:, None], phi, 0)
            z = tl.where(take[:, None], z.to(tl.float32), 0)  # what lies in padding may be NaN
            state += dot(tl.trans(phi), z, PRECISION)
            norm += tl.sum(phi, 0)
    if WINDOW == 0:
        linear, linear_norm = tl.sum(phi_q[:, None] * state, 0), tl.sum(phi_q * norm, 0)
    if UPDATE:
        inside &= i < tl.where(count > 0, N, 0)
        tl.store(place, state, mask=inside[:, None] & (column[None, :] < V))
        tl.store(norms + r * features + feature, norm, mask=inside)
        if WINDOW > 0 and h % GROUP == 0:
            slot = n % C
            tl.store(keys + slot * D + d, key, mask=d < tl.where(live, D, 0))
            tl.store(values + slot * V + column, value, mask=column < tl.where(live, V, 0))

    total = linear_norm * share
    result = linear * share
    if HAS_WINDOW:
        g = tl.load(gamma + h)
        total += g * window_norm
        result += g * window
    result = tl.where(live & (total > 0), result / tl.where(total > 0, total, 1), 0)
    tl.store(out + r * V + column, result.to(out.dtype.element_ty), mask=column < V)


@torch.library.custom_op(op_name(__name__, "decode"), mutates_args=("sums", "norms", "keys", "values", "length"))
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    linear_logit: Tensor | None,
    q_slope: Tensor | None,
    k_slope: Tensor | None,
    gamma: Tensor,
    factor: Tensor,
    sums: Tensor,
    norms: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    valid: Tensor | None,
    feature_map: str,
    window: int,
    layout: str,
    scaling: float,
    softcap: float,
    terms: str,
    update: bool,
) -> Tensor:
    """[B, H, 1, V]. With `update` the state, contiguous, becomes the one after this token."""
    batch, heads, _, size = q.shape
    columns, value_size, slots = size if q_weight is None else q_weight.shape[2], v.shape[3], keys.shape[2]
    out = q.new_empty(batch, heads, 1, value_size)
    given = {
        **{"q": q, "k": k, "v": v, "q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias},
        **{"linear_logit": linear_logit, "q_slope": q_slope, "k_slope": k_slope, "gamma": gamma, "factor": factor},
        **{"sums": sums, "norms": norms, "keys": keys, "values": values, "length": length, "valid": valid, "out": out},
        **{f"{name}_batch": x.stride(0) for name, x in (("q", q), ("k", k), ("v", v))},
        **{f"{name}_head": x.stride(1) for name, x in (("q", q), ("k", k), ("v", v))},
        **{"scaling": scaling, "softcap": softcap, "D": size, "V": value_size, "F": columns, "C": slots},
        **{"features": sums.shape[2], "H": heads, "GROUP": heads // k.shape[1], "MAP": feature_map},
        **{"EXP": q_slope is not None, "SOFTCAP": softcap > 0, "WINDOW": window, "TERRACED": layout == "terraced"},
        **{"HAS_WINDOW": window > 0 and terms != "linear", "HAS_VALID": valid is not None, "UPDATE": update},
        **{"L": 16, "CP": min(padded(slots), 64), "DP": padded(size), "VP": padded(value_size), "FP": padded(columns)},
        **{"N": feature_order(feature_map, columns), "PRECISION": PRECISIONS[q.dtype]},
    }
    warps = WARPS[next(fits for fits in WARPS if fits >= max(size, value_size))]
    launch(decode, (batch, heads), given, warps)
    if update:
        length += 1 if valid is None else valid
    return out


@_decode.register_fake
def _decode_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def triton_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    scaling: float,
    softcap: float | None,
    valid: Tensor | None,
    state: KVState,
    return_state: bool,
    terms: str,
    consume_state: bool,
) -> tuple[Tensor, KVState | None]:
    """`decode_step` by one kernel, without gradients, where the token may be padding (valid [B, 1] bool)."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    held = [x.contiguous() for x in (state.sums, state.norms, state.keys, state.values, state.length)]
    if return_state and not consume_state:
        held = [x.clone() for x in held]
    names = ("q_weight", "k_weight", "q_bias", "k_bias", "linear_logit", "q_slope", "k_slope")
    parameters = (getattr(maps, name, None) for name in names)
    gamma, factor = maps.factors()
    config = maps.config
    out = _decode(
        q,
        k,
        v,
        *(x if x is None else x.float().contiguous() for x in parameters),
        gamma,
        torch.zeros_like(factor) if terms == "window" else factor,
        *held,
        valid if valid is None else valid[:, 0].contiguous(),
        config.feature_map,
        config.window,
        config.layout,
        scaling,
        softcap or 0.0,
        terms,
        return_state,
    )
    return out, KVState(*held) if return_state else None
