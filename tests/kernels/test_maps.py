"""Feature maps and their configuration."""

import json

import pytest
import torch
from lolcats_kernels import HybridConfig, HybridMaps


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("feature_map", "hedge", "Choose one of hedgehog, t2r, elu"),
        ("layout", "stairs", "Choose one of sliding, terraced"),
        ("linear_factor", 1, "Choose one of one, affine, exp"),
        ("feature_dim", 0, "at least 1"),
        ("feature_dim", 2.5, "whole number"),
        ("window", -1, "at least 0"),
        ("window", True, "whole number"),
    ],
)
def test_config_says_what_is_wrong(field, value, words):
    with pytest.raises(ValueError, match=f"^{field} is .*{words}"):
        HybridConfig(**{field: value})


def test_config_is_plain_data():
    config = HybridConfig("t2r", 16, 0, "terraced", "affine")
    assert HybridConfig(**json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("factor", [0.0, 1.0, -0.1])
def test_initial_gamma_lies_between(factor):
    with pytest.raises(ValueError, match="window_factor"):
        HybridMaps(HybridConfig(), 2, 4, window_factor=factor)


def test_parameters_and_their_start():
    maps = HybridMaps(HybridConfig(feature_dim=4), 3, 6, window_factor=0.1)
    assert {n: tuple(p.shape) for n, p in maps.named_parameters()} == {
        "q_weight": (3, 6, 4),
        "k_weight": (3, 6, 4),
        "window_logit": (3,),
    }
    assert torch.equal(maps.q_weight[2], torch.eye(6, 4))
    torch.testing.assert_close(torch.sigmoid(maps.window_logit), torch.full((3,), 0.1))
    assert all(p.dtype == torch.float32 for p in maps.parameters())
    t2r = HybridMaps(HybridConfig("t2r", feature_dim=4), 3, 6)
    assert t2r.q_weight.shape == (3, 6, 6)
    assert t2r.k_bias.shape == (3, 6)
    assert [n for n, _ in HybridMaps(HybridConfig("elu"), 3, 6).named_parameters()] == ["window_logit"]


def test_features_beyond_the_heads_size_differ_from_each_other():
    weight = HybridMaps(HybridConfig(feature_dim=12), 1, 5).k_weight[0]
    assert torch.equal(weight[:, :5], torch.eye(5))
    gaps = torch.cdist(weight.T, weight.T) + 10 * torch.eye(12)
    assert gaps.min() > 0.1


def test_maps_are_per_query_head():
    maps = HybridMaps(HybridConfig(feature_dim=4), 4, 6)
    with torch.no_grad():
        maps.k_weight.normal_(generator=torch.Generator().manual_seed(0))
    k = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(1))
    phi = maps.k_features(k)
    assert phi.shape == (2, 4, 7, 8)
    for head in range(4):
        y = k[:, head // 2] @ maps.k_weight[head]
        torch.testing.assert_close(phi[:, head, :, :4], y.softmax(-1))
        torch.testing.assert_close(phi[:, head, :, 4:], (-y).softmax(-1))


def test_hedgehog_features_do_not_vanish():
    maps = HybridMaps(HybridConfig(feature_dim=4), 1, 4)
    phi = maps.q_features(torch.tensor([[[[1000.0, 0, 0, -1000]]]]))
    assert phi.min().item() == pytest.approx(1e-12)
    assert maps.q_features(torch.zeros(1, 1, 1, 4, dtype=torch.bfloat16)).dtype == torch.float32
    assert maps.q_features(torch.zeros(1, 1, 1, 4, dtype=torch.float64)).dtype == torch.float64
