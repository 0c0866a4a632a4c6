"""A merged student with a sparse exact cache: asked for when it is loaded, and in every way a student.

The window is 8 and a block of keys 64: the prompts of 90 tokens are past the first choice.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

SIZE = 5


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def student(pipeline: SimpleNamespace) -> PreTrainedModel:
    return load(pipeline.student, sparse_cache_size=SIZE)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(3, 260, (3, 90), generator=torch.Generator().manual_seed(0))


def test_it_is_off_by_default_and_changes_what_lies_before_the_window(
    pipeline: SimpleNamespace, student: PreTrainedModel, tokens: torch.Tensor
) -> None:
    plain = load(pipeline.student)
    assert not any(layer.self_attn.hybrid.sparse_cache_size for layer in plain.model.layers)
    with torch.no_grad():
        without, with_it = plain(tokens).logits, student(tokens).logits
    torch.testing.assert_close(with_it[:, :8], without[:, :8], rtol=1e-4, atol=1e-5)  # within the window of 8
    assert (with_it[:, 9:] - without[:, 9:]).abs().amax() > 1e-3


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 7}])
def test_cached_is_uncached_with_padding(student: PreTrainedModel, tokens: torch.Tensor, options: dict) -> None:
    mask = torch.ones_like(tokens)
    mask[1, :13] = 0
    common = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, **options}
    uncached = {key: value for key, value in common.items() if key != "prefill_chunk_size"}
    assert torch.equal(student.generate(tokens, **common), student.generate(tokens, use_cache=False, **uncached))
    alone = student.generate(tokens[1:2, 13:], **{**common, "attention_mask": mask[1:2, 13:]})
    together = student.generate(tokens, **common)
    assert torch.equal(together[1, 90:], alone[0, 77:])


def test_memory_is_constant_and_a_prefix_is_a_prefix(student: PreTrainedModel, tokens: torch.Tensor) -> None:
    cache, sizes = student.new_cache(), []
    with torch.no_grad():
        for part in tokens.split(10, 1):
            last = student(part, past_key_values=cache).logits
            sizes.append(cache.nbytes)
        whole = student(tokens).logits
        prefix = student(tokens[:, :83]).logits
    assert len(set(sizes)) == 1
    torch.testing.assert_close(last, whole[:, 80:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(prefix, whole[:, :83], rtol=1e-4, atol=1e-4)


def test_the_choice_is_saved_and_can_be_taken_back(
    student: PreTrainedModel, tokens: torch.Tensor, tmp_path: Path
) -> None:
    student.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = student(tokens).logits
        torch.testing.assert_close(load(tmp_path / "saved")(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        plain = load(tmp_path / "saved", sparse_cache_size=0)
        assert (plain(tokens).logits - expected).abs().amax() > 1e-3
    with pytest.raises(ValueError, match="sparse_cache_size is -1"):
        load(tmp_path / "saved", sparse_cache_size=-1)
