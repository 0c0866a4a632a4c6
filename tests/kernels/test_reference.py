"""The definition, against the equation written once more token by token, and against torch's softmax attention."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_kernels import FEATURE_MAPS, LAYOUTS, LINEAR_FACTORS, TERMS, hybrid_attention_weights
from torch.nn import functional


def features(x, maps, side, head):
    """phi(x) for one vector, as METHOD and paper write it."""
    if maps.config.feature_map == "elu":
        return [1 + (a if a > 0 else math.exp(a) - 1) for a in x.tolist()]
    y = (x @ getattr(maps, f"{side}_weight")[head]).tolist()
    if maps.config.feature_map == "t2r":
        bias = getattr(maps, f"{side}_bias")[head].tolist()
        return [max(a + b, 0.0) for a, b in zip(y, bias, strict=True)]
    total, negative = sum(math.exp(a) for a in y), sum(math.exp(-a) for a in y)
    both = [math.exp(a) / total for a in y] + [math.exp(-a) / negative for a in y]
    return [max(a, 1e-12) for a in both]


def token_by_token(case, scaling):
    """Eq. 7 with loops over everything."""
    q, k, v, maps, config = case.q, case.k, case.v, case.maps, case.maps.config
    batch, heads, time, _ = q.shape
    out = torch.zeros(batch, heads, time, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        tokens = [t for t in range(time) if case.valid is None or case.valid[b, t]]
        for h in range(heads):
            key_head = h * k.shape[1] // heads
            gamma = factor = 1.0
            if config.linear_factor != "exp":
                gamma = 1 / (1 + math.exp(-maps.window_logit[h].item()))
            if config.linear_factor == "affine" and config.window:
                factor = 1 - gamma
            for n, t in enumerate(tokens):
                window, older = [], []
                for i, s in enumerate(tokens[: n + 1]):
                    if config.window == 0:
                        near = False
                    elif config.layout == "sliding":
                        near = n - i < config.window
                    else:
                        near = n // config.window - i // config.window <= 1
                    (window if near else older).append(s)
                window = [] if case.terms == "linear" else window
                older = [] if case.terms == "window" else older
                weights = {}
                scores = {s: (q[b, h, t] @ k[b, key_head, s]).item() * scaling for s in window}
                if case.softcap:
                    scores = {s: case.softcap * math.tanh(x / case.softcap) for s, x in scores.items()}
                sink = case.sinks[h].item() if case.sinks is not None and window else None
                top = max([*scores.values()] + [sink] * (sink is not None), default=None)
                for s in window:
                    weights[s] = gamma * math.exp(scores[s] - top)
                phi_q = features(q[b, h, t], maps, "q", h)
                fade = 1.0  # of what is in the sums, through the keys after it
                for s in reversed(older):
                    phi_k = features(k[b, key_head, s], maps, "k", h)
                    if config.linear_factor == "exp":
                        key = min(max((maps.k_slope[h] @ k[b, key_head, s]).item(), -20.0), 20.0)
                        query = maps.linear_logit[h].item() + (maps.q_slope[h] @ q[b, h, t]).item()
                        factor = math.exp(key + min(0 if top is None else query - top, 60.0))
                    weights[s] = fade * factor * sum(x * y for x, y in zip(phi_q, phi_k, strict=True))
                    if config.decay:
                        logit = maps.decay_bias[h].item() + (maps.decay_slope[h] @ k[b, key_head, s]).item()
                        fade /= 1 + math.exp(logit)  # exp(-softplus)
                total = sum(weights.values()) + (0 if sink is None else gamma * math.exp(sink - top))
                if total > 0:
                    out[b, h, t] = sum(w * v[b, key_head, s] for s, w in weights.items()) / total
    return out


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_reference_is_the_equation(make_case, data):
    case = make_case(
        seed=data.draw(st.integers(0, 999)),
        batch=2,
        key_heads=data.draw(st.integers(1, 2)),
        time=data.draw(st.integers(1, 13)),
        head_dim=3,
        value_dim=2,
        feature_dim=2,
        padding=data.draw(st.sampled_from(("none", "left", "right", "holes", "empty"))),
        terms=data.draw(st.sampled_from(TERMS)),
        feature_map=data.draw(st.sampled_from(FEATURE_MAPS)),
        window=data.draw(st.sampled_from((0, 1, 2, 3, 5, 40))),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        linear_factor=data.draw(st.sampled_from(LINEAR_FACTORS)),
        sinks=data.draw(st.sampled_from((None, 0.0, 4.0))),
        decay=data.draw(st.booleans()),
    )
    with torch.no_grad():
        torch.testing.assert_close(case.run("reference"), token_by_token(case, 0.4), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("terms", ["both", "window"])
def test_window_over_all_is_softmax_attention(make_case, layout, terms):
    case = make_case(time=19, window=19, layout=layout, terms=terms)
    expected = functional.scaled_dot_product_attention(
        case.q, case.k, case.v, is_causal=True, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(case.run("reference"), expected, rtol=1e-12, atol=1e-13)


def test_window_alone_is_softmax_over_the_last_keys(make_case):
    case = make_case(time=19, window=5, terms="window")
    i = torch.arange(19)
    mask = (i[:, None] >= i) & (i[:, None] - i < 5)
    expected = functional.scaled_dot_product_attention(
        case.q, case.k, case.v, attn_mask=mask, scale=0.4, enable_gqa=True
    )
    torch.testing.assert_close(case.run("reference"), expected, rtol=1e-12, atol=1e-13)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_weights_sum_to_one_and_give_the_output(cases, data):
    case = data.draw(cases)
    options = {"scaling": 0.4, "softcap": case.softcap, "valid": case.valid, "terms": case.terms, "sinks": case.sinks}
    weights = hybrid_attention_weights(case.q, case.k, case.maps, **options)
    group = case.q.shape[1] // case.k.shape[1]
    valid = torch.ones(case.q.shape[0], case.q.shape[2]) if case.valid is None else case.valid
    torch.testing.assert_close(
        weights @ case.v.repeat_interleave(group, 1), case.run("reference"), rtol=1e-11, atol=1e-12
    )
    assert (weights.triu(1) == 0).all()
    sums = weights.sum(-1)
    if case.sinks is not None:
        assert (sums < 1 + 1e-12).all()
    elif case.terms == "both" and case.maps.config.feature_map != "t2r":
        torch.testing.assert_close(sums, valid[:, None].expand_as(sums).double(), rtol=1e-12, atol=1e-12)
    else:  # a query for which nothing is left to sum
        assert ((sums - 1).abs().minimum(sums.abs()) < 1e-12).all()


@pytest.mark.parametrize("linear_factor", LINEAR_FACTORS)
def test_sinks_are_keys_of_every_window_with_value_zero(make_case, linear_factor):
    """Beside a first key whose score is the sink and whose value is 0, in a window over all."""
    case = make_case(time=19, window=40, linear_factor=linear_factor, sinks=1.0, group=1)
    scores = (case.q @ case.k.transpose(-1, -2) * 0.4).masked_fill(torch.ones(19, 19).triu(1).bool(), -torch.inf)
    weights = torch.cat([case.sinks[:, None, None].expand(2, 2, 19, 1), scores], -1).softmax(-1)[..., 1:]
    torch.testing.assert_close(case.run("reference"), weights @ case.v, rtol=1e-12, atol=1e-13)


def test_query_with_nothing_to_sum_gets_zero_and_no_nan(make_case):
    case = make_case(time=6, window=4, terms="linear")
    for backend in ("reference", "chunked"):
        out = case.run(backend)
        assert (out[:, :, :4] == 0).all()
        assert (out[:, :, 4:] != 0).all()
        assert all(torch.isfinite(g).all() for g in case.gradients(backend))


def test_exp_can_be_softmax_itself(make_case):
    """With constant features the linear term weighs a key exp(l + u . q + w . k): made equal to its score, every key
    has the weight that softmax gives it, whatever the window."""
    case = make_case(time=40, window=4, key_heads=1, group=1, linear_factor="exp", feature_dim=3)
    with torch.no_grad():
        case.maps.q_weight.zero_()
        case.maps.k_weight.zero_()  # features 1/3 each: their product is 6/9
        case.maps.linear_logit.fill_(math.log(9 / 6))
        case.q[:] = case.q[:, :, :1]  # one query, so that its score is linear in the key
        case.maps.q_slope.zero_()
        case.maps.k_slope.copy_(0.4 * case.q[0, :, 0])
        case.q[1], case.k[1], case.v[1] = case.q[0], case.k[0], case.v[0]
        expected = torch.nn.functional.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=True, scale=0.4)
        for backend in ("reference", "chunked"):
            torch.testing.assert_close(case.run(backend), expected, rtol=1e-9, atol=1e-9)
