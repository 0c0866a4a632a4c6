"""The decay of the linear term: what it does to the sums, and where there is none of it. That every path computes it is
in the tests of the paths."""

import math
from dataclasses import replace

import pytest
import torch
from lolcats_kernels import HybridConfig
from lolcats_kernels.sparse import sparse_attention
from lolcats_kernels.spec import CallSpec


def test_it_bounds_the_sums_at_any_length(make_case):
    """Features of softmax sum to 2, and a key shrinks what was before it by exp(-g)."""
    sizes = []
    for decay in (True, False):
        case = make_case(batch=1, time=4000, window=0, decay=decay)
        with torch.no_grad():
            if decay:
                case.maps.decay_bias.fill_(-2.0)
                case.maps.decay_slope.zero_()
            _, state = case.run("chunked", return_state=True)
        sizes.append(state.norms.sum(-1).max().item())
    shrink = 1 / (1 + math.exp(-2.0))  # exp(-softplus(-2))
    assert sizes[0] <= 2 / (1 - shrink) + 1e-6
    assert sizes[1] == pytest.approx(2 * 4000)


def test_without_forgetting_it_changes_nothing(make_case):
    case = make_case(time=150)
    forgets = replace(case, maps=make_case(decay=True).maps)
    forgets.maps.load_state_dict(case.maps.state_dict(), strict=False)
    with torch.no_grad():
        forgets.maps.decay_bias.fill_(-1e3)
        forgets.maps.decay_slope.zero_()
        torch.testing.assert_close(forgets.run("chunked"), case.run("chunked"), rtol=1e-12, atol=1e-12)


def test_it_may_forget_all_at_once(make_case):
    """A key that shrinks the sums to nothing leaves itself alone."""
    case = make_case(batch=1, time=100, window=0, decay=True)
    with torch.no_grad():
        case.maps.decay_bias.fill_(1e3)
        case.maps.decay_slope.zero_()
        values = case.v.repeat_interleave(2, 1)
        torch.testing.assert_close(case.run("chunked"), values, rtol=1e-12, atol=1e-12)
    assert all(x.isfinite().all() for x in case.gradients("chunked"))


def test_what_has_none_of_it_says_so(make_case):
    case = make_case(decay=True)
    with pytest.raises(ValueError, match="not for students whose linear term forgets"):
        sparse_attention(case.q, case.k, case.v, case.maps, size=4, scaling=0.4)


def test_configurations_without_it_are_as_they_were():
    assert "decay" not in HybridConfig().to_dict()
    for config in (HybridConfig(), HybridConfig(decay=True, linear_factor="exp")):
        assert HybridConfig(**config.to_dict()) == config
        assert CallSpec.decode(*CallSpec(config, 0.5).encode()) == CallSpec(config, 0.5)
