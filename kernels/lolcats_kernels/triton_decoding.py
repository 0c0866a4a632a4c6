"""One token after a state by one Triton kernel, which updates the state in place. `torch_decoding` is its definition.
The states may be those of a batch's rows, or lie in numbered slots (see `slots`).

Letters: see ../README.md and `triton_parts`. A program takes one query head of one sequence. Keys that have left the
window wait in the ring, and are weighed one by one, until S takes all of them at once: so most steps do not write S.
Where no key waits, S takes those that leave the window, L at a time. The first query head of a key head writes the
ring.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .maps import HybridMaps
from .spec import WAITING, CallSpec, op_name
from .state import KVState, SlotStates
from .triton_parts import (
    PRECISIONS,
    capped,
    contiguous,
    dot,
    features,
    key_weight,
    lambda_beside,
    launch,
    map_arguments,
    padded,
    padded_features,
    slope_logits,
    softplus,
    tl,
    triton,
    window_arguments,
    window_start,
)

# The numbers of bf16 are TF32's too. W takes one product of TF32, and two of bf16, for which there are no registers.
_PRECISIONS = PRECISIONS | {torch.bfloat16: "tf32"}
# By the largest head.
WARPS = {128: 8, 256: 16}


class Inputs(NamedTuple):
    """Tensors of a step; the state's are contiguous but for their first dimension, and become those after the token if
    it is updated."""

    q: Tensor  # [B, H, 1, D]
    k: Tensor  # [B, K, 1, D]
    v: Tensor  # [B, K, 1, Dv]
    q_weight: Tensor | None
    k_weight: Tensor | None
    q_bias: Tensor | None
    k_bias: Tensor | None
    linear_logit: Tensor | None  # [H], with "exp"
    q_slope: Tensor | None  # [H, D], with "exp"
    k_slope: Tensor | None
    decay_slope: Tensor | None  # [H, D], with a decay
    decay_bias: Tensor | None  # [H], with a decay
    gamma: Tensor  # [H]
    linear_weight: Tensor  # [H]
    sinks: Tensor | None  # [H]
    sums: Tensor  # of `KVState`, as are the next four; of `SlotStates` if there are slots
    norms: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor  # [B]; read only
    valid: Tensor | None  # [B] bool: False is padding, which changes nothing and gets 0
    slots: Tensor | None  # [B]: where each row's state lies; negative is padding


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? linear_logit, Tensor? q_slope, Tensor? k_slope, Tensor? decay_slope, Tensor? decay_bias, Tensor gamma, "
    "Tensor linear_weight, Tensor? sinks, "
    "Tensor(a!) sums, Tensor(b!) norms, Tensor(c!) keys, Tensor(d!) values, Tensor length, Tensor? valid, "
    "Tensor? slots"
)


@triton.jit
def later_exp(g, row):
    """exp(-sum of g [L] over the rows after each one)."""
    return tl.exp(-tl.sum(tl.where(row[None, :] > row[:, None], g[None, :], 0), 1))


@triton.jit
def summed_keys(length, WINDOW: tl.constexpr, TERRACED: tl.constexpr, WAITING: tl.constexpr):
    """How many first keys are in S and z after `length` tokens; the same as in `equation`."""
    left = tl.minimum(window_start(length, WINDOW, TERRACED), length)
    if WAITING > 0:
        left = left // WAITING * WAITING
    return left


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
    decay_slope,  # [H, D], with DECAY
    decay_bias,  # [H], with DECAY
    gamma,  # [H]
    linear_weight,  # [H]: constant λ
    sinks,  # [H], with HAS_SINKS
    sums,  # [B, H, F', Dv], as in KVState; so are the next four
    norms,
    keys,
    values,
    length,  # [B]; read only
    valid,  # [B], with HAS_VALID: False is padding, which changes nothing and gets 0
    slots,  # [B], with HAS_SLOTS: which of the states is the row's; negative is padding
    out,  # [B, H, Dv]
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    sums_batch,
    norms_batch,
    keys_batch,
    values_batch,
    scaling,
    softcap,
    D,
    Dv,
    F,
    num_features,  # F'
    C,
    H: tl.constexpr,
    G: tl.constexpr,
    EACH: tl.constexpr,  # features of one number of y
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    TERRACED: tl.constexpr,
    WAITING: tl.constexpr,  # how many keys may wait; 0 or L
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GRADIENT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EXP: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    UPDATE: tl.constexpr,
    L: tl.constexpr,
    BLOCK_C: tl.constexpr,  # keys of the window at a time
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_F: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, dv, row = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, L)
    n = tl.load(length + b)
    live = n >= 0
    if HAS_VALID:
        live = tl.load(valid + b) != 0
    place = b
    if HAS_SLOTS:
        place = tl.load(slots + b).to(tl.int64)
        live &= place >= 0
        place = tl.maximum(place, 0)  # of padding nothing is read but this, and nothing written
    query = tl.load(q + b * q_batch + h * q_head + d, mask=d < D, other=0)
    key = tl.load(k + b * k_batch + h // G * k_head + d, mask=d < D, other=0)
    value = tl.load(v + b * v_batch + h // G * v_head + dv, mask=dv < Dv, other=0)
    keys += place * keys_batch + h // G * C * D
    values += place * values_batch + h // G * C * Dv

    # S holds the keys before `start`. The query sees those from there to `begin` by the linear term too, and the keys
    # before `end` are those that the next query does not see by softmax. S takes them if `folds`.
    start, begin = summed_keys(n, WINDOW, TERRACED, WAITING), window_start(n, WINDOW, TERRACED)
    end = summed_keys(n + 1, WINDOW, TERRACED, 0)
    folds = live & (summed_keys(n + 1, WINDOW, TERRACED, WAITING) > start) & UPDATE

    # S in the kernels' order of num_features. Before it has taken keys, S and z are 0, whatever a slot holds.
    WEIGHS: tl.constexpr = WINDOW == 0 or WAITING > 0  # whether the query sees keys that are not in S yet
    i = tl.arange(0, N)
    feature = i % EACH * F + i // EACH
    inside = i // EACH < F
    sums += place * sums_batch + (h * num_features + feature[:, None]) * Dv + dv[None, :]
    norms += place * norms_batch + h * num_features + feature
    summed = i // EACH < tl.where(start > 0, F, 0)
    state = tl.load(sums, mask=summed[:, None] & (dv[None, :] < Dv), other=0)
    norm = tl.load(norms, mask=summed, other=0)

    window, window_norm, m = value.to(tl.float32), n * 0 + 1.0, n * 0.0
    if HAS_WINDOW:
        x = query.to(tl.float32)
        m = tl.sum(x * key.to(tl.float32), 0) * scaling
        if SOFTCAP:
            m, _ = capped(m, softcap)
        if HAS_SINKS:
            sink = tl.load(sinks + h)
            new = tl.maximum(m, sink)
            shrink = tl.exp(m - new)
            window, window_norm, m = window * shrink, shrink + tl.exp(sink - new), new
        begin_slot = (begin % C).to(tl.int32)
        for first in range(0, WINDOW * (1 + TERRACED), BLOCK_C):
            after = first + tl.arange(0, BLOCK_C)
            slot = begin_slot + after
            slot -= tl.where(slot >= C, C, 0)
            seen = begin + after < n
            y = tl.load(keys + slot[:, None] * D + d[None, :], mask=seen[:, None] & (d[None, :] < D), other=0)
            scores = tl.sum(y.to(tl.float32) * x[None, :], 1) * scaling
            if SOFTCAP:
                scores, _ = capped(scores, softcap)
            scores = tl.where(seen, scores, float("-inf"))
            new = tl.maximum(m, tl.max(scores, 0))
            weights, shrink = tl.exp(scores - new), tl.exp(m - new)
            inner = seen[:, None] & (dv[None, :] < Dv)
            z = tl.load(values + slot[:, None] * Dv + dv[None, :], mask=inner, other=0).to(tl.float32)
            window = window * shrink + tl.sum(weights[:, None] * z, 0)
            window_norm = window_norm * shrink + tl.sum(weights, 0)
            m = new

    phi = features(
        tl.where((row == 0)[:, None], query[None, :], 0),
        q_weight,
        q_bias,
        h,
        D,
        F,
        ACTIVATION,
        HAS_WEIGHT,
        HAS_BIAS,
        BLOCK_D,
        BLOCK_F,
        PRECISION,
    )
    phi_q = tl.sum(tl.where((row == 0)[:, None], phi, 0), 0)
    lambda_n = tl.load(linear_weight + h)
    if EXP and HAS_WINDOW:
        logit = tl.load(linear_logit + h)
        logit += tl.sum(query.to(tl.float32) * tl.load(q_slope + h * D + d, mask=d < D, other=0), 0)
        lambda_n *= lambda_beside(logit, m)

    linear, linear_norm = tl.sum(phi_q[:, None] * state, 0), tl.sum(phi_q * norm, 0)
    for first in range(0, tl.where(live, end - start, 0).to(tl.int32), L):
        if UPDATE or WEIGHS:
            position = start + first + row
            take = position < end
            own = (position == n)[:, None]
            y = tl.where(own, key[None, :], tl.zeros([L, BLOCK_D], key.dtype))
            z = tl.where(own, value[None, :], tl.zeros([L, BLOCK_DV], value.dtype))
            if WINDOW > 0 or WAITING > 0:
                slot = (start % C).to(tl.int32) + first + row
                slot = (slot - tl.where(slot >= C, C, 0))[:, None]
                held = take[:, None] & (position < n)[:, None]
                y += tl.load(keys + slot * D + d[None, :], mask=held & (d[None, :] < D), other=0)
                z += tl.load(values + slot * Dv + dv[None, :], mask=held & (dv[None, :] < Dv), other=0)
            phi = features(y, k_weight, k_bias, h, D, F, ACTIVATION, HAS_WEIGHT, HAS_BIAS, BLOCK_D, BLOCK_F, PRECISION)
            if EXP:
                slope = tl.load(k_slope + h * D + d, mask=d < D, other=0)
                logits = tl.sum(y.to(tl.float32) * slope[None, :], 1)
                phi *= key_weight(logits)[:, None]
            phi = tl.where(take[:, None], phi, 0)
            z = tl.where(take[:, None], z.to(tl.float32), 0)  # what lies in padding may be NaN
            if DECAY:
                logits = slope_logits(y, decay_slope, h, D, BLOCK_D) + tl.load(decay_bias + h)
                g = tl.where(take, softplus(logits), 0)
            if WEIGHS:
                older = position < begin
                weights = tl.where(older, tl.sum(phi * phi_q[None, :], 1), 0)
                if DECAY:
                    forgotten = tl.where(older, g, 0)
                    weights *= later_exp(forgotten, row)
                    shrink = tl.exp(-tl.sum(forgotten, 0))
                    linear *= shrink
                    linear_norm *= shrink
                linear += tl.sum(weights[:, None] * z, 0)
                linear_norm += tl.sum(weights, 0)
            if folds:
                if DECAY:
                    phi *= later_exp(g, row)[:, None]
                    shrink = tl.exp(-tl.sum(g, 0))
                    state *= shrink
                    norm *= shrink
                state += dot(tl.trans(phi), z, PRECISION)
                norm += tl.sum(phi, 0)
    if folds:
        tl.store(sums, state, mask=inside[:, None] & (dv[None, :] < Dv))
        tl.store(norms, norm, mask=inside)
    if UPDATE and (WINDOW > 0 or WAITING > 0) and h % G == 0:
        slot = n % C
        tl.store(keys + slot * D + d, key, mask=d < tl.where(live, D, 0))
        tl.store(values + slot * Dv + dv, value, mask=dv < tl.where(live, Dv, 0))

    total = linear_norm * lambda_n
    result = linear * lambda_n
    if HAS_WINDOW:
        g = tl.load(gamma + h)
        total += g * window_norm
        result += g * window
    result = tl.where(live & (total > 0), result / tl.where(total > 0, total, 1), 0)
    tl.store(out + (b * H + h) * Dv + dv, result.to(out.dtype.element_ty), mask=dv < Dv)


@torch.library.custom_op(
    op_name(__name__, "decode"),
    mutates_args=("sums", "norms", "keys", "values"),
    schema=f"({_INPUTS}, bool update, {CallSpec.SCHEMA}) -> Tensor",
)
def _decode(*arguments: Any) -> Tensor:
    """[B, H, 1, Dv]. Takes `Inputs`; update: whether the state becomes the one after this token; the encoded spec."""
    given, (update, *encoded) = arguments[: len(Inputs._fields)], arguments[len(Inputs._fields) :]
    x, spec = Inputs(*given), CallSpec.decode(*encoded)
    (batch, heads, _, size), value_size, slots = x.q.shape, x.v.shape[3], x.keys.shape[2]
    waiting = slots - spec.config.slots
    assert waiting in (0, spec.config.waiting)
    record = spec.config.map
    feature_dim = record.feature_dim(size, spec.config.feature_dim)
    out = x.q.new_empty(batch, heads, 1, value_size)
    launch(
        decode,
        (batch, heads),
        WARPS[next(fits for fits in WARPS if fits >= max(size, value_size))],
        {
            **x._asdict(),
            "out": out,
            **{f"{name}_batch": tensor.stride(0) for name, tensor in (("q", x.q), ("k", x.k), ("v", x.v))},
            **{f"{name}_head": tensor.stride(1) for name, tensor in (("q", x.q), ("k", x.k), ("v", x.v))},
            **{f"{name}_batch": getattr(x, name).stride(0) for name in ("sums", "norms", "keys", "values")},
            **{"D": size, "Dv": value_size, "F": feature_dim, "C": slots, "num_features": x.sums.shape[2]},
            **{"H": heads, "G": heads // x.k.shape[1], "EACH": record.features_each},
            **{"HAS_VALID": x.valid is not None, "HAS_SLOTS": x.slots is not None, "UPDATE": update, "L": WAITING},
            **{"WAITING": waiting, "BLOCK_C": min(padded(spec.config.slots), 64)},
            **{"BLOCK_D": padded(size), "BLOCK_DV": padded(value_size), "BLOCK_F": padded(feature_dim)},
            **{"N": padded_features(record, feature_dim), "PRECISION": _PRECISIONS[x.q.dtype]},
            **map_arguments(record, exp=spec.config.linear_factor == "exp"),
            "DECAY": spec.config.decay,
            **window_arguments(spec),
            "HAS_SINKS": x.sinks is not None and spec.has_window,
        },
    )
    return out


@_decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def triton_decode_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    sinks: Tensor | None,
    valid: Tensor | None,
    initial_state: KVState,
    return_state: bool,
    consume_state: bool,
) -> tuple[Tensor, KVState | None]:
    """`decode_step` by one kernel, without gradients, where the token may be padding (valid [B, 1] bool)."""
    after = KVState(*(x.contiguous() for x in initial_state.tensors()))
    if return_state and not consume_state:
        after = KVState(*(x.clone() for x in after.tensors()))
    valid = valid if valid is None else valid[:, 0].contiguous()
    sums, norms, keys, values, length = after.tensors()
    inputs = _inputs(q, k, v, maps, spec, sinks, SlotStates(sums, norms, keys, values), length, valid=valid)
    out = _decode(*inputs, return_state, *spec.encode())
    if not return_state:
        return out, None
    length.add_(1 if valid is None else valid)
    return out, after


def triton_decode_in_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    sinks: Tensor | None,
    states: SlotStates,
    slots: Tensor,
    length: Tensor,
) -> Tensor:
    """`decode_in_slots` by one kernel, without gradients or synchronisation; q [R, H, 1, D], k and v [R, K, 1, ·]
    -> [R, H, 1, Dv]."""
    inputs = _inputs(q, k, v, maps, spec, sinks, states, length, slots=slots)
    return _decode(*inputs, True, *spec.encode())


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    sinks: Tensor | None,
    states: SlotStates,
    length: Tensor,
    *,
    valid: Tensor | None = None,
    slots: Tensor | None = None,
) -> Inputs:
    of_q, of_k = maps.q_parameters(torch.float32), maps.k_parameters(torch.float32)
    gamma, linear_weight = maps.term_weights()
    linear_logit, q_slope = (maps.parameter(name, torch.float32) for name in ("linear_logit", "q_slope"))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return Inputs(
        q=q,
        k=k,
        v=v,
        q_weight=contiguous(of_q.weight),
        k_weight=contiguous(of_k.weight),
        q_bias=contiguous(of_q.bias),
        k_bias=contiguous(of_k.bias),
        linear_logit=contiguous(linear_logit),
        q_slope=contiguous(q_slope),
        k_slope=contiguous(of_k.slope),
        decay_slope=contiguous(maps.parameter("decay_slope", torch.float32)),
        decay_bias=contiguous(maps.parameter("decay_bias", torch.float32)),
        gamma=gamma,
        linear_weight=linear_weight if spec.has_linear else torch.zeros_like(linear_weight),
        sinks=contiguous(sinks),
        **states._asdict(),
        length=length,
        valid=valid,
        slots=slots,
    )
