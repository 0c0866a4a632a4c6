"""A linear term that was tried and is not in the product: a memory that is corrected by the (gated) delta rule.

Where the product's linear term sums what it has seen, this one holds a matrix S that predicts a key's value, and every
key that leaves the window corrects it (arXiv 2406.06484; with a decay it forgets too, arXiv 2412.06464):

    S_j = a_j (S_j-1 - b_j phi_j phi_j^T S_j-1) + b_j phi_j v_j^T
    y_n = (the window's sum + e_n S^T phi_n) / (the window's mass + e_n)

phi are Hedgehog's features of length 1; e_n = exp(l + u . q_n), on the softmax's scale, is the mass that is given to
all older keys together; b_j = sigmoid(w . k_j). The parameters are those of the linear factor "exp", so both are
compared at equal parameters and, but for the norms z, equal states.

Shapes: B batch, H query heads, K key heads, T time, D head, F' features; C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from lolcats_kernels import HybridMaps, hybrid
from lolcats_kernels.equation import bounded_exp, key_masks, repeat_heads, safe_divide
from lolcats_kernels.softmax import AttentionSpec, softmax_scores
from lolcats_kernels.spec import CallSpec
from torch import Tensor
from torch.nn.functional import normalize, pad

from lolcats_cli.stages.activations import Batch
from lolcats_cli.stages.layer_start import _row
from lolcats_cli.teacher.record import LayerInfo

CHUNK = 64


@contextmanager
def delta_rule() -> Iterator[None]:
    """Transfers that are made while it is open have this attention."""
    with patch.dict(hybrid._BACKENDS, chunked=attention):
        yield


@torch.no_grad()
def at_older_mass(
    maps: dict[int, HybridMaps], batches: Iterable[dict[int, Batch]], layers: Sequence[LayerInfo]
) -> None:
    """The start: l is the log of the mass that the softmax gives the older keys together, its mean over a row."""
    batch = next(iter(batches))
    for layer, of_layer in maps.items():
        q, k, old = _row(batch[layer], of_layer)
        scores = softmax_scores(q, k, layers[layer].spec).masked_fill(~old, -torch.inf)
        of_layer.linear_logit.copy_(scores.logsumexp(-1)[0][:, old.any(-1)].mean(-1))


def attention(
    q: Tensor, k: Tensor, v: Tensor, maps: HybridMaps, spec: CallSpec, *, sinks: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    """q [B, H, T, D], k and v [B, K, T, D] -> (out [B, H, T, D], None): whole rows without padding or sinks."""
    assert sinks is None and options["valid"] is None and options["initial_state"] is None
    older = recalled(q, k, v, maps)
    position = torch.arange(q.shape[2])
    window, old = key_masks(position, position, maps.config)
    scores = softmax_scores(q, k, AttentionSpec(spec.scaling)).masked_fill(~window, -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp() * spec.has_window
    logits = maps.query_logits(q)
    assert logits is not None
    mass = bounded_exp(logits[..., None] - largest) * old.any(-1)[:, None] * spec.has_linear
    numerator = weights @ repeat_heads(v, q.shape[1]) + mass * older
    return safe_divide(numerator, weights.sum(-1, keepdim=True) + mass), None


def recalled(q: Tensor, k: Tensor, v: Tensor, maps: HybridMaps) -> Tensor:
    """What the memory of the keys before each query's (sliding) window gives it, [B, H, T, D]."""
    time, heads, late = q.shape[2], q.shape[1], maps.config.window
    strength, decay = maps.key_logits(k), maps.decays(k)
    assert strength is not None
    shape = *strength.shape, 1
    keys = normalize(maps._features(repeat_heads(k, heads), "k"), dim=-1)
    decay = torch.zeros(shape) if decay is None else decay.view(shape)
    parts = keys, repeat_heads(v, heads), strength.sigmoid().view(shape), decay
    # Query n sees the keys up to n - window; behind the padding, those of the same position.
    keys, values, strength, decay = (pad(x, (0, 0, late, 0))[:, :, :time] for x in parts)
    queries = normalize(maps.q_features(q), dim=-1)
    state, found = torch.zeros(*q.shape[:2], keys.shape[-1], values.shape[-1]), []
    for start in range(0, time, CHUNK):
        chunk = slice(start, start + CHUNK)
        out, state = _chunk(*(x[:, :, chunk] for x in (queries, keys, values, strength, decay)), state)
        found.append(out)
    return torch.cat(found, 2)


def _chunk(
    queries: Tensor, keys: Tensor, values: Tensor, strength: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """C tokens at once, by the WY form (arXiv 2412.06464, section 3.3) -> what they are given, and the state after."""
    entered = decay.cumsum(2)  # of what was in the state before, each token has forgotten exp(-entered)
    later = torch.exp(-(entered - entered.transpose(2, 3)).clamp(min=0))
    system = torch.eye(keys.shape[2]) + (strength * keys @ keys.transpose(2, 3) * later).tril(-1)
    right = strength * torch.cat((values, keys * torch.exp(-entered)), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    new, of_state = solved.split((values.shape[-1], keys.shape[-1]), -1)
    new = new - of_state @ state
    out = (queries * torch.exp(-entered)) @ state + (queries @ keys.transpose(2, 3) * later).tril() @ new
    last = entered[:, :, -1:]
    return out, torch.exp(-last) * state + (keys * torch.exp(entered - last)).transpose(2, 3) @ new
