"""The attention of the chunked path, forward and backward: linear time; memory for inputs, features, sums and outputs.

Shapes: R rows = batch x query heads, G query heads per key head, H heads, T time, D head, Dv value head, F' features,
L block, M blocks, P blocks in a band, r: of one group, m: of one tile (see `tiles`).

Keys of a query's band that are older than its window enter the linear term one by one; the blocks before the band enter
it by their sums S and z, running sums over blocks. Rows are handled in groups, on CPU one after the other, in tiles of
some blocks: weights, and the gradients of features and sums, are those of one group or tile, and stay in the cache.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .features import add_feature_gradients, features
from .gradients import GroupGradients
from .maps import QUERY_BOUND, HybridConfig, op_name
from .tiles import Plan, Tile, pad_blocks

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_TENSORS = 12  # that `block_attention` takes and differentiates


def _fill_sums(tile: Tile, fk: Tensor, v: Tensor, start: Tensor | None, sums: Tensor, norms: Tensor) -> None:
    """S [r, M, F', Dv] and z [r, M, F'] of the tile's blocks, over all keys before their bands, the state's included;
    fk and v with the zeros in front.
    """
    plan = tile.plan
    first = max(tile.first, plan.reach)
    if tile.first < plan.reach:
        begin = slice(tile.first, min(first, tile.last))
        sums[:, begin], norms[:, begin] = (0, 0) if start is None else (start[:, None, :, :-1], start[:, None, :, -1])
    if first < tile.last:
        left = slice((first - 1) * plan.block, (tile.last - 1) * plan.block)
        keys, values = (x[:, left].unflatten(1, (-1, plan.block)) for x in (fk, v))
        # A loop: on CPU, cumsum over a dimension that is not the last takes several times as long.
        after = sums[:, first - 1 : tile.last].unbind(1)
        for block, product in enumerate((keys.transpose(-1, -2) @ values).unbind(1)):
            torch.add(after[block], product, out=after[block + 1])
        norms[:, first : tile.last] = keys.sum(2).cumsum(1) + norms[:, first - 1, None]


def _plan(q: Tensor, start: Tensor | None, options: Sequence[Any]) -> Plan:
    config, others = HybridConfig(*options[:5]), options[5:]
    return Plan(config, start is not None, q.shape[1], q.device, q.dtype, *others)


def _room(plan: Plan, q: Tensor, v: Tensor, counted: bool, logits: Tensor | None) -> Results:
    """Room for what `block_attention` returns, out with the zeros after it."""
    rows, size, total = q.shape[0], v.shape[2], plan.blocks * plan.block
    columns = plan.config.features(q.shape[2])
    # Without a backward these are of one group at a time.
    held, kept = rows if plan.keep else plan.tile_rows, columns if plan.linear else 0
    return (
        q.new_empty(rows, total, size),
        q.new_empty(rows if counted else 0, columns, size),
        q.new_empty(rows if counted else 0, columns),
        q.new_empty(held, total, kept),
        q.new_empty(held, total + (plan.reach - 1) * plan.block, kept),
        q.new_empty(held, plan.blocks if plan.sums else 0, kept, size),
        q.new_empty(held, plan.blocks if plan.sums else 0, kept),
        q.new_empty(0 if logits is None else rows, total, 1),
        q.new_empty(rows, total, 1),
        q.new_zeros(rows, total, 1),
    )


@torch.library.custom_op(op_name(__name__, "forward"), mutates_args=())
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma: Tensor,
    factor: Tensor | None,
    logits: Tensor | None,
    start: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    k_slope: Tensor | None,
    count: Tensor | None,
    feature_map: str,
    feature_dim: int,
    window: int,
    layout: str,
    linear_factor: str,
    heads: int,
    group: int,
    scaling: float,
    softcap: float | None,
    terms: str,
    keep: bool,
) -> Results:
    """Eq. 7 for contiguous rows without padding. All tensors of one dtype, fp32 or fp64.

    q [R, T, D], k [R / G, T, D], v [R / G, T, Dv], gamma [R], factor [R] or None (1), logits [R, T] ("exp") or None,
    start [R, F', Dv + 1] (S and z of the state) or None, the parameters of the features (`features.parameters`).

    Returns out [R, T, Dv]; with count [B], S [R, F', Dv] and z [R, F'] over the first so many keys of each sequence,
    without gradients; and what backward needs, if it is to be kept: phi_q and phi_k; S and z in front of every block's
    band; the share of the linear term beside the window's largest; 1 / denominator, 0 where nothing was summed; c_n.
    """
    options = *(feature_map, feature_dim, window, layout, linear_factor), heads, group, scaling, softcap, terms, keep
    plan = _plan(q, start, options)
    results = _room(plan, q, v, count is not None, logits)
    out, end_sums, end_norms, phi_q, phi_k, sums, norms, share, inverse, top = results
    counts = None if count is None else count.tolist()
    q, time = pad_blocks(q, plan), q.shape[1]
    k, v = (pad_blocks(x, plan, plan.reach - 1) for x in (k, v))
    front = k.shape[1] - q.shape[1]
    phi_k[:, :front] = 0
    if logits is not None:
        share.copy_(pad_blocks(logits[..., None], plan))
    for rows, keys, heads_ in plan.groups(len(q)):
        q_r, k_r, v_r, out_r, inverse_r, top_r = q[rows], k[keys], v[keys], out[rows], inverse[rows], top[rows]
        phi_q_r, fk, sums_r, norms_r = (x[rows] if keep else x for x in (phi_q, phi_k, sums, norms))
        of_q = [_some(x, heads_) for x in (q_weight, q_bias, None)]
        of_k = [_some(x, heads_) for x in (k_weight, k_bias, k_slope)]
        for tile in plan.tiles():
            at = tile.tokens
            if plan.linear:
                features(plan.config, q_r[:, at], *of_q, out=phi_q_r[:, at])
                features(plan.config, k_r[:, tile.own], *of_k, out=fk[:, tile.own])
            if plan.sums:
                _fill_sums(tile, fk, v_r, _some(start, rows), sums_r, norms_r)
            weights = None
            if plan.windowed:
                scores = tile.scores(q_r, k_r)
                part = tile.of(top_r)
                part.copy_(scores.amax(-1).view(part.shape))
                weights = tile.window(scores, top_r, gamma[rows])
            if logits is not None:
                share[rows, at].sub_(top_r[:, at]).clamp_(max=QUERY_BOUND).exp_()
            fq = tile.queries(phi_q_r)
            weight = _weight(tile, factor, share, rows)
            if weight is not None:
                fq = fq * weight
            weights = tile.add_linear(weights, fq, fk)
            y = weights @ tile.band(v_r, weights.shape[-1])
            denominator = weights.sum(-1, keepdim=True)
            if plan.sums:
                y.baddbmm_(fq, sums_r[:, tile.blocks].flatten(0, 1))
                denominator += (fq * norms_r[:, tile.blocks].flatten(0, 1)[:, None]).sum(-1, keepdim=True)
            part = tile.of(inverse_r)
            part.copy_(torch.where(denominator > 0, denominator.reciprocal(), 0).view(part.shape))
            torch.mul(y.view(*part.shape[:-1], -1), part, out=tile.of(out_r))
        if counts is not None:
            old = slice(front, front + counts[rows.start // heads])
            torch.matmul(fk[:, old].transpose(-1, -2), v_r[:, old], out=end_sums[rows])
            torch.sum(fk[:, old], 1, out=end_norms[rows])
    _, *others = results
    return out[:, :time].contiguous(), *others  # type: ignore[return-value]


@block_attention.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, factor: Any, logits: Any, start: Any, *rest: Any) -> Any:
    out, *others = _room(_plan(q, start, rest[6:]), q, v, rest[5] is not None, logits)
    return q.new_empty(*q.shape[:2], out.shape[2]), *others


@torch.library.custom_op(op_name(__name__, "backward"), mutates_args=())
def _backward(
    grad: Tensor,
    results: Sequence[Tensor],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    feature_map: str,
    feature_dim: int,
    window: int,
    layout: str,
    linear_factor: str,
    heads: int,
    group: int,
    scaling: float,
    softcap: float | None,
    terms: str,
    keep: bool,
) -> list[Tensor]:
    """Gradients of the tensors that `block_attention` takes; empty where they are not needed.

    grad [R, T, Dv]; results: out, and all that `block_attention` returns for this.
    """
    options = *(feature_map, feature_dim, window, layout, linear_factor), heads, group, scaling, softcap, terms, keep
    q, k, v, gamma, factor, logits, start, *of_features = tensors
    assert q is not None and k is not None and v is not None and gamma is not None
    plan = _plan(q, start, options)
    out, phi_q, phi_k, sums, norms, share, inverse, top = results
    q, out, grad, time = *(pad_blocks(x, plan) for x in (q, out, grad)), q.shape[1]
    k, v = (pad_blocks(x, plan, plan.reach - 1) for x in (k, v))
    need_q, need_k, need_v, need_gamma, need_factor, need_logits, need_start, *need_of = needs
    need_gamma = need_gamma and plan.windowed and plan.linear  # else it cancels
    need_weight = need_gamma or need_factor or need_logits  # of the linear term
    need_fq = plan.linear and (need_weight or need_q or any(need_of[:2]))
    need_fk = plan.linear and (need_k or any(need_of[2:]))

    def zeros(needed: bool, x: Tensor | None) -> Tensor | None:
        return torch.zeros_like(x) if needed and x is not None else None

    dq, dk, dv, dstart, dlogits = (
        zeros(need, x) for need, x in ((need_q, q), (need_k, k), (need_v, v), (need_start, start), (need_logits, share))
    )
    dof_features = [zeros(need, x) for need, x in zip(need_of, of_features, strict=True)]
    linear = torch.zeros_like(gamma)  # the linear weights times their gradients, summed
    for rows, keys, heads_ in plan.groups(len(q)):
        q_r, k_r, dq_r, dk_r = q[rows], k[keys], _some(dq, rows), _some(dk, keys)
        of, dof = ([_some(x, heads_) for x in some] for some in (of_features, dof_features))
        backward = GroupGradients(
            *(plan, q_r, k_r, v[keys], phi_k[rows], sums[rows], norms[rows], gamma[rows], top[rows]),
            *(dq_r, dk_r, _some(dv, keys), need_fq, need_fk),
            top_counts=logits is None,
        )
        for tile in reversed(plan.tiles()):
            at, own = tile.tokens, tile.own
            # y = n / d: dn = dy / d, and dd = -(dy . y) / d.
            dn = tile.queries(grad[rows]) * tile.queries(inverse[rows])
            dd = (dn * tile.queries(out[rows])).sum(-1, keepdim=True).neg_()
            fq = tile.queries(phi_q[rows])
            weight = _weight(tile, factor, share, rows)
            if weight is not None:
                fq = fq * weight
            dfq, dfk = backward.tile(tile, fq, dn, dd)
            if dfq is not None:
                if need_weight:
                    each = torch.linalg.vecdot(dfq, fq)
                    linear[rows] += each.view(len(q_r), -1).sum(-1)
                    if dlogits is not None and weight is not None:  # the bound passes no gradient
                        bounded = weight[..., 0] >= math.exp(QUERY_BOUND)
                        dlogits[rows, at] = each.masked_fill_(bounded, 0).view(len(q_r), -1, 1)
                if weight is not None:
                    dfq *= weight
                dx = None if dq_r is None else dq_r[:, at]
                dfq = dfq.view(len(q_r), -1, dfq.shape[-1])
                inputs, totals = (q_r[:, at], *of[:2], None), (dx, *dof[:2], None)
                add_feature_gradients(plan.config, phi_q[rows, at], dfq, inputs, totals)
            if dfk is not None:
                dx = None if dk_r is None else dk_r[:, own]
                add_feature_gradients(plan.config, phi_k[rows, own], dfk, (k_r[:, own], *of[2:]), (dx, *dof[2:]))
        if dstart is not None:
            dstart[rows] = torch.cat([backward.dsums[:, 0], backward.dnorms[:, 0, :, None]], -1)
    # All weights of a query times their gradients sum to 0: what the window's give is what the linear ones lack.
    dgamma = (-linear / gamma if need_gamma else torch.zeros_like(gamma)) if needs[3] else None
    dfactor = linear / factor if need_factor and factor is not None else None
    front = k.shape[1] - q.shape[1]
    dk, dv = (None if x is None else x[:, front:] for x in (dk, dv))
    dq, dk, dv, dlogits = (None if x is None else x[:, :time] for x in (dq, dk, dv, dlogits))
    dlogits = None if dlogits is None else dlogits[..., 0]
    found = dq, dk, dv, dgamma, dfactor, dlogits, dstart, *dof_features
    return [q.new_empty(0) if x is None else x.contiguous() for x in found]


@_backward.register_fake
def _backward_fake(grad: Tensor, results: Any, tensors: Any, needs: Any, *options: Any) -> list[Tensor]:
    return [grad.new_empty(x.shape if need and x is not None else 0) for x, need in zip(tensors, needs, strict=True)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out, _, _, *kept = output
    ctx.save_for_backward(out, *kept, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS + 1 :]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros in the size of all that is kept


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * (_TENSORS + 1 + len(ctx.options))
    saved = ctx.saved_tensors  # only once: checkpointing computes them when asked
    results, tensors = saved[:-_TENSORS], saved[-_TENSORS:]
    needs = [need and x is not None for need, x in zip(ctx.needs_input_grad[:_TENSORS], tensors, strict=True)]
    with torch.autocast(grad.device.type, enabled=False):  # sums stay in fp32
        found = _backward(grad, results, tensors, needs, *ctx.options)
    gradients = [x if need else None for x, need in zip(found, needs, strict=True)]
    return *gradients, *(None for _ in range(1 + len(ctx.options)))


block_attention.register_autograd(_differentiate, setup_context=_setup)


def _weight(tile: Tile, factor: Tensor | None, share: Tensor, rows: slice) -> Tensor | None:
    """Of the linear term, [r m, L or 1, 1]; None: 1."""
    if factor is not None:
        return factor[rows].repeat_interleave(tile.last - tile.first)[:, None, None]
    return tile.queries(share[rows]) if len(share) else None


def _some(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]
