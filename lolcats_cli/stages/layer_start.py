"""Sets where the training of a layer's linear term starts.

With the linear factor "exp" the term starts with the mass that softmax attention gives the keys before the window. A
head's mass of some keys is the sum of their weights before they are divided by the denominator. A decay starts with the
distance at which softmax attention looks back.

Shapes: B batch, H query heads, T time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from lolcats_kernels import HybridMaps
from lolcats_kernels.equation import forgetting, key_masks
from lolcats_kernels.softmax import softmax_scores
from torch import Tensor

from lolcats_cli.stages.activations import Batch
from lolcats_cli.teacher.record import LayerInfo

OFF = -1e4  # the linear_logit of a head without linear term: its exponential is 0
# The limits of `start_at_softmax_mass`: the tokens of a row that it looks at (its memory is quadratic in them), the
# number of rows, and the number of queries with keys before the window that it needs of every head.
FIT_TOKENS, FIT_ROWS, FIT_QUERIES = 2048, 64, 256


@torch.no_grad()
def start_at_softmax_mass(
    maps: dict[int, HybridMaps], batches: Iterable[dict[int, Batch]], layers: Sequence[LayerInfo]
) -> None:
    """Sets each head's `linear_logit` so that the linear term has the softmax's mass, by the mean log over queries.

    A layer looks at one row after the other, until every head has seen `FIT_QUERIES` queries with keys before the
    window. A head that has seen none is switched off.
    """
    sums = {layer: torch.zeros(2, m.num_heads, device=m.linear_logit.device) for layer, m in maps.items()}
    wanting = set(maps)
    for batch in islice(batches, FIT_ROWS):
        for layer in sorted(wanting):
            gap = _mass_gap(batch[layer], maps[layer], layers[layer])
            usable = gap.isfinite()
            sums[layer] += torch.stack([torch.where(usable, gap, 0).sum(-1), usable.sum(-1)])
            if sums[layer][1].min() >= FIT_QUERIES:
                wanting.remove(layer)
        if not wanting:
            break
    for layer, (total, count) in sums.items():
        maps[layer].linear_logit.copy_(torch.where(count > 0, total / count.clamp(min=1), OFF))


@torch.no_grad()
def start_at_softmax_distance(
    maps: dict[int, HybridMaps], batches: Iterable[dict[int, Batch]], layers: Sequence[LayerInfo]
) -> None:
    """Sets each head's `decay_bias` so that its sums fall by 1/e over the mean distance, in keys, at which the softmax
    looks back beyond the window, in one row."""
    batch = next(iter(batches))
    for layer, of_layer in maps.items():
        q, k, old = _row(batch[layer], of_layer)
        scores = softmax_scores(q, k, layers[layer].spec)
        weights = torch.where(old, (scores - scores.logsumexp(-1, keepdim=True)).exp(), 0)[0]
        later = (old.sum(-1, keepdim=True) - old.cumsum(-1)).float()  # keys of `old` after each
        distance = (weights * later).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1e-9)
        of_layer.decay_bias.copy_(torch.expm1(1 / (1 + distance)).log())  # the inverse of softplus


def _row(batch: Batch, maps: HybridMaps) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, H, T, D] and k [1, K, T, D] of the real tokens of a batch's first row, and which keys are before a query's
    window, bool [T, T]."""
    keep = slice(FIT_TOKENS) if batch.valid is None else batch.valid[0].nonzero()[:FIT_TOKENS, 0]
    device = next(maps.parameters()).device
    q, k = (x[:1, :, keep].to(device) for x in (batch.q, batch.k))
    position = torch.arange(q.shape[2], device=device)
    return q, k, key_masks(position, position, maps.config).older


def _mass_gap(batch: Batch, maps: HybridMaps, info: LayerInfo) -> Tensor:
    """By how much the linear term's log mass is smaller than the softmax's, for each query of the batch's first row.

    Both are the mass of the keys before the window. Returns [H, T]. A query without such keys has a value that is not
    finite.
    """
    q, k, old = _row(batch, maps)
    wanted = softmax_scores(q, k, info.spec).masked_fill(~old, -torch.inf).logsumexp(-1)
    weights, g = maps.q_features(q) @ maps.k_features(k).transpose(-1, -2) * old, maps.decays(k)
    if g is not None:
        weights = weights * torch.exp(-forgetting(g, old.sum(-1), old).of_keys)
    given = weights.sum(-1).log()
    return (wanted - given)[0]
