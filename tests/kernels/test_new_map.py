"""A new feature map is a record: nothing else has to know of it, forward, backward, decoding, in PyTorch or Triton."""

import pytest
import torch
from lolcats_kernels import spec
from lolcats_kernels.feature_map import FeatureMap, MapGradients, sum_of_products, weighted
from torch.nn import functional

pytest.importorskip("triton")

from triton import jit
from triton import language as tl


def gradients(phi, dphi, weight):
    """The slope of softplus is 1 - exp(-softplus)."""
    slope = 1 - (-phi if weight is None else -phi / weight).exp()
    return MapGradients(dphi * weighted(slope, weight), sum_of_products(phi, dphi))


@jit
def triton_activation(y, F, L: tl.constexpr, BLOCK_F: tl.constexpr):
    return tl.where(tl.arange(0, BLOCK_F)[None, :] < F, tl.log(1 + tl.exp(y)), 0)


@jit
def triton_gradient(phi, dphi, L: tl.constexpr, BLOCK_F: tl.constexpr):
    return dphi * (1 - tl.exp(-phi))


SOFTPLUS = FeatureMap(
    name="softplus",
    has_weight=True,
    has_bias=True,
    sized=True,
    features_each=1,
    activation=functional.softplus,
    gradients=gradients,
    triton_activation=triton_activation,
    triton_gradient=triton_gradient,
)


@pytest.mark.parametrize("factor", ["affine", "exp"])
@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_it_is_served(make_case, monkeypatch, backend, factor):
    monkeypatch.setitem(spec.MAPS, "softplus", SOFTPLUS)
    sizes = {"batch": 1, "key_heads": 1, "time": 70, "window": 8, "dtype": torch.float32}
    case = make_case(feature_map="softplus", linear_factor=factor, **sizes)
    with torch.no_grad():
        torch.testing.assert_close(case.run(backend), case.run("reference"), rtol=1e-4, atol=1e-5)
        steps, _ = case.run_in_parts(backend, [68, 69])
        torch.testing.assert_close(steps, case.run("reference"), rtol=1e-4, atol=1e-5)
    for found, exact in zip(case.gradients(backend), case.gradients("reference"), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * (1 + exact.abs().max().item()))
