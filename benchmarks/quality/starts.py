"""Other starts of the maps than the recipe's (`layer_start.start_at_softmax_mass`), to be compared with it.

Shapes: H query heads, T time, D head, N queries or keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from lolcats_kernels import HybridMaps
from lolcats_kernels.equation import key_masks, repeat_heads
from lolcats_kernels.softmax import softmax_scores
from torch import Tensor

from lolcats_cli.stages.activations import Batch
from lolcats_cli.stages.layer_start import start_at_softmax_mass as at_softmax_mass
from lolcats_cli.teacher.record import LayerInfo

Maps, Batches = dict[int, HybridMaps], Iterable[dict[int, Batch]]  # by layer


def at_zero(maps: Maps, batches: Batches, layers: Sequence[LayerInfo]) -> None:
    """As the parameters are made: every weight of the linear term is 1."""


@torch.no_grad()
def twice_the_identity(maps: Maps, batches: Batches, layers: Sequence[LayerInfo]) -> None:
    """Sharper features, then the recipe's start."""
    for layer_maps in maps.values():
        layer_maps.q_weight.mul_(2)
        layer_maps.k_weight.mul_(2)
    at_softmax_mass(maps, batches, layers)


@torch.no_grad()
def least_squares(maps: Maps, batches: Batches, layers: Sequence[LayerInfo]) -> None:
    """w, then lambda and u, from least squares over one row: of the log of what a key (a query) weighs in all in the
    softmax, less that in the linear term, on the key (the query) itself."""
    batch = next(iter(batches))
    for layer, layer_maps in maps.items():
        _least_squares(layer_maps, batch[layer], layers[layer])


def _least_squares(maps: HybridMaps, batch: Batch, info: LayerInfo) -> None:
    q, k = batch.q[:1], batch.k[:1]
    position = torch.arange(q.shape[2])
    _, old = key_masks(position, position, maps.config)
    scores = softmax_scores(q, k, info.spec).masked_fill(~old, -torch.inf)

    def gap(dim: int) -> Tensor:
        linear = maps.q_features(q) @ maps.k_features(k).transpose(-1, -2) * old
        return (scores.logsumexp(dim) - linear.sum(dim).log())[0]

    _, slope = _regression(repeat_heads(k, maps.num_heads)[0], gap(-2))
    maps.k_slope.copy_(slope)
    intercept, slope = _regression(q[0], gap(-1))
    maps.q_slope.copy_(slope)
    maps.linear_logit.copy_(intercept)


def _regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(intercept [H], slope [H, D]) of y [H, N] on x [H, N, D], where y is finite, with a little ridge."""
    fits = []
    for x_head, y_head in zip(x, y, strict=True):
        usable = y_head.isfinite()
        x_mean, y_mean = x_head[usable].mean(0), y_head[usable].mean()
        centred = x_head[usable] - x_mean
        gram = centred.T @ centred
        gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        slope = torch.linalg.solve(gram, centred.T @ (y_head[usable] - y_mean))
        fits.append((y_mean - slope @ x_mean, slope))
    intercepts, slopes = zip(*fits, strict=True)
    return torch.stack(intercepts), torch.stack(slopes)
