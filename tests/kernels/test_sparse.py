"""The sparse cache is what its definition says; any split, prefix and padding give the same; its size is constant."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention
from lolcats_kernels.reference import sparse_reference
from lolcats_kernels.sparse import sparse_attention

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def run(case, size, state=None):
    options = {"scaling": 0.4, "softcap": case.softcap, "valid": case.valid}
    with torch.no_grad():
        return sparse_attention(case.q, case.k, case.v, case.maps, size=size, state=state, **options)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), size=st.integers(0, 6))
def test_it_is_the_definition(cases, data, size):
    case = data.draw(cases)
    assume(case.maps.config.window)
    with torch.no_grad():
        expected = sparse_reference(
            case.q, case.k, case.v, case.maps, size=size, scaling=0.4, softcap=case.softcap, valid=case.valid
        )
    torch.testing.assert_close(run(case, size)[0], expected, **EXACT)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), size=st.integers(0, 6))
def test_splits_and_prefixes_give_the_whole(cases, data, size):
    case = data.draw(cases)
    assume(case.maps.config.window)
    whole, expected = run(case, size)
    cut = data.draw(st.integers(1, case.q.shape[2]))
    first, state = run(case.part(0, cut), size)
    torch.testing.assert_close(first, whole[:, :, :cut], **EXACT)
    nbytes = state.nbytes
    if cut < case.q.shape[2]:
        second, state = run(case.part(cut, case.q.shape[2]), size, state)
        torch.testing.assert_close(second, whole[:, :, cut:], **EXACT)
    assert state.nbytes == expected.nbytes == nbytes
    for found, wanted in zip(state.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_cache_of_no_keys_is_plain_and_one_of_all_is_softmax_over_all(cases, data):
    case = data.draw(cases)
    assume(case.maps.config.window and case.terms == "both")
    with torch.no_grad():
        torch.testing.assert_close(run(case, 0)[0], case.run("reference"), **EXACT)
        time = case.q.shape[2]
        found, _ = run(case, time)
        case.maps.config = HybridConfig(**{**vars(case.maps.config), "window": time})  # all keys are in the window
        softmax = case.run("reference")
    torch.testing.assert_close(found, softmax, **EXACT)


def test_what_the_sums_recall_worst_stays():
    """Forty keys alike, with one value, and one key that differs, with another: that one stays, and is recalled."""
    generator = torch.Generator().manual_seed(0)
    maps = HybridMaps(HybridConfig(window=2, feature_dim=8, linear_factor="exp"), 2, 8)
    common, odd = torch.randn(2, 8, generator=generator)
    k = common + 0.01 * torch.randn(1, 1, 40, 8, generator=generator)
    v = torch.ones(1, 1, 40, 4)
    k[:, :, 10], v[:, :, 10] = odd, -1
    q = k.repeat(1, 2, 1, 1)
    q[:, :, -1] = 4 * odd  # asks for it, long after it left the window
    options = {"scaling": 1.0}
    with torch.no_grad():
        out, state = sparse_attention(q, k, v, maps, size=1, **options)
        plain = hybrid_attention(q, k, v, maps, **options)
    assert torch.equal(state.kept_keys[0, 0, 0], odd)
    assert (out[0, :, -1] < -0.99).all()
    assert (plain[0, :, -1] > -0.5).all()


def test_what_is_refused():
    maps = HybridMaps(HybridConfig(window=0, feature_dim=8), 2, 8)
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match="window 0"):
        sparse_attention(q, k, k, maps, size=2, scaling=1.0)
    maps = HybridMaps(HybridConfig(window=2, feature_dim=8), 2, 8)
    _, state = sparse_attention(q, k, k, maps, size=2, scaling=1.0)
    with pytest.raises(ValueError, match="keeps 2 keys, and 3 are asked for"):
        sparse_attention(q, k, k, maps, size=3, scaling=1.0, state=state)
