"""What a feature map is: one record for each kind, that holds all in which kinds differ.

phi(x) = activation(x W + b), for every query head by itself. A new kind is a file `map_<name>.py` with a record, and
its place in `spec.MAPS`. Letters: see ../README.md; y = x W + b, and N = F' padded, in the order of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class MapGradients(NamedTuple):
    """Of y [..., F]; and of the logarithm of the weight of the key whose features these are [..., 1]."""

    dy: Tensor
    dlog_weight: Tensor


@dataclass(frozen=True)
class FeatureMap:
    """One kind of feature map.

    has_weight: whether it has W [H, D, F], which starts as the identity. Without W, y is x, and F is D.
    has_bias: whether it has b [H, F], which starts at 0.
    sized: whether F is the configuration's `feature_dim`; otherwise F is D.
    features_each: how many features each of the F numbers y gives: F' = features_each F.
    activation: y [..., F] -> phi [..., F'], differentiable: the definition.
    gradients: for phi = w activation(y), phi [..., F'], the gradient of phi, and w [..., 1] (None: 1).
    triton_activation, triton_gradient: the same as Triton functions, of blocks of tokens:
        (y [L, F padded], F, L, F padded) -> phi [L, N] fp32, 0 in the padding. N = features_each times F padded; of
        more than one feature for each y, those of one y are neighbours.
        (phi [L, N], dphi [L, N], L, F padded) -> dy [L, F padded], for w = 1.
    fused: if there is a faster way than one step after the other: the same as `fill`.
    """

    name: str
    has_weight: bool
    has_bias: bool
    sized: bool
    features_each: int
    activation: Callable[[Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor | None], MapGradients]
    triton_activation: Any
    triton_gradient: Any
    fused: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None] | None = None

    def feature_dim(self, head_dim: int, configured: int) -> int:
        """F."""
        return configured if self.sized else head_dim

    def num_features(self, feature_dim: int) -> int:
        """F'."""
        return self.features_each * feature_dim

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """phi of x [..., H, T, D]: weight [H, D, F] and bias [H, F], where there are such -> [..., H, T, F']."""
        return self.activation(project(x, weight, bias))

    def fill(self, out: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        """The same without gradients: x [r, T, D], parameters of r heads -> out [r, T, F'], contiguous in its rows."""
        if self.fused is None:
            out.copy_(self(x, weight, bias))
        else:
            self.fused(out, x, weight, bias)


def project(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y = x W + b: x [..., H, T, D], weight [H, D, F] or None, bias [H, F] or None -> [..., H, T, F]."""
    if weight is not None:
        x = x @ weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)[:, None]


def weighted(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * weight


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """[..., F'] twice -> [..., 1]."""
    product: Tensor = torch.linalg.vecdot(a, b)
    return product[..., None]
