"""The attention of the chunked path, forward and backward: linear time; memory for inputs, features, sums and outputs.

Letters: see ../README.md; R = B H rows, r rows of a slice, c chunks of a tile, P chunks in a band (see `torch_tiles`).

Keys of a query's band that are older than its window enter the linear term one by one; the chunks before the band enter
it by their sums S and z, running sums over chunks. Rows are handled in slices, on CPU one after the other, in tiles of
some chunks: weights, and the gradients of features and sums, are those of one slice or tile, and stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .equation import bounded_exp
from .maps import MapParameters
from .spec import QUERY_BOUND, CallSpec, op_name
from .state import KeySums
from .torch_backward import SliceGradients
from .torch_features import add_feature_gradients, features_into
from .torch_tiles import Plan, RowSlice, Tile, pad_chunks


class Inputs(NamedTuple):
    """What `chunked_forward` differentiates: tensors of one dtype, fp32 or fp64. Also their gradients."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, K, T, D]
    v: Tensor  # [B, K, T, Dv]
    gamma: Tensor  # [H]
    linear_weight: Tensor | None  # [H]; None: 1
    query_logits: Tensor | None  # [B, H, T], with "exp"
    initial_sums: Tensor | None  # [B, H, F', Dv]
    initial_norms: Tensor | None  # [B, H, F']
    q_weight: Tensor | None  # [H, D, F]
    q_bias: Tensor | None  # [H, F]
    k_weight: Tensor | None
    k_bias: Tensor | None
    k_slope: Tensor | None  # [H, D]
    sinks: Tensor | None  # [H]; None where there is no window

    @property
    def of_q(self) -> MapParameters:
        return MapParameters(self.q_weight, self.q_bias, None)

    @property
    def of_k(self) -> MapParameters:
        return MapParameters(self.k_weight, self.k_bias, self.k_slope)


class Kept(NamedTuple):
    """What backward needs besides the inputs and out, of whole chunks; of the last slice alone if nothing is kept."""

    phi_q: Tensor  # [R, M L, F']
    phi_k: Tensor  # [R, (P - 1 + M) L, F'], zeros in front
    sums: Tensor  # [R, M, F', Dv]: S in front of every chunk's band
    norms: Tensor  # [R, M, F']: z
    linear_weight: Tensor  # [R, M L, 1], with "exp"
    inv_denominator: Tensor  # [R, M L, 1]; 0 where nothing was summed
    m: Tensor  # [R, M L, 1]: c_n


class Results(NamedTuple):
    """out [B, H, T, Dv]; S and z over the keys that were asked for, [B, H, F', Dv] and [B, H, F'], without gradients;
    and what is kept."""

    out: Tensor
    sums: Tensor
    norms: Tensor
    kept: Kept

    @classmethod
    def of(cls, out: Tensor, sums: Tensor, norms: Tensor, *kept: Tensor) -> Results:
        return cls(out, sums, norms, Kept(*kept))


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor gamma, Tensor? linear_weight, Tensor? query_logits, Tensor? initial_sums, "
    "Tensor? initial_norms, Tensor? q_weight, Tensor? q_bias, Tensor? k_weight, Tensor? k_bias, Tensor? k_slope, "
    "Tensor? sinks"
)
_RESULTS = f"({', '.join(['Tensor'] * (3 + len(Kept._fields)))})"


def _plan(inputs: Inputs, spec: CallSpec, keep: bool) -> Plan:
    q, has_state = inputs.q, inputs.initial_sums is not None
    return Plan(spec, has_state, q.shape[1], inputs.k.shape[1], q.shape[2], q.device, q.dtype, keep)


def _room(plan: Plan, inputs: Inputs, with_sums: bool) -> Results:
    """Room for the results, out [R, M L, Dv] with the padding after it."""
    q, size = inputs.q, inputs.v.shape[3]
    rows, total = q.shape[0] * plan.num_heads, plan.chunks * plan.chunk
    record = plan.spec.config.map
    features = record.num_features(record.feature_dim(q.shape[3], plan.spec.config.feature_dim))
    # Without a backward these are of one slice at a time.
    held, width = rows if plan.keep else plan.tile_rows, features if plan.spec.has_linear else 0
    summed = (q.shape[0] if with_sums else 0), plan.num_heads, features
    kept = Kept(
        phi_q=q.new_empty(held, total, width),
        phi_k=q.new_empty(held, total + plan.front, width),
        sums=q.new_empty(held, plan.chunks if plan.has_sums else 0, width, size),
        norms=q.new_empty(held, plan.chunks if plan.has_sums else 0, width),
        linear_weight=q.new_empty(0 if inputs.query_logits is None else held, total, 1),
        inv_denominator=q.new_empty(held, total, 1),
        m=q.new_zeros(held, total, 1),
    )
    return Results(q.new_empty(rows, total, size), q.new_empty(*summed, size), q.new_empty(summed), kept)


@torch.library.custom_op(
    op_name(__name__, "forward"),
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? num_summed, bool keep, {CallSpec.SCHEMA}) -> {_RESULTS}",
)
def chunked_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Eq. 7 for rows without gaps. Takes `Inputs`; num_summed [B] or None: of how many first keys of each row S and z
    are wanted; keep: whether there will be a backward; the encoded spec. Returns the tensors of `Results`."""
    inputs, num_summed, keep, spec = _decoded(arguments)
    plan = _plan(inputs, spec, keep)
    out, *sums, kept = _room(plan, inputs, num_summed is not None)
    counts = None if num_summed is None else num_summed.tolist()
    rows = _in_rows(inputs, plan)
    kept.phi_k[:, : plan.front] = 0
    for part in plan.row_slices(len(out)):
        mine = Kept(*(x[part.rows] for x in kept)) if keep else kept
        _attend(plan, part, rows, out[part.rows], mine)
        if counts is not None:
            first = slice(plan.front, plan.front + counts[part.rows.start // plan.num_heads])
            summed, values = mine.phi_k[:, first], rows.v[part.keys, first]
            torch.matmul(summed.transpose(-1, -2), values, out=_rows(sums[0])[part.rows])
            torch.sum(summed, 1, out=_rows(sums[1])[part.rows])
    out = out[:, : inputs.q.shape[2]].contiguous().unflatten(0, inputs.q.shape[:2])
    return out, *sums, *kept


@chunked_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, num_summed, keep, spec = _decoded(arguments)
    out, *sums, kept = _room(_plan(inputs, spec, keep), inputs, num_summed is not None)
    return inputs.q.new_empty(*inputs.q.shape[:3], out.shape[2]), *sums, *kept


def _decoded(arguments: Sequence[Any]) -> tuple[Inputs, Tensor | None, bool, CallSpec]:
    """What `chunked_forward` takes."""
    inputs, (num_summed, keep, *spec) = arguments[: len(Inputs._fields)], arguments[len(Inputs._fields) :]
    return Inputs(*inputs), num_summed, keep, CallSpec.decode(*spec)


def _in_rows(inputs: Inputs, plan: Plan) -> Inputs:
    """With rows [R, ...], of whole chunks: q [R, M L, D], k and v with the zeros in front, query_logits [R, M L, 1]."""
    logits, sums, norms = inputs.query_logits, inputs.initial_sums, inputs.initial_norms
    return inputs._replace(
        q=pad_chunks(_rows(inputs.q), plan),
        k=pad_chunks(_rows(inputs.k), plan, plan.front),
        v=pad_chunks(_rows(inputs.v), plan, plan.front),
        query_logits=None if logits is None else pad_chunks(_rows(logits)[..., None], plan),
        initial_sums=None if sums is None else _rows(sums),
        initial_norms=None if norms is None else _rows(norms),
    )


def _attend(plan: Plan, part: RowSlice, inputs: Inputs, out: Tensor, kept: Kept) -> None:
    """Fills a slice's out and kept; inputs in rows."""
    spec, gamma = plan.spec, inputs.gamma[part.heads]
    q, k, v = inputs.q[part.rows], inputs.k[part.keys], inputs.v[part.keys]
    of_q, of_k = _of_heads(inputs.of_q, part.heads), _of_heads(inputs.of_k, part.heads)
    if inputs.query_logits is not None:
        kept.linear_weight.copy_(inputs.query_logits[part.rows])
    for tile in plan.tiles():
        at, own = tile.tokens, tile.own
        if spec.has_linear:
            features_into(kept.phi_q[:, at], spec.config.map, q[:, at], of_q)
            features_into(kept.phi_k[:, own], spec.config.map, k[:, own], of_k)
        if plan.has_sums:
            _fill_sums(tile, kept, v, _initial(inputs, part))
        weights = None
        if spec.has_window:
            scores = tile.scores(q, k)
            m = tile.of(kept.m)
            m.copy_(scores.amax(-1).view(m.shape))
            if inputs.sinks is not None:
                torch.maximum(m, tile.by_row(inputs.sinks[part.heads]), out=m)
            weights = tile.window(scores, kept.m, gamma)
        if inputs.query_logits is not None:
            logits = kept.linear_weight[:, at]
            logits.copy_(bounded_exp(logits.sub_(kept.m[:, at])))
        weighted_q = tile.queries(kept.phi_q)
        linear_weight = _linear_weight(tile, inputs, part, kept)
        if linear_weight is not None:
            weighted_q = weighted_q * linear_weight
        weights = tile.add_older(weights, weighted_q, kept.phi_k)
        y = weights @ tile.band(v, weights.shape[-1])
        denominator = weights.sum(-1, keepdim=True)
        if inputs.sinks is not None:
            denominator += tile.sink_weights(inputs.sinks[part.heads], kept.m, gamma)
        if plan.has_sums:
            y.baddbmm_(weighted_q, kept.sums[:, tile.chunks].flatten(0, 1))
            denominator += (weighted_q * kept.norms[:, tile.chunks].flatten(0, 1)[:, None]).sum(-1, keepdim=True)
        inverse = tile.of(kept.inv_denominator)
        inverse.copy_(torch.where(denominator > 0, denominator.reciprocal(), 0).view(inverse.shape))
        torch.mul(y.view(*inverse.shape[:-1], -1), inverse, out=tile.of(out))


def _fill_sums(tile: Tile, kept: Kept, v: Tensor, initial: KeySums | None) -> None:
    """S and z of the tile's chunks, over all keys before their bands, those of the initial state included."""
    plan = tile.plan
    first = max(tile.first, plan.reach)
    if tile.first < plan.reach:
        begin = slice(tile.first, min(first, tile.last))
        kept.sums[:, begin], kept.norms[:, begin] = (0, 0) if initial is None else (x[:, None] for x in initial)
    if first < tile.last:
        left = slice((first - 1) * plan.chunk, (tile.last - 1) * plan.chunk)
        keys, values = (x[:, left].unflatten(1, (-1, plan.chunk)) for x in (kept.phi_k, v))
        # A loop: on CPU, cumsum over a dimension that is not the last takes several times as long.
        after = kept.sums[:, first - 1 : tile.last].unbind(1)
        for chunk, product in enumerate((keys.transpose(-1, -2) @ values).unbind(1)):
            torch.add(after[chunk], product, out=after[chunk + 1])
        kept.norms[:, first : tile.last] = keys.sum(2).cumsum(1) + kept.norms[:, first - 1, None]


@torch.library.custom_op(
    op_name(__name__, "backward"),
    mutates_args=(),
    schema=f"(Tensor grad, Tensor out, Tensor[] kept, Tensor?[] inputs, bool[] needs, {CallSpec.SCHEMA}) -> Tensor[]",
)
def _chunked_backward(
    grad: Tensor,
    out: Tensor,
    kept: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
    *spec: Any,
) -> list[Tensor]:
    """Gradients of `Inputs`, empty where they are not needed; grad and out [B, H, T, Dv]."""
    given = Inputs(*inputs)  # type: ignore[arg-type]
    plan = _plan(given, CallSpec.decode(*spec), keep=True)
    rows, out, grad = _in_rows(given, plan), *(pad_chunks(_rows(x), plan) for x in (out, grad))
    zeros = [x.new_zeros(x.shape) if need and x is not None else None for x, need in zip(rows, needs, strict=True)]
    totals = Inputs(*zeros)  # type: ignore[arg-type]
    for part in plan.row_slices(len(out)):
        mine = Kept(*(x[part.rows] for x in kept))
        _add_gradients(plan, part, rows, mine, out[part.rows], grad[part.rows], totals)
    starts = {"q": 0, "k": plan.front, "v": plan.front, "query_logits": 0}  # of the tokens
    found = []
    for (name, total), x in zip(totals._asdict().items(), given, strict=True):
        if total is None or x is None:
            found.append(grad.new_empty(0))
            continue
        if name in starts:
            total = total[:, starts[name] : starts[name] + plan.time]
        found.append(total.reshape(x.shape).contiguous())
    return found


@_chunked_backward.register_fake
def _(grad: Tensor, out: Tensor, kept: Any, inputs: Any, needs: Any, *spec: Any) -> list[Tensor]:
    return [grad.new_empty(x.shape if need and x is not None else 0) for x, need in zip(inputs, needs, strict=True)]


def _add_gradients(
    plan: Plan, part: RowSlice, inputs: Inputs, kept: Kept, out: Tensor, grad: Tensor, totals: Inputs
) -> None:
    """Adds a slice's gradients to totals, where these are not None; inputs and totals in rows."""
    spec, record = plan.spec, plan.spec.config.map
    q, k = inputs.q[part.rows], inputs.k[part.keys]
    dq, dk, dv = _some(totals.q, part.rows), _some(totals.k, part.keys), _some(totals.v, part.keys)
    of_q, of_k, dof_q, dof_k = (_of_heads(x, part.heads) for x in (inputs.of_q, inputs.of_k, totals.of_q, totals.of_k))
    # Of the linear weight or what it is made of. gamma's comes from it too, and cancels where there is one term alone.
    need_gamma = totals.gamma is not None and spec.has_window and spec.has_linear
    m_has_gradient = inputs.query_logits is None
    need_linear_weight = need_gamma or totals.linear_weight is not None or totals.query_logits is not None
    need_linear_weight |= totals.sinks is not None and m_has_gradient and spec.has_linear
    backward = SliceGradients(
        *(plan, q, k, inputs.v[part.keys], kept.phi_k, kept.sums, kept.norms, inputs.gamma[part.heads]),
        *(_some(inputs.sinks, part.heads), kept.m, dq, dk, dv),
        need_phi_q=spec.has_linear and (need_linear_weight or dq is not None or _any(dof_q)),
        need_phi_k=spec.has_linear and (dk is not None or _any(dof_k)),
        m_has_gradient=m_has_gradient,
    )
    dlog_weight = q.new_zeros(len(q))  # of the linear weight, summed over the queries
    for tile in reversed(plan.tiles()):
        at, own = tile.tokens, tile.own
        # y = n / d: dn = dy / d, and dd = -(dy . y) / d.
        dn = tile.queries(grad) * tile.queries(kept.inv_denominator)
        dd = (dn * tile.queries(out)).sum(-1, keepdim=True).neg_()
        weighted_q = tile.queries(kept.phi_q)
        linear_weight = _linear_weight(tile, inputs, part, kept)
        if linear_weight is not None:
            weighted_q = weighted_q * linear_weight
        dweighted_q, dphi_k = backward.tile(tile, weighted_q, dn, dd)
        each = None
        if dweighted_q is not None:
            if need_linear_weight:
                each = torch.linalg.vecdot(dweighted_q, weighted_q).view(len(q), -1)
                dlog_weight += each.sum(-1)
            if totals.query_logits is not None and each is not None:  # the bound passes no gradient
                bounded = kept.linear_weight[:, at] >= math.exp(QUERY_BOUND)
                totals.query_logits[part.rows, at] = each[..., None].masked_fill(bounded, 0)
            if linear_weight is not None:
                dweighted_q *= linear_weight
            dphi_q = dweighted_q.view(len(q), -1, dweighted_q.shape[-1])
            dx = None if dq is None else dq[:, at]
            add_feature_gradients(record, kept.phi_q[:, at], dphi_q, q[:, at], of_q, dx, dof_q)
        if totals.sinks is not None and inputs.sinks is not None:
            sinks = inputs.sinks[part.heads]
            dsinks = (tile.sink_weights(sinks, kept.m, inputs.gamma[part.heads]) * dd).view(len(q), -1)
            if each is not None and m_has_gradient:  # of c_n, which is the linear term's: all gradients sum to 0
                dsinks += each * (sinks[:, None] >= kept.m[:, at, 0])
            totals.sinks[part.heads] += dsinks.sum(-1)
        if dphi_k is not None:
            dx = None if dk is None else dk[:, own]
            add_feature_gradients(record, kept.phi_k[:, own], dphi_k, k[:, own], of_k, dx, dof_k)
    # All weights of a query times their gradients sum to 0: what the window's give is what the linear ones lack.
    if totals.gamma is not None and need_gamma:
        totals.gamma[part.heads] -= dlog_weight / inputs.gamma[part.heads]
    if totals.linear_weight is not None and inputs.linear_weight is not None:
        totals.linear_weight[part.heads] += dlog_weight / inputs.linear_weight[part.heads]
    if totals.initial_sums is not None:
        totals.initial_sums[part.rows] = backward.dsums[:, 0]
    if totals.initial_norms is not None:
        totals.initial_norms[part.rows] = backward.dnorms[:, 0]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, _, _, spec = _decoded(inputs)
    out, _, _, *kept = output
    ctx.save_for_backward(out, *kept, *given)
    ctx.spec = spec.encode()
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros in the size of all that is kept


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    others = (None,) * (2 + len(ctx.spec))  # num_summed, keep, the spec
    if grad is None:
        return *(None for _ in Inputs._fields), *others
    out, *saved = ctx.saved_tensors  # only once: checkpointing computes them when asked
    kept, inputs = saved[: len(Kept._fields)], saved[len(Kept._fields) :]
    needs = [need and x is not None for need, x in zip(ctx.needs_input_grad, inputs, strict=False)]
    with torch.autocast(grad.device.type, enabled=False):  # sums stay in fp32
        found = _chunked_backward(grad, out, kept, inputs, needs, *ctx.spec)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), *others


chunked_forward.register_autograd(_differentiate, setup_context=_setup)


def _rows(x: Tensor) -> Tensor:
    """[B, H, ...] -> [R, ...]; of contiguous tensors a view."""
    return x.flatten(0, 1)


def _some(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _of_heads(parameters: MapParameters, heads: slice) -> MapParameters:
    return MapParameters(*(_some(x, heads) for x in parameters))


def _any(parameters: MapParameters) -> bool:
    return any(x is not None for x in parameters)


def _initial(inputs: Inputs, part: RowSlice) -> KeySums | None:
    """S and z of the initial state, of a slice's rows."""
    if inputs.initial_sums is None or inputs.initial_norms is None:
        return None
    return KeySums(inputs.initial_sums[part.rows], inputs.initial_norms[part.rows])


def _linear_weight(tile: Tile, inputs: Inputs, part: RowSlice, kept: Kept) -> Tensor | None:
    """λ, [r c, L or 1, 1]; None: 1."""
    if inputs.linear_weight is not None:
        return inputs.linear_weight[part.heads].repeat_interleave(tile.last - tile.first)[:, None, None]
    return None if inputs.query_logits is None else tile.queries(kept.linear_weight)
