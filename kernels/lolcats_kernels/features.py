"""Features of a few rows at a time and their gradients, for attention by blocks: no whole tensor of gradients is held.

Shapes: R rows (query heads), T time, D head, F columns of the map, F' features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .maps import FEATURE_FLOOR, KEY_BOUND, HybridConfig, HybridMaps, feature_map


def parameters(maps: HybridMaps, dtype: torch.dtype) -> list[Tensor | None]:
    """What the features of all heads are made with: weight [H, D, F] and bias [H, F] of q and of k, slope [H, D] of k,
    each None where there is none."""
    # The query's weight is not in its features: see `HybridMaps.query_logits`.
    names = ("q_weight", "q_bias", "k_weight", "k_bias", "k_slope")
    found = (getattr(maps, name, None) for name in names)
    return [None if x is None else x.to(dtype) for x in found]


def features(
    config: HybridConfig, x: Tensor, weight: Tensor | None, bias: Tensor | None, slope: Tensor | None, *, out: Tensor
) -> Tensor:
    """phi_q or phi_k as `HybridMaps` defines them: x [R, T, D], parameters of R heads -> out [R, T, F']."""
    if config.feature_map == "hedgehog" and weight is not None:
        # Half the time of the definition's five steps.
        both = x.new_empty(x.shape[1], 2, weight.shape[2])  # x W and -x W
        for one, w, phi in zip(x, weight, out, strict=True):
            torch.mm(one, w, out=both[:, 0])
            torch.neg(both[:, 0], out=both[:, 1])
            torch.softmax(both, -1, out=phi.view_as(both))
        out.clamp_(min=FEATURE_FLOOR)
    else:
        out.copy_(feature_map(config, x, weight, bias))
    if slope is not None:
        out *= _key_weight(x, slope)
    return out


def add_feature_gradients(
    config: HybridConfig, phi: Tensor, dphi: Tensor, inputs: Sequence[Tensor | None], totals: Sequence[Tensor | None]
) -> None:
    """Adds the gradients of inputs, x and its parameters, to totals, where these are not None.

    phi [R, T, F'] is what `features` gave for them, dphi its gradient.
    """
    x, weight, _, slope = inputs
    total_x, total_weight, total_bias, total_slope = totals
    assert x is not None
    key = None if slope is None else _key_weight(x, slope)
    if config.feature_map == "hedgehog":
        # A feature at the floor should pass none of its gradient; it passes 1e-12 of it.
        dy = (phi * dphi).unflatten(2, (2, -1))
        sums = dy.sum(-1, keepdim=True)
        dlogit = sums.sum(2)  # of x . slope
        dy -= phi.view_as(dy) * (sums if key is None else sums / key[:, :, None])
        dx = dy[:, :, 0] - dy[:, :, 1]
    else:
        dlogit = (phi * dphi).sum(-1, keepdim=True)
        slopes = phi > 0 if config.feature_map == "t2r" else torch.where(x > 0, 1, phi if key is None else phi / key)
        dx = dphi * (slopes if key is None else slopes * key)
    if total_weight is not None:
        total_weight += x.transpose(1, 2) @ dx
    if total_bias is not None:
        total_bias += dx.sum(1)
    if total_x is not None:
        total_x += dx if weight is None else dx @ weight.transpose(1, 2)
    if slope is not None and key is not None:
        # The bound passes no gradient.
        dlogit = dlogit.masked_fill(key.log().abs_() >= KEY_BOUND * (1 - 1e-6), 0)
        if total_slope is not None:
            total_slope += (x.transpose(1, 2) @ dlogit)[..., 0]
        if total_x is not None:
            total_x += dlogit * slope[:, None]


def _key_weight(x: Tensor, slope: Tensor) -> Tensor:
    """exp(x . slope), bounded: x [R, T, D], slope [R, D] -> [R, T, 1]."""
    return (x @ slope[..., None]).clamp_(-KEY_BOUND, KEY_BOUND).exp_()
