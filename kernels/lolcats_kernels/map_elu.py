"""phi(x) = 1 + elu(x) (arXiv 2006.16236): x + 1 above 0, exp(x) below."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .feature_map import FeatureMap, MapGradients, sum_of_products
from .triton_language import jit, tl


def activation(y: Tensor) -> Tensor:
    return 1 + functional.elu(y)


def gradients(phi: Tensor, dphi: Tensor, weight: Tensor | None) -> MapGradients:
    # Where the slope is not 1 it is the feature itself, which is then below 1.
    slope = phi.clamp(max=1) if weight is None else torch.minimum(phi, weight)
    return MapGradients(dphi * slope, sum_of_products(phi, dphi))


@jit
def triton_activation(y, F, L: tl.constexpr, BLOCK_F: tl.constexpr):
    phi = tl.where(y > 0, y + 1, tl.exp(tl.minimum(y, 0)))
    return tl.where(tl.arange(0, BLOCK_F)[None, :] < F, phi, 0)


@jit
def triton_gradient(phi, dphi, L: tl.constexpr, BLOCK_F: tl.constexpr):
    return dphi * tl.minimum(phi, 1.0)


ELU = FeatureMap(
    name="elu",
    has_weight=False,
    has_bias=False,
    sized=False,
    features_each=1,
    activation=activation,
    gradients=gradients,
    triton_activation=triton_activation,
    triton_gradient=triton_gradient,
)
