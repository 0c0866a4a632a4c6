"""Features of a few rows at a time and their gradients: no whole tensor of gradients is held.

Letters: see ../README.md; r rows (query heads).
"""

from __future__ import annotations

from torch import Tensor

from .feature_map import FeatureMap
from .maps import MapParameters
from .spec import KEY_BOUND


def features_into(out: Tensor, record: FeatureMap, x: Tensor, parameters: MapParameters) -> None:
    """phi_q or phi_k as `HybridMaps` defines them: x [r, T, D], parameters of r heads -> out [r, T, F']."""
    record.fill(out, x, parameters.weight, parameters.bias)
    if parameters.slope is not None:
        out *= _key_weight(x, parameters.slope)


def add_feature_gradients(
    record: FeatureMap,
    phi: Tensor,
    dphi: Tensor,
    x: Tensor,
    parameters: MapParameters,
    dx: Tensor | None,
    dparameters: MapParameters,
) -> None:
    """Adds the gradients of x and of its parameters to dx and dparameters, where these are not None.

    phi [r, T, F'] is what `features_into` gave for them, dphi its gradient.
    """
    slope = parameters.slope
    key_weight = None if slope is None else _key_weight(x, slope)
    dy, dlogit = record.gradients(phi, dphi, key_weight)
    if dparameters.weight is not None:
        dparameters.weight.add_(x.transpose(1, 2) @ dy)
    if dparameters.bias is not None:
        dparameters.bias.add_(dy.sum(1))
    if dx is not None:
        dx += dy if parameters.weight is None else dy @ parameters.weight.transpose(1, 2)
    if slope is not None and key_weight is not None:
        # The bound passes no gradient.
        dlogit = dlogit.masked_fill(key_weight.log().abs_() >= KEY_BOUND * (1 - 1e-6), 0)
        if dparameters.slope is not None:
            dparameters.slope.add_((x.transpose(1, 2) @ dlogit)[..., 0])
        if dx is not None:
            dx += dlogit * slope[:, None]


def _key_weight(x: Tensor, slope: Tensor) -> Tensor:
    """exp(x . slope), bounded: x [r, T, D], slope [r, D] -> [r, T, 1]."""
    return (x @ slope[..., None]).clamp_(-KEY_BOUND, KEY_BOUND).exp_()
