"""The sparse cache is what its definition says; any split, prefix and padding give the same; its size is constant."""

from dataclasses import replace
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lolcats_kernels import LAYOUTS, HybridConfig, HybridMaps, hybrid_attention, sparse
from lolcats_kernels.equation import bounded_exp, cap_scores, repeat_heads, safe_divide, window_start
from lolcats_kernels.sparse import block_size, sparse_attention
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

    Positions are cut in blocks from the first. A key that leaves the window waits, as it is, until its whole block has
    left. Then those of the block and those that were kept before are candidates. The `size` that S and z recall worst
    when asked for the key itself are kept: of largest | phi_q(k_j).S / phi_q(k_j).z - v_j |^2, summed over the query
    heads. All others go into S and z. A key head chooses for all its query heads. Keys that are kept or wait are
    weighed as the window's are, with gamma exp(s_nj - c_n), where c_n is the largest score in the window still, so that
    the linear term keeps its weight beside the window; the exponent is bounded. Arguments as for `hybrid_attention`;
    window > 0.
    """
    dtype, config, per_key_head = compute_dtype(q.dtype), maps.config, q.shape[1] // k.shape[1]
    block = block_size(config)
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
            kept: list[int] = []
            for n in range(len(real)):
                start, after = (int(window_start(torch.tensor(i), config)) for i in (n, n + 1))
                window, waiting = list(range(start, n + 1)), list(range(start // block * block, start))
                others = waiting + kept
                scores = cap_scores(qs[0, heads, n] @ ks[0, h, window + others].T * scaling, softcap)
                m = scores[:, : len(window)].amax(-1, keepdim=True)
                if sinks is not None:
                    m = torch.maximum(m, sinks[heads, None].to(dtype))
                exact = gamma[heads, None] * bounded_exp(scores - m)
                linear_weight = constant[heads, None]
                if logits is not None:
                    linear_weight = bounded_exp(logits[0, heads, n, None] - m)
                phi = linear_weight * phi_q[heads, n]
                numerator = exact @ vs[0, h, window + others] + (phi[:, None] @ s)[:, 0]
                denominator = exact.sum(-1, keepdim=True) + (phi * z).sum(-1, keepdim=True)
                if sinks is not None:
                    denominator += gamma[heads, None] * (sinks[heads, None].to(dtype) - m).exp()
                out[b, heads, real[n]] = numerator / denominator
                for i in range(start // block, after // block):
                    candidates = [*kept, *range(i * block, (i + 1) * block)]
                    ask = asked[0, heads][:, candidates]
                    error = (safe_divide(ask @ s, ask @ z[..., None]) - vs[0, h, candidates]).square().sum((0, 2))
                    ranked = [candidates[j] for j in error.argsort(descending=True).tolist()]
                    kept, left = ranked[:size], ranked[size:]
                    s = s + phi_k[heads][:, left].transpose(1, 2) @ vs[0, h, left]
                    z = z + phi_k[heads][:, left].sum(1)
    return out.to(q.dtype)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sparse, "BLOCK", 5)


def options_of(case):
    return {"scaling": 0.4, "softcap": case.softcap, "sinks": case.sinks, "valid": case.valid}


def drawn(data, cases):
    """A case that a sparse cache is for."""
    case = data.draw(cases)
    assume(case.maps.config.window)
    case.maps.config = replace(case.maps.config, decay=False)
    return case


def run(case, size, state=None):
    with torch.no_grad():
        return sparse_attention(case.q, case.k, case.v, case.maps, size=size, initial_state=state, **options_of(case))


def run_in_parts(case, size, bounds):
    outs, state = [], None
    for begin, end in pairwise(bounds):
        out, state = run(case.part(begin, end), size, state)
        outs.append(out)
    return torch.cat(outs, 2), state


def assert_same_states(found, expected):
    for x, y in zip(found.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(x, y, **EXACT)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), size=st.integers(0, 12), block=st.sampled_from((1, 5, 64)))
def test_it_is_the_definition(cases, data, size, block):
    case = drawn(data, cases)
    with torch.no_grad(), patch.object(sparse, "BLOCK", block):
        expected = sparse_reference(case.q, case.k, case.v, case.maps, size=size, **options_of(case))
        torch.testing.assert_close(run(case, size)[0], expected, **EXACT)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), size=st.integers(0, 12))
def test_splits_and_prefixes_give_the_whole(cases, data, size):
    case = drawn(data, cases)
    whole, expected = run(case, size)
    time = case.q.shape[2]
    found, state = run_in_parts(case, size, sorted({0, time, *(cut % time for cut in case.cuts)}))
    torch.testing.assert_close(found, whole, **EXACT)
    assert state.nbytes == expected.nbytes
    assert_same_states(state, expected)


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes", "empty"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("read", [0, 6, 22])
def test_decoding_chooses_as_reading_does(make_case, read, layout, padding):
    """Token by token after a prompt of `read` tokens; rows that have seen different numbers of tokens; a state that was
    read from is as it was, and its rows can be taken in another order."""
    case = make_case(time=40, window=3, layout=layout, padding=padding, batch=3, linear_factor="exp", sinks=1.0)
    whole, expected = run(case, 4)
    found, state = run_in_parts(case, 4, [*([0] if read else []), *range(read, 41)])
    torch.testing.assert_close(found, whole, **EXACT)
    assert_same_states(state, expected)

    rows = torch.tensor([2, 0, 2])
    _, first = run(case.part(0, 31), 4)
    before = [x.clone() for x in first.tensors()]
    rest = case.part(31, 40)
    rest = replace(
        rest, q=rest.q[rows], k=rest.k[rows], v=rest.v[rows], valid=None if case.valid is None else rest.valid[rows]
    )
    found, state = run(rest, 4, first.select_batch(rows))
    torch.testing.assert_close(found, whole[rows, :, 31:], **EXACT)
    assert_same_states(state, expected.select_batch(rows))
    run(case.part(31, 32), 4, first)
    assert all(map(torch.equal, first.tensors(), before))


@pytest.fixture
def choices():
    """`triton_choices`, with several tiles of candidates and parts of features and values."""
    triton_sparse = pytest.importorskip("lolcats_kernels.triton_sparse")
    with patch.object(triton_sparse, "TILE", 16), patch.object(triton_sparse, "PART", 16):
        yield triton_sparse.triton_choices


@pytest.mark.usefixtures("numbers_of_gpus")
@pytest.mark.parametrize(
    ("padding", "size", "block", "together", "options"),
    [
        ("none", 0, 5, 12, {"value_dim": 20, "feature_dim": 10}),
        ("left", 4, 5, 12, {"group": 1, "sinks": 1.0, "feature_map": "t2r"}),
        ("right", 24, 4, 100, {"layout": "terraced", "linear_factor": "exp", "softcap": 2.0}),
        ("holes", 4, 5, 100, {"linear_factor": "exp"}),
        ("empty", 24, 4, 12, {"layout": "terraced"}),
    ],
    ids=lambda given: str(given) if isinstance(given, str | int) else "",
)
def test_triton_chooses_the_same(choices, make_case, padding, size, block, together, options):
    case = make_case(time=60, window=3, batch=3, padding=padding, dtype=torch.float32, **options)
    with patch.object(sparse, "BLOCK", block):
        expected = run_in_parts(case, size, [0, 44, 60])
        with (
            patch.object(sparse, "backend_for", lambda *_: "triton"),
            patch.object(sparse, "TOGETHER", 3 * together),
            patch("lolcats_kernels.triton_sparse.triton_choices", wraps=choices) as called,
        ):
            found = run_in_parts(case, size, [0, 44, 60])
    assert called.called
    for x, y in zip((found[0], *found[1].tensors()), (expected[0], *expected[1].tensors()), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("numbers_of_gpus")
def test_a_key_is_kept_or_in_the_sums_of_bf16(choices, make_case):
    case = make_case(batch=2, group=2, time=64, window=8, dtype=torch.float32).to(torch.bfloat16)
    maps, empty = case.maps, sparse.SparseState.empty(case.maps, case.k, case.v, 24)
    exact = torch.cat([case.k, case.v, torch.ones_like(case.v[..., :1])], -1)
    with torch.no_grad():
        exact = torch.cat([empty.exact[:, :, :24], exact], 2)
        kept, sums = choices(exact, empty.sums, maps, 24, 16)
        phi = maps.k_features(exact[..., : maps.head_dim].float())
    assert kept.shape[2] == sums.shape[1] == 5
    values = exact[..., maps.head_dim :].float()
    for block in range(5):
        for row, head in ((0, 0), (1, 1)):
            slots = kept[row, head, block].tolist()
            assert len(set(slots)) == 24
            entered = torch.tensor([i for i in range(24 + 16 * block) if i not in slots], dtype=torch.int64)
            if block < 2:  # there was room for all keys
                assert {*slots} >= {*range(24, 24 + 16 * block)}
            for h in (2 * head, 2 * head + 1):
                expected = phi[row, h, entered].T @ values[row, head, entered]
                torch.testing.assert_close(sums[row, block, h], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu(gpu, make_case, layout):
    case = make_case(time=60, window=3, layout=layout, padding="holes", batch=3, linear_factor="exp", sinks=1.0)
    exact, expected = run(case, 4)
    found, state = run_in_parts(case.on(gpu, torch.float32), 4, [0, 31, *range(32, 61)])
    torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-3, atol=1e-4)
    for x, y in zip(state.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(x.double().cpu(), y.double(), rtol=1e-3, atol=1e-4)


def test_blocks():
    with patch.object(sparse, "BLOCK", 64):
        found = [block_size(HybridConfig(window=w, layout=layout)) for layout in LAYOUTS for w in (1, 48, 64, 300)]
    assert found == [64, 64, 64, 64, 64, 96, 64, 300]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_cache_of_no_keys_is_plain_where_none_waits_and_one_of_all_is_softmax_over_all(cases, data):
    case = drawn(data, cases)
    case.terms = "both"
    time, config = case.q.shape[2], vars(case.maps.config)
    found, _ = run(case, time)
    with torch.no_grad():
        case.maps.config = HybridConfig(**config | {"window": time})  # all keys are in the window
        torch.testing.assert_close(found, case.run("reference"), **EXACT)
        # The terraces are the blocks.
        case.maps.config = HybridConfig(**config | {"layout": "terraced", "window": max(config["window"], 5)})
        torch.testing.assert_close(run(case, 0)[0], case.run("reference"), **EXACT)


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
    assert torch.equal(state.exact[0, 0, 0, :8], odd)
    assert (out[0, :, -1] < -0.99).all()
    assert (plain[0, :, -1] > -0.5).all()


def test_what_is_refused():
    maps = HybridMaps(HybridConfig(window=0, feature_dim=8), 2, 8)
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8)
    with pytest.raises(ValueError, match="window=0"):
        sparse_attention(q, k, k, maps, size=2, scaling=1.0)
    maps = HybridMaps(HybridConfig(window=2, feature_dim=8, decay=True), 2, 8)
    with pytest.raises(ValueError, match="forgets"):
        sparse_attention(q, k, k, maps, size=2, scaling=1.0)
    maps = HybridMaps(HybridConfig(window=2, feature_dim=8), 2, 8)
    out, state = sparse_attention(q, k, k, maps, size=2, scaling=1.0)
    with pytest.raises(RuntimeError, match="no gradients"):
        out.sum().backward()
    with pytest.raises(ValueError, match="keeps 2 keys, and 3 were asked for"):
        sparse_attention(q, k, k, maps, size=3, scaling=1.0, initial_state=state)
