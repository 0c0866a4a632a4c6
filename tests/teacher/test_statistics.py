"""Entropy and effective sequence length are those of the weights, written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_kernels.softmax import AttentionSpec, softmax_weights

from lolcats_cli.teacher import statistics as module
from lolcats_cli.teacher.statistics import attention_statistics


@settings(deadline=None, max_examples=60)
@given(
    time=st.integers(1, 33),
    groups=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    block=st.integers(1, 400),
    sliding_window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.just(2.0),
    size=st.sampled_from([0.1, 1.0, 30.0]),  # 30: most weights are 0
    seed=st.integers(0, 99),
)
def test_they_are_those_of_the_weights(time, groups, key_heads, block, sliding_window, softcap, size, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = size * torch.randn(groups * key_heads, time, 8, generator=generator)
    k = torch.randn(key_heads, time, 8, generator=generator)
    valid = torch.rand(time, generator=generator).cumsum(0) < time / 3  # real tokens come first
    spec = AttentionSpec(0.3, sliding_window, softcap)
    for mask in (None, valid):
        weights = softmax_weights(q[None], k[None], spec, None if mask is None else mask[None])[0].double()
        age = torch.arange(time)[:, None] - torch.arange(time)[None, :]
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(module.BLOCK_SCORES, "cpu", block)
            entropy, esl = attention_statistics(q, k, spec, mask)
        expected = -torch.xlogy(weights, weights).sum((1, 2))
        torch.testing.assert_close(entropy.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(esl.double(), (weights * age).sum((1, 2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_attention_in_closed_form(dtype: torch.dtype) -> None:
    q, k = torch.zeros(4, 300, 16, dtype=dtype), torch.randn(2, 300, 16).to(dtype)
    entropy, esl = attention_statistics(q, k, AttentionSpec(0.25))
    torch.testing.assert_close(entropy, torch.full((4,), math.lgamma(301)), rtol=1e-5, atol=0)  # Σ log(i + 1)
    torch.testing.assert_close(esl, torch.full((4,), 299 * 300 / 4), rtol=1e-5, atol=0)  # Σ i / 2
    entropy, esl = attention_statistics(q, k, AttentionSpec(0.25, sliding_window=1))
    assert not entropy.any() and not esl.any()
