"""Cached generation equals recomputation; padding is as if it were not there."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lolcats_kernels import HybridConfig
from lolcats_kernels.hf_attention import lolcats_mask
from lolcats_kernels.hf_cache import CACHE_NAME, LolcatsCache
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from lolcats_cli.student.build import linearize

CONFIGS = [
    HybridConfig(window=6, feature_dim=8),
    HybridConfig(window=4, feature_dim=8, layout="terraced", linear_factor="affine"),
    HybridConfig(window=0, feature_map="t2r"),
    HybridConfig(window=3, feature_map="elu"),
    HybridConfig(window=6, feature_dim=8, linear_factor="exp"),
    HybridConfig(window=4, feature_dim=8, layout="terraced", linear_factor="exp"),
    HybridConfig(window=0, feature_dim=8, linear_factor="exp", decay=True),
    HybridConfig(window=4, feature_dim=8, layout="terraced", decay=True),
]
KEPT = [[0], [1]]
KEPT_HEADS = [HybridConfig(window=6, feature_dim=8, linear_factor="exp", kept_heads=(0,))]


@pytest.fixture(params=[*CONFIGS, *KEPT, *KEPT_HEADS], ids=str, scope="module")
def any_student(request, make_student):
    """Of every kind; and with one of its two layers, or one of two key heads in each, kept softmax."""
    if isinstance(request.param, list):
        return make_student(keep_softmax=request.param)
    return make_student(request.param)


def pad(tokens: torch.Tensor, left: list[int], right: list[int]) -> tuple[torch.Tensor, torch.Tensor, list[slice]]:
    """Rows with that much padding on each side, as wide as the widest; -> (tokens, mask, where each row's are)."""
    length = tokens.shape[1]
    width = max(a + length + b for a, b in zip(left, right, strict=True))
    out = torch.zeros(len(tokens), width, dtype=torch.long)
    mask = torch.zeros_like(out)
    places = [
        slice(a if b else width - length, (a if b else width - length) + length)
        for a, b in zip(left, right, strict=True)
    ]
    for i, place in enumerate(places):
        out[i, place], mask[i, place] = tokens[i], 1
    return out, mask, places


@pytest.mark.parametrize("left, right", [([7, 0], [0, 7]), ([3, 9], [0, 0]), ([0, 0], [2, 5]), ([1, 2], [4, 3])])
def test_padding_changes_nothing(any_student, tokens, left, right):
    padded, mask, places = pad(tokens, left, right)
    logits = any_student(padded, attention_mask=mask).logits
    expected = any_student(tokens).logits
    for row, place in enumerate(places):
        torch.testing.assert_close(logits[row, place], expected[row], atol=1e-4, rtol=1e-4)


def test_a_masks_ones_may_be_any_numbers(any_student, tokens):
    """As packed documents are numbered by some: all of them are real tokens, and positions go on."""
    ones = torch.ones_like(tokens)
    numbered = ones.clone()
    numbered[:, tokens.shape[1] // 2 :] = 2
    assert torch.equal(
        any_student(tokens, attention_mask=numbered).logits, any_student(tokens, attention_mask=ones).logits
    )
    padded = numbered.masked_fill(torch.arange(tokens.shape[1]) < 3, 0)
    assert torch.equal(
        any_student(tokens, attention_mask=padded).logits,
        any_student(tokens, attention_mask=padded.clamp(max=1)).logits,
    )


def test_what_stands_in_padding_does_not_matter(any_student, tokens):
    padded, mask, _ = pad(tokens, [5, 0], [0, 5])
    other = torch.where(mask.bool(), padded, 77)
    real = mask.bool()
    assert torch.equal(
        any_student(padded, attention_mask=mask).logits[real], any_student(other, attention_mask=mask).logits[real]
    )


@settings(max_examples=12, deadline=None)
@given(length=st.integers(1, 22))
def test_a_prefix_gives_what_the_whole_gives(student, length):
    tokens = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        student(tokens[:, :length]).logits, student(tokens).logits[:, :length], atol=1e-4, rtol=1e-4
    )


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(1, 22), max_size=6))
def test_any_chunking_of_the_input_gives_the_same_logits(any_student, cuts):
    student = any_student
    tokens = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(2))
    cache = student.new_cache()
    bounds = [0, *sorted(set(cuts)), 23]
    parts = [student(tokens[:, a:b], past_key_values=cache).logits for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(torch.cat(parts, 1), student(tokens, use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 23


def test_a_cache_is_found_by_any_name(make_student, tokens):
    """transformers 5.24 hands it to attentions by another name than 5.23; who misses it writes other text."""
    student = make_student()

    def rename(module, args, kwargs):
        return args, {"memory" if name in ("cache", "past_key_values") else name: x for name, x in kwargs.items()}

    for layer in student.model.layers:
        layer.self_attn.register_forward_pre_hook(rename, with_kwargs=True, prepend=True)
    cache = student.new_cache()
    parts = [student(part, **{CACHE_NAME: cache}).logits for part in tokens.split(9, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), student(tokens, use_cache=False).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
def test_cached_generation_equals_recomputation(any_student, tokens, options):
    padded, mask, _ = pad(tokens, [0, 4], [0, 0])
    for ids, attention_mask in ((tokens, None), (padded, mask)):
        common = {"attention_mask": attention_mask, "max_new_tokens": 12, "do_sample": False, **options}
        cached = any_student.generate(ids, **common)
        assert torch.equal(cached, any_student.generate(ids, use_cache=False, **common))


def test_a_left_padded_batch_generates_what_its_rows_do(any_student, tokens):
    padded, mask, _ = pad(tokens, [4, 4], [0, 0])
    short, short_mask = padded.clone(), mask.clone()
    short[0, :10], short_mask[0, :10] = 0, 0
    batch = any_student.generate(short, attention_mask=short_mask, max_new_tokens=10, do_sample=False)
    alone = any_student.generate(short[:1, 10:], max_new_tokens=10, do_sample=False)
    assert torch.equal(batch[0, -10:], alone[0, -10:])


def test_sampling_and_chunked_prefill(student, tokens):
    def sample(**options: object) -> torch.Tensor:
        torch.manual_seed(3)
        return student.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=True,
            max_new_tokens=12,
            num_return_sequences=2,
            **options,
        )

    assert torch.equal(sample(), sample(use_cache=False))
    assert torch.equal(sample(), sample(prefill_chunk_size=5))


def test_continuing_from_a_returned_cache(student, tokens):
    first = student.generate(tokens, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert isinstance(first.past_key_values, LolcatsCache)
    longer = torch.cat([first.sequences, tokens[:, :4]], 1)
    common = {"attention_mask": torch.ones_like(longer), "max_new_tokens": 5, "do_sample": False}
    expected = student.generate(longer, **common)
    for cache in (copy.deepcopy(first.past_key_values), first.past_key_values):
        assert torch.equal(student.generate(longer, past_key_values=cache, **common), expected)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_cache_does_not_grow(make_student, config, tokens):
    student = make_student(config)
    cache = student.new_cache()
    sizes = []
    for _ in range(3):
        student(tokens, past_key_values=cache)
        sizes.append(cache.nbytes)
    assert sizes[0] == sizes[1] == sizes[2] > 0
    assert cache.get_seq_length() == 69
    cache.reset()
    assert cache.get_seq_length() == cache.nbytes == 0


def test_a_kept_layer_is_the_teachers_own(make_teacher, make_student, make_maps, tokens):
    """Up to the first converted layer nothing differs; a teacher's sliding window stays one, and so does its cache."""
    config = HybridConfig(window=40, feature_dim=8)  # over all tokens: converted layers are softmax too
    for changes in ({}, {"num_hidden_layers": 2}):
        student = make_student(config, keep_softmax=[1], **changes)
        torch.testing.assert_close(student(tokens).logits, make_teacher(**changes)(tokens).logits)
    assert student.new_cache().nbytes == 0
    cache = student(tokens, use_cache=True).past_key_values
    before = cache.nbytes
    student(tokens, past_key_values=cache)
    assert cache.nbytes - before == 2 * tokens.numel() * 2 * 16 * 4  # keys and values of one layer: 2 heads of 16


def test_kept_sliding_windows_stay_as_they_are(sizes, make_maps, tokens):
    """Mistral's, kept in the first layer alone; the second imitates a window that is longer than the text."""
    torch.manual_seed(0)
    teacher = MistralForCausalLM(MistralConfig(**sizes, head_dim=16, sliding_window=8)).eval()
    config = HybridConfig(window=8, feature_dim=8, linear_factor="exp")
    maps = make_maps(config)
    with torch.no_grad():
        maps[1].linear_logit.fill_(-1e4)  # the window alone: the teacher's own attention
    expected = teacher(tokens).logits
    student = linearize(teacher, config, {1: maps[1]}, keep_softmax=[0])
    torch.testing.assert_close(student(tokens).logits, expected)
    padded, mask, places = pad(tokens, [3, 9], [0, 0])
    cache = student.new_cache()
    parts = []
    for begin, end in itertools.pairwise([0, 6, 20, padded.shape[1] - 1, padded.shape[1]]):
        parts.append(student(padded[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    logits = torch.cat(parts, 1)
    for row, place in enumerate(places):
        torch.testing.assert_close(logits[row, place], expected[row], atol=1e-4, rtol=1e-4)
    size = cache.nbytes
    student(tokens, past_key_values=cache)
    assert cache.nbytes == size


def test_cache_rows_can_be_selected_and_repeated(student, tokens):
    whole = student(tokens).logits
    for change, rows in (
        (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True])), [1]),
    ):
        cache = student.new_cache()
        change(cache)  # harmless on an empty cache
        student(tokens[:, :20], past_key_values=cache)
        change(cache)
        torch.testing.assert_close(
            student(tokens[rows, 20:], past_key_values=cache).logits, whole[rows, 20:], atol=1e-4, rtol=1e-4
        )


def test_what_a_recurrent_state_cannot_do_is_refused(student, tokens):
    with pytest.raises(ValueError, match="DynamicCache"):
        student(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="DynamicCache"):
        student.generate(tokens, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(ValueError, match="roll the cache back"):
        student.generate(tokens[:1], prompt_lookup_num_tokens=2, max_new_tokens=2)
    with pytest.raises(ValueError, match="quantized"):
        student.generate(tokens, cache_implementation="quantized", max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="roll back"):
        student.new_cache().crop(-1)
    with pytest.raises(ValueError, match="custom attention mask"):
        student(tokens, attention_mask=torch.zeros(2, 1, 23, 23))
    with pytest.raises(ValueError, match="packed"):
        student(tokens, position_ids=torch.cat([torch.arange(13), torch.arange(10)])[None], use_cache=False)


def test_a_failed_call_leaves_no_cache_behind(make_student, tokens):
    student = make_student()
    expected = student(tokens).logits
    with pytest.raises(ValueError):
        student(tokens, attention_mask=torch.zeros(2, 1, 23, 23), past_key_values=student.new_cache())
    assert torch.equal(student(tokens, use_cache=False).logits, expected)


def test_the_mask_function():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert lolcats_mask(2, 4, 4, attention_mask=None) is None
    assert lolcats_mask(2, 3, 4, attention_mask=torch.ones_like(mask)) is None
    for length in (3, 4):
        assert lolcats_mask(2, length, 4, attention_mask=mask).tolist() == mask.bool().tolist()
    with pytest.raises(ValueError, match="covers 4 tokens"):
        lolcats_mask(2, 5, 5, attention_mask=mask)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[2], CONFIGS[4], CONFIGS[5]], ids=str)
@torch.no_grad()
def test_a_compiled_decoding_step_is_one_graph_for_all_tokens(make_student, config, tokens):
    """Through torch.compile without a break, and compiled no more than twice: the number of tokens seen is a number."""
    student = make_student(config)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(student.forward, backend="aot_eager", fullgraph=True)
    caches = [student.new_cache(), student.new_cache()]
    for cache in caches:
        student(tokens, past_key_values=cache)
    token = tokens[:, :1]
    for _ in range(7):
        expected = student(token, past_key_values=caches[0]).logits
        torch.testing.assert_close(step(token, past_key_values=caches[1]).logits, expected, atol=1e-5, rtol=1e-5)
        token = expected[:, -1:].argmax(-1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_a_compiled_training_step_is_one_graph(make_student, tokens):
    student = make_student(CONFIGS[0]).train()
    torch._dynamo.reset()
    gradients = []
    for forward in (student.forward, torch.compile(student.forward, backend="aot_eager", fullgraph=True)):
        forward(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
        student.zero_grad()
    torch.testing.assert_close(*gradients)


def test_a_kept_layer_with_a_soft_cap_is_the_teachers_own(sizes, make_maps, tokens):
    """Gemma 2's, with a window over all tokens in the converted layer: nothing differs but the cap's own place."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"]
    config = Gemma2Config(**sizes, head_dim=16, sliding_window=8, layer_types=kinds, attn_logit_softcapping=0.5)
    teacher = Gemma2ForCausalLM(config).eval()
    teacher.set_attn_implementation("eager")
    expected = teacher(tokens).logits
    hybrid = HybridConfig(window=40, feature_dim=8)
    student = linearize(teacher, hybrid, {0: make_maps(hybrid)[0]}, keep_softmax=[1])
    torch.testing.assert_close(student(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    padded, mask, places = pad(tokens, [3, 9], [0, 0])
    logits = student(padded, attention_mask=mask).logits
    for row, place in enumerate(places):
        torch.testing.assert_close(logits[row, place], expected[row], atol=1e-4, rtol=1e-4)
