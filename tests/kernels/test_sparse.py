"""The sparse cache is what its definition says; any split, prefix and padding give the same; its size is constant."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention
from lolcats_kernels.equation import bounded_exp, cap_scores, repeat_heads, safe_divide, window_start
from lolcats_kernels.sparse import sparse_attention
from lolcats_kernels.spec import compute_dtype
from torch import Tensor

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def sparse_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: HybridMaps,
    *,
    size: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Hybrid attention with LoLA's sparse cache (arXiv 2505.23666), by the definition, one query after the other.

    A key that leaves the window stays as it is. When more than `size` have stayed, the one goes into S and z that these
    recall best when asked for the key itself: of least | phi_q(k_j).S / phi_q(k_j).z - v_j |^2, summed over the query
    heads. A key head chooses for all its query heads. Those that stay are weighed as the window's are, with
    gamma exp(s_nj - c_n), where c_n is the largest score in the window still, so that the linear term keeps its weight
    beside the window; the exponent is bounded. Arguments as for `hybrid_attention`; window > 0.
    """
    dtype, config, per_key_head = compute_dtype(q.dtype), maps.config, q.shape[1] // k.shape[1]
    gamma, constant = maps.term_weights(dtype)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=dtype)
    for b in range(q.shape[0]):
        real = torch.arange(q.shape[2]) if valid is None else valid[b].nonzero()[:, 0]
        qs, ks, vs = (x[b : b + 1, :, real].to(dtype) for x in (q, k, v))
        phi_q, phi_k, asked = (
            maps.q_features(qs)[0],
            maps.k_features(ks)[0],
            maps.q_features(repeat_heads(ks, q.shape[1])),
        )
        logits = maps.query_logits(qs)
        for h in range(k.shape[1]):
            heads = slice(h * per_key_head, (h + 1) * per_key_head)
            s = torch.zeros(per_key_head, phi_k.shape[2], v.shape[3], dtype=dtype)
            z = torch.zeros(per_key_head, phi_k.shape[2], dtype=dtype)
            stayed: list[int] = []
            for n in range(len(real)):
                start, after = (int(window_start(torch.tensor(i), config)) for i in (n, n + 1))
                window = list(range(start, n + 1))
                scores = cap_scores(qs[0, heads, n] @ ks[0, h, window + stayed].T * scaling, softcap)
                m = scores[:, : len(window)].amax(-1, keepdim=True)
                if sinks is not None:
                    m = torch.maximum(m, sinks[heads, None].to(dtype))
                exact = gamma[heads, None] * bounded_exp(scores - m)
                linear_weight = constant[heads, None]
                if logits is not None:
                    linear_weight = bounded_exp(logits[0, heads, n, None] - m)
                phi = linear_weight * phi_q[heads, n]
                numerator = exact @ vs[0, h, window + stayed] + (phi[:, None] @ s)[:, 0]
                denominator = exact.sum(-1, keepdim=True) + (phi * z).sum(-1, keepdim=True)
                if sinks is not None:
                    denominator += gamma[heads, None] * (sinks[heads, None].to(dtype) - m).exp()
                out[b, heads, real[n]] = numerator / denominator
                for j in range(start, after):
                    stayed.append(j)
                    if len(stayed) > size:
                        ask = asked[0, heads][:, stayed]
                        recalled = safe_divide(ask @ s, ask @ z[..., None])
                        i = stayed.pop(int((recalled - vs[0, h, stayed]).square().sum((0, 2)).argmin()))
                        s = s + phi_k[heads, i, :, None] * vs[0, h, i]
                        z = z + phi_k[heads, i]
    return out.to(q.dtype)


def run(case, size, state=None):
    options = {"scaling": 0.4, "softcap": case.softcap, "sinks": case.sinks, "valid": case.valid}
    with torch.no_grad():
        return sparse_attention(case.q, case.k, case.v, case.maps, size=size, initial_state=state, **options)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data(), size=st.integers(0, 6))
def test_it_is_the_definition(cases, data, size):
    case = data.draw(cases)
    assume(case.maps.config.window)
    with torch.no_grad():
        options = {"scaling": 0.4, "softcap": case.softcap, "sinks": case.sinks, "valid": case.valid}
        expected = sparse_reference(case.q, case.k, case.v, case.maps, size=size, **options)
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
    with pytest.raises(ValueError, match="window=0"):
        sparse_attention(q, k, k, maps, size=2, scaling=1.0)
    maps = HybridMaps(HybridConfig(window=2, feature_dim=8), 2, 8)
    _, state = sparse_attention(q, k, k, maps, size=2, scaling=1.0)
    with pytest.raises(ValueError, match="keeps 2 keys, and 3 were asked for"):
        sparse_attention(q, k, k, maps, size=3, scaling=1.0, initial_state=state)
