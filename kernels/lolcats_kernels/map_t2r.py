"""T2R (arXiv 2103.13076): phi(x) = relu(x W + b)."""

from __future__ import annotations

import torch
from torch import Tensor

from .feature_map import FeatureMap, MapGradients, sum_of_products, weighted
from .triton_language import jit, tl


def gradients(phi: Tensor, dphi: Tensor, weight: Tensor | None) -> MapGradients:
    return MapGradients(dphi * weighted((phi > 0).to(phi.dtype), weight), sum_of_products(phi, dphi))


@jit
def triton_activation(y, F, L: tl.constexpr, BLOCK_F: tl.constexpr):
    return tl.maximum(y, 0)


@jit
def triton_gradient(phi, dphi, L: tl.constexpr, BLOCK_F: tl.constexpr):
    return tl.where(phi > 0, dphi, 0)


T2R = FeatureMap(
    name="t2r",
    has_weight=True,
    has_bias=True,
    sized=False,
    features_each=1,
    activation=torch.relu,
    gradients=gradients,
    triton_activation=triton_activation,
    triton_gradient=triton_gradient,
)
