"""Heads that keep softmax attention in a layer of hybrid attention: each head is what the definition says."""

from __future__ import annotations

import itertools

import pytest
import torch
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention
from lolcats_kernels.hf_attention import HybridAttention
from lolcats_kernels.softmax import AttentionSpec, softmax_attention
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lolcats_cli.errors import IdentityMismatch
from lolcats_cli.student.build import linearize
from lolcats_cli.student.memory import student_bytes

KEPT = HybridConfig(window=6, feature_dim=8, linear_factor="exp", kept_heads=(1,))


def a_layer(config: HybridConfig, key_heads: int = 4, group: int = 2) -> tuple[HybridAttention, torch.Tensor]:
    """A layer of 4 key heads and 8 query heads; and the query heads that have maps."""
    torch.manual_seed(1)
    layer = HybridAttention(config, config.mapped_heads(key_heads * group, key_heads), 8, 0).requires_grad_(False)
    for parameter in layer.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    mapped = [head for head in range(key_heads * group) if head // group not in config.kept_heads]
    return layer, torch.tensor(mapped)


@pytest.mark.parametrize("kept", [(1,), (0, 3), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"linear_factor": "exp"},
        {"layout": "terraced", "linear_factor": "affine"},
        {"window": 0, "feature_map": "t2r", "decay": True},
    ],
    ids=str,
)
def test_every_head_is_what_the_definition_says(kept: tuple[int, ...], options: dict) -> None:
    """With a soft cap, sinks, a sliding window of the teacher and padding."""
    layer, mapped = a_layer(HybridConfig(**{"window": 4, "feature_dim": 8} | options, kept_heads=kept))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 19, 8, generator=generator) for heads in (8, 4, 4))
    sinks, valid = torch.randn(8, generator=generator), torch.arange(19) >= torch.tensor([[0], [5]])
    found = layer(q, k, v, valid, 0.4, 2.0, sinks, 7).transpose(1, 2)
    softmax = softmax_attention(q, k, v, AttentionSpec(0.4, 7, 2.0, sinks), valid)
    of = {"scaling": 0.4, "softcap": 2.0, "valid": valid, "backend": "reference"}
    for head in range(8):
        expected = softmax[:, head]
        if head // 2 not in kept:
            place = mapped.tolist().index(head)
            maps = HybridMaps(layer.config, 1, 8)
            maps.load_state_dict({name: x[place : place + 1] for name, x in layer.state_dict().items()})
            own = (q[:, head : head + 1], *(x[:, head // 2 : head // 2 + 1] for x in (k, v)))
            expected = hybrid_attention(*own, maps, sinks=sinks[head : head + 1], **of)[:, 0]
        torch.testing.assert_close(found[:, head], expected, atol=1e-5, rtol=1e-5)


def teachers(sizes: dict) -> dict[str, object]:
    """Teachers with sliding windows, a soft cap, sinks."""
    torch.manual_seed(0)
    sliding = {"head_dim": 16, "sliding_window": 8}
    kinds = {"layer_types": ["full_attention", "sliding_attention"]}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    return {
        "mistral": MistralForCausalLM(MistralConfig(**sizes, **sliding)).eval(),
        "gemma 2": Gemma2ForCausalLM(Gemma2Config(**sizes, **sliding, **kinds, attn_logit_softcapping=0.5)).eval(),
        "gpt-oss": GptOssForCausalLM(GptOssConfig(**sizes, **sliding, **kinds, **experts)).eval(),
    }


@pytest.mark.parametrize("name", ["mistral", "gemma 2", "gpt-oss"])
@torch.no_grad()
def test_parts_padding_and_generation_of_any_teacher(sizes, make_maps, tokens, name: str) -> None:
    teacher = teachers(sizes)[name]
    student = linearize(teacher, KEPT, make_maps(KEPT, heads=2))
    expected = student(tokens, use_cache=False).logits
    rows, width = [slice(3, 26), slice(9, 32)], 32
    padded, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, place in enumerate(rows):
        padded[row, place], mask[row, place] = tokens[row], 1
    caches = {"growing": student.new_cache(), "fixed": student.new_cache(40)}
    for cache in caches.values():
        parts = [
            student(padded[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits
            for begin, end in itertools.pairwise([0, 6, 7, 20, 21, 22, width - 1, width])
        ]
        for row, place in enumerate(rows):
            torch.testing.assert_close(torch.cat(parts, 1)[row, place], expected[row], atol=1e-4, rtol=1e-4)
    if name == "mistral":  # all its attentions slide
        assert caches["growing"].nbytes == caches["fixed"].nbytes
    common = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(student.generate(tokens, **common), student.generate(tokens, use_cache=False, **common))


@torch.no_grad()
def test_the_cache_holds_the_kept_heads_alone(make_student, tokens) -> None:
    student = make_student(KEPT)
    layers = [{"num_heads": 4, "num_key_value_heads": 2, "head_dim": 16}] * 2
    hybrid = {**KEPT.to_dict(), "kept_heads": {"0": [1], "1": [1]}}
    cache = student.new_cache()
    for seen in (23, 46):
        student(tokens, past_key_values=cache)
        real = 2 * 2 * seen  # which of the kept tokens are real, of two rows and layers
        assert cache.nbytes == 2 * student_bytes(layers, hybrid, (), seen, 4) + real
        assert [layer.kept.state.keys.shape for layer in cache.layers] == [(2, 1, seen, 16)] * 2
    cache.reset()
    assert cache.nbytes == cache.get_seq_length() == 0


@torch.no_grad()
def test_rows_of_the_cache_are_selected_and_repeated(make_student, tokens) -> None:
    student = make_student(KEPT)
    whole = student(tokens).logits
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True])), [1]),
    ):
        for cache in (student.new_cache(), student.new_cache(30)):
            change(cache)  # harmless on an empty cache
            student(tokens[:, :20], past_key_values=cache)
            change(cache)
            after = student(tokens[rows, 20:], past_key_values=cache).logits
            torch.testing.assert_close(after, whole[rows, 20:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_sparse_cache_beside_them(make_student) -> None:
    student = make_student(KEPT)
    tokens = torch.randint(3, 128, (2, 90), generator=torch.Generator().manual_seed(2))
    plain = student(tokens).logits
    for layer in student.model.layers:
        layer.self_attn.hybrid.sparse_cache_size = 4
    expected, cache = student(tokens, use_cache=False).logits, student.new_cache(100)
    assert (expected - plain).abs().max() > 1e-3 and not cache.is_compileable
    parts = [student(part, past_key_values=cache).logits for part in tokens.split([70, 1, 12, 7], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)
    assert [layer.kept.state.keys.shape[2] for layer in cache.layers] == [90, 90]


def test_gradients_reach_the_maps_and_the_kept_heads(make_student, tokens) -> None:
    student = make_student(KEPT)
    student.model.layers[0].self_attn.hybrid.requires_grad_(True)
    student(tokens, labels=tokens, use_cache=False).loss.backward()
    hybrid, k = student.model.layers[0].self_attn.hybrid, student.model.layers[0].self_attn.k_proj.weight.grad
    assert all(parameter.grad.abs().sum() > 0 for parameter in hybrid.parameters())
    assert k[:16].abs().sum() > 0 and k[16:].abs().sum() > 0


def test_what_cannot_be_kept(make_maps, make_teacher) -> None:
    for heads in ((1, 0), (1, 1)):
        with pytest.raises(ValueError, match="in order, each once"):
            HybridConfig(kept_heads=heads)
    for heads in ((2,), (0, 1)):
        with pytest.raises(ValueError, match="must be some of 2 key heads"):
            HybridConfig(kept_heads=heads).mapped_heads(4, 2)
    with pytest.raises(IdentityMismatch, match="this model and options need"):
        linearize(make_teacher(), KEPT, make_maps(KEPT))  # of all heads
    assert HybridConfig(**KEPT.to_dict()) == KEPT
    assert HybridConfig().to_dict().keys() == {"feature_map", "feature_dim", "window", "layout", "linear_factor"}
