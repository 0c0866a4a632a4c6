"""Hedgehog (arXiv 2402.04347) as in LoLCATs: phi(x) = max([softmax(x W), softmax(-x W)], floor)."""

from __future__ import annotations

import torch
from torch import Tensor

from .feature_map import FeatureMap, MapGradients
from .triton_language import constexpr, jit, tl

# Features are kept from underflowing to exact zeros, as in the published code.
FEATURE_FLOOR = 1e-12
TRITON_FLOOR = constexpr(FEATURE_FLOOR)


def activation(y: Tensor) -> Tensor:
    return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1).clamp(min=FEATURE_FLOOR)


def fused(out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """In half the time of the definition's five steps."""
    assert weight is not None and bias is None
    both = x.new_empty(x.shape[1], 2, weight.shape[2])  # x W and -x W
    for head, w, phi in zip(x, weight, out, strict=True):
        torch.mm(head, w, out=both[:, 0])
        torch.neg(both[:, 0], out=both[:, 1])
        torch.softmax(both, -1, out=phi.view_as(both))
    out.clamp_(min=FEATURE_FLOOR)


def gradients(phi: Tensor, dphi: Tensor, weight: Tensor | None) -> MapGradients:
    # A feature at the floor should pass none of its gradient; it passes 1e-12 of it.
    both = (phi * dphi).unflatten(-1, (2, -1))
    sums = both.sum(-1, keepdim=True)
    both -= phi.view(both.shape) * (sums if weight is None else sums / weight[..., None])
    return MapGradients(both[..., 0, :] - both[..., 1, :], sums.sum(-2))


@jit
def triton_activation(y, F, L: tl.constexpr, BLOCK_F: tl.constexpr):
    inside = (tl.arange(0, BLOCK_F) < F)[None, :, None]
    both = tl.where(inside, tl.join(y, -y), float("-inf"))  # [L, F padded, 2]
    both = tl.exp(both - tl.max(both, 1)[:, None, :])
    both = tl.maximum(both / tl.sum(both, 1)[:, None, :], TRITON_FLOOR)
    return tl.reshape(tl.where(inside, both, 0), [L, 2 * BLOCK_F])


@jit
def triton_gradient(phi, dphi, L: tl.constexpr, BLOCK_F: tl.constexpr):
    products = tl.reshape(phi * dphi, [L, BLOCK_F, 2])
    both = products - tl.reshape(phi, [L, BLOCK_F, 2]) * tl.sum(products, 1)[:, None, :]
    plus, minus = tl.split(both)
    return plus - minus


HEDGEHOG = FeatureMap(
    name="hedgehog",
    has_weight=True,
    has_bias=False,
    sized=True,
    features_each=2,
    activation=activation,
    gradients=gradients,
    triton_activation=triton_activation,
    triton_gradient=triton_gradient,
    fused=fused,
)
