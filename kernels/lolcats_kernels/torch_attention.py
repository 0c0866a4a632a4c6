"""Hybrid attention in linear time and memory, in PyTorch. It runs where there is no faster kernel.

Letters: see ../README.md. `torch_chunks` computes rows of tokens, `torch_decay` those of maps with a decay, and
`torch_decoding` one token after a state.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .equation import repeat_heads
from .maps import HybridMaps
from .rows import RowResults, attend_in_rows
from .spec import CallSpec, compute_dtype
from .state import KeySums, KVState, masked_sums
from .torch_chunks import Inputs, Results, chunked_forward
from .torch_decay import decaying_rows
from .torch_decoding import decode_step


def _chunked_rows(
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
    dtype, state = compute_dtype(q.dtype), initial_state
    if q.device.type != "cpu":
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    gamma, linear_weight = maps.term_weights(dtype)
    of_q, of_k = maps.q_parameters(dtype), maps.k_parameters(dtype)
    has_state = state is not None and spec.has_linear
    inputs = Inputs(
        q=q.to(dtype),
        k=k.to(dtype),
        v=v.to(dtype),
        gamma=gamma,
        linear_weight=linear_weight if spec.config.linear_factor == "affine" else None,
        query_logits=maps.query_logits(q) if spec.has_linear and spec.has_window else None,
        initial_sums=state.sums if state is not None and has_state else None,
        initial_norms=state.norms if state is not None and has_state else None,
        q_weight=of_q.weight,
        q_bias=of_q.bias,
        k_weight=of_k.weight,
        k_bias=of_k.bias,
        k_slope=of_k.slope,
        sinks=sinks if spec.has_window else None,
    )
    # The sums of a state come with the attention, unless autograd follows them or nothing else needs the features.
    together = spec.has_linear and not torch.is_grad_enabled()
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    results = Results.of(*chunked_forward(*inputs, num_summed if together else None, keep, *spec.encode()))
    if num_summed is None:
        return RowResults(results.out, None)
    if not together:
        first = torch.arange(k.shape[2], device=k.device) < num_summed[:, None]
        return RowResults(results.out, masked_sums(maps.k_features(k), v, first, state))
    sums, norms = results.sums, results.norms
    return RowResults(
        results.out, KeySums(sums, norms) if state is None else KeySums(sums + state.sums, norms + state.norms)
    )


def chunked_attention(
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
    """Hybrid attention by chunks, or of one token after a state; arguments as for `hybrid_attention`."""
    step = initial_state is not None and q.shape[2] == 1
    # A compiled step cannot ask.
    if valid is not None and not (step and torch.compiler.is_compiling()) and bool(valid.all()):
        valid = None
    if initial_state is not None and step:
        return decode_step(
            *(q, k, v, maps, spec),
            sinks=sinks,
            valid=valid,
            initial_state=initial_state,
            return_state=return_state,
            consume_state=consume_state,
        )
    rows = decaying_rows if maps.config.decay else _chunked_rows
    return attend_in_rows(
        partial(rows, sinks=sinks),
        *(q, k, v, maps, spec),
        valid=valid,
        initial_state=initial_state,
        return_state=return_state,
        waiting=waiting,
    )
