"""Hybrid attention by Triton kernels, forward and backward, registered with torch.

Letters: see ../README.md and `triton_parts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .maps import HybridMaps
from .rows import RowResults, attend_in_rows
from .spec import CallSpec, op_name
from .state import KeySums, KVState, records_gradients
from .triton_decoding import triton_decode_step
from .triton_launches import Inputs, OfOutputs, Results, backward, forward, needed_room
from .triton_parts import PRECISIONS, contiguous, from_kernel_order, to_kernel_order

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? q_slope, Tensor? k_slope, Tensor? linear_logit, Tensor? decay_slope, Tensor? decay_bias, Tensor gamma, "
    "Tensor linear_weight, Tensor? initial_sums, Tensor? initial_norms, Tensor? sinks"
)


def _decoded(arguments: Sequence[Any]) -> tuple[Inputs, Tensor, int, CallSpec]:
    """What `_forward` takes."""
    inputs, (num_summed, waiting, *spec) = arguments[: len(Inputs._fields)], arguments[len(Inputs._fields) :]
    return Inputs(*inputs), num_summed, waiting, CallSpec.decode(*spec)


@torch.library.custom_op(
    op_name(__name__, "forward"),
    mutates_args=(),
    schema=(
        f"({_INPUTS}, Tensor num_summed, int waiting, {CallSpec.SCHEMA}) -> "
        f"({', '.join(['Tensor'] * len(Results._fields))})"
    ),
)
def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Rows without gaps. Takes `Inputs`; num_summed [B]: how many first keys of each row enter S and z; waiting: as for
    `Rows`, 0 for gradients; the encoded spec. Returns the tensors of `Results`."""
    return forward(*_decoded(arguments))


@_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, _, spec = _decoded(arguments)
    return Results.room(inputs, spec)


@torch.library.custom_op(
    op_name(__name__, "backward"),
    mutates_args=(),
    schema=(
        "(Tensor[] given, Tensor[] made, Tensor?[] inputs, Tensor num_summed, bool[] needs, "
        f"{CallSpec.SCHEMA}) -> ({', '.join(['Tensor'] * len(Inputs._fields))})"
    ),
)
def _backward(
    given: Sequence[Tensor],
    made: Sequence[Tensor],
    inputs: Sequence[Tensor | None],
    num_summed: Tensor,
    needs: Sequence[bool],
    *spec: Any,
) -> tuple[Tensor, ...]:
    """Takes the tensors of `OfOutputs` and `Results`. Returns the gradients of `Inputs`, empty where none is needed."""
    x, wanted = Inputs(*inputs), Inputs(*needs)  # type: ignore[arg-type]
    return _empty_for_none(
        x, backward(OfOutputs(*given), Results(*made), x, num_summed, wanted, CallSpec.decode(*spec))
    )


@_backward.register_fake
def _(given: Any, made: Any, inputs: Any, num_summed: Any, needs: Any, *spec: Any) -> tuple[Tensor, ...]:
    x = Inputs(*inputs)
    return _empty_for_none(x, needed_room(x, Inputs(*needs)))


def _empty_for_none(inputs: Inputs, gradients: Inputs) -> tuple[Tensor, ...]:
    return tuple(inputs.gamma.new_empty(0) if x is None else x for x in gradients)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, num_summed, waiting, spec = _decoded(inputs)
    assert not waiting
    made = Results(*output)
    ctx.spec = spec.encode()
    ctx.save_for_backward(num_summed, *made, *given)
    ctx.mark_non_differentiable(made.m, made.m_index, made.inv_denominator)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad: Tensor | None, dsums: Tensor | None, dnorms: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    num_summed, *saved = ctx.saved_tensors
    made, inputs = Results(*saved[: len(Results._fields)]), saved[len(Results._fields) :]
    needs = [bool(need) for need in ctx.needs_input_grad[: len(Inputs._fields)]]
    grad = torch.zeros_like(made.out) if grad is None else grad
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    of_sums = (
        torch.zeros_like(x) if given is None else given.contiguous()
        for x, given in ((made.sums, dsums), (made.norms, dnorms))
    )
    found = _backward([grad, *of_sums], list(made), inputs, num_summed, needs, *ctx.spec)
    gradients = (x if need else None for x, need in zip(found, needs, strict=True))
    return *gradients, *(None for _ in range(2 + len(ctx.spec)))  # num_summed, waiting, the spec


_forward.register_autograd(_differentiate, setup_context=_setup)


def _triton_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    sinks: Tensor | None,
    initial_state: KVState | None,
    num_summed: Tensor | None,
    waiting: int,
) -> RowResults:
    """Rows without gaps, as `attend_in_rows` asks for."""
    record = maps.feature_map
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    of_q, of_k = maps.q_parameters(torch.float32), maps.k_parameters(torch.float32)
    gamma, linear_weight = maps.term_weights()
    initial_sums = initial_norms = None
    if initial_state is not None:
        initial_sums = to_kernel_order(initial_state.sums, record)
        initial_norms = to_kernel_order(initial_state.norms[..., None], record)[..., 0].contiguous()
    if num_summed is None:
        num_summed = torch.full((q.shape[0],), q.shape[2], device=q.device)
    inputs = Inputs(
        q=q,
        k=k,
        v=v,
        q_weight=contiguous(of_q.weight),
        k_weight=contiguous(of_k.weight),
        q_bias=contiguous(of_q.bias),
        k_bias=contiguous(of_k.bias),
        q_slope=contiguous(maps.parameter("q_slope", torch.float32)),
        k_slope=contiguous(of_k.slope),
        linear_logit=contiguous(maps.parameter("linear_logit", torch.float32)),
        decay_slope=contiguous(maps.parameter("decay_slope", torch.float32)),
        decay_bias=contiguous(maps.parameter("decay_bias", torch.float32)),
        gamma=gamma,
        linear_weight=linear_weight if spec.has_linear else torch.zeros_like(gamma),
        initial_sums=initial_sums,
        initial_norms=initial_norms,
        sinks=contiguous(sinks) if spec.has_window else None,
    )
    made = Results(*_forward(*inputs, num_summed, waiting, *spec.encode()))
    sums = from_kernel_order(made.sums, record, maps.feature_dim)
    norms = from_kernel_order(made.norms[..., None], record, maps.feature_dim)[..., 0]
    return RowResults(made.out, KeySums(sums, norms))


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    spec: CallSpec,
    *,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
    initial_state: KVState | None = None,
    return_state: bool = False,
    consume_state: bool = False,
    waiting: int = 0,
) -> tuple[Tensor, KVState | None]:
    """Hybrid attention by Triton kernels; arguments as for `hybrid_attention`."""
    if q.dtype not in PRECISIONS:
        raise ValueError(f"The backend triton takes {', '.join(map(str, PRECISIONS))}; got {q.dtype}.")
    records = records_gradients(maps, initial_state, q, k, v)
    if initial_state is not None and q.shape[2] == 1 and not records:
        return triton_decode_step(
            *(q, k, v, maps, spec),
            sinks=sinks,
            valid=valid,
            initial_state=initial_state,
            return_state=return_state,
            consume_state=consume_state,
        )
    if valid is not None and bool(valid.all()):
        valid = None
    return attend_in_rows(
        partial(_triton_rows, sinks=sinks),
        *(q, k, v, maps, spec),
        valid=valid,
        initial_state=initial_state,
        return_state=return_state,
        waiting=0 if records else waiting,
    )
