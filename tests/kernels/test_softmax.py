"""Softmax attention against a loop over single queries, written from the definition."""

from __future__ import annotations

import math

import pytest
import torch
from lolcats_kernels.softmax import AttentionSpec, softmax_attention, softmax_weights
from torch import Tensor

B, H, K, T, D = 2, 4, 2, 13, 8
SPECS = {
    "plain": AttentionSpec(D**-0.5),
    "scaling": AttentionSpec(0.9),
    "softcap": AttentionSpec(0.5, softcap=2.0),
    "window": AttentionSpec(0.5, sliding_window=4),
    "window of one": AttentionSpec(0.5, sliding_window=1),
    "window longer than the row": AttentionSpec(0.5, sliding_window=40),
    "window and softcap": AttentionSpec(0.7, sliding_window=5, softcap=1.5),
    "sinks": AttentionSpec(0.7, sinks=torch.tensor([-1.5, 0.0, 2.0, 9.0])),
    "window and sinks": AttentionSpec(0.7, sliding_window=5, sinks=torch.tensor([-1.5, 0.0, 2.0, 9.0])),
}
PADDING = {
    "none": None,
    "left": torch.arange(T)[None] >= torch.tensor([[0], [5]]),
    "right": torch.arange(T)[None] < torch.tensor([[T], [6]]),
    "both and a whole row": (torch.arange(T)[None] >= 2) & (torch.arange(T)[None] < torch.tensor([[9], [0]])),
}


def make(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, T, D, generator=generator) for heads in (H, K, K))
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def by_definition(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(output [B, H, T, D], weights [B, H, T, T]) in fp64, one query at a time."""
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    weights = torch.zeros(B, H, T, T, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            keys, values = k[b, h * K // H].double(), v[b, h * K // H].double()
            for t in range(T):
                if valid is not None and not valid[b, t]:
                    continue
                first = 0 if spec.sliding_window is None else max(0, t - spec.sliding_window + 1)
                seen = [s for s in range(first, t + 1) if valid is None or valid[b, s]]
                scores = [float(q[b, h, t].double() @ keys[s]) * spec.scaling for s in seen]
                if spec.softcap is not None:
                    scores = [spec.softcap * math.tanh(score / spec.softcap) for score in scores]
                total = sum(math.exp(score) for score in scores)
                if spec.sinks is not None:
                    total += math.exp(spec.sinks[h])
                for s, score in zip(seen, scores, strict=True):
                    weights[b, h, t, s] = math.exp(score) / total
                    out[b, h, t] += weights[b, h, t, s] * values[s]
    return out, weights


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", SPECS)
def test_equals_the_definition(name: str, padding: str) -> None:
    q, k, v = make()
    spec, valid = SPECS[name], PADDING[padding]
    out, weights = by_definition(q, k, v, spec, valid)
    torch.testing.assert_close(softmax_attention(q, k, v, spec, valid).double(), out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(softmax_weights(q, k, spec, valid).double(), weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_padding_may_hold_anything_finite(name: str) -> None:
    q, k, v = make()
    valid = PADDING["left"]
    other = [x.masked_fill(~valid[:, None, :, None], 1e4) for x in (q, k, v)]
    torch.testing.assert_close(
        softmax_attention(*other, SPECS[name], valid), softmax_attention(q, k, v, SPECS[name], valid), rtol=0, atol=0
    )


def test_all_valid_is_no_mask() -> None:
    q, k, v = make()
    valid = torch.ones(B, T, dtype=torch.bool)
    torch.testing.assert_close(
        softmax_attention(q, k, v, SPECS["plain"], valid), softmax_attention(q, k, v, SPECS["plain"])
    )


@pytest.mark.parametrize("name", ["plain", "softcap", "window"])
def test_bfloat16_stays_bfloat16_and_close(name: str) -> None:
    q, k, v = make(torch.bfloat16)
    out = softmax_attention(q, k, v, SPECS[name])
    assert out.dtype == torch.bfloat16
    assert softmax_weights(q, k, SPECS[name]).dtype == torch.float32
    torch.testing.assert_close(out.double(), by_definition(q, k, v, SPECS[name], None)[0], rtol=2e-2, atol=2e-2)


def test_weights_are_those_behind_the_output() -> None:
    q, k, v = make()
    for spec in SPECS.values():
        for valid in PADDING.values():
            product = softmax_weights(q, k, spec, valid) @ v.repeat_interleave(H // K, dim=1)
            torch.testing.assert_close(product, softmax_attention(q, k, v, spec, valid), rtol=1e-5, atol=1e-6)


def test_spec_round_trips_as_plain_data() -> None:
    for spec in SPECS.values():
        again = AttentionSpec.from_dict(spec.to_dict())
        assert again == spec
        assert spec.sinks is None if again.sinks is None else torch.equal(again.sinks, spec.sinks)
