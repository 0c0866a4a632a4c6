"""Other architectures that go through the attention interface: the same student, nothing of their own."""

from __future__ import annotations

import pytest
import torch
from lolcats_kernels.maps import HybridConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats_cli.errors import BadInput
from lolcats_cli.student.build import check_servable, linearize, model_heads

MODELS = {
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "qwen3": {"head_dim": 32},
    "phi3": {},
    "granite": {"attention_multiplier": 0.2},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 4},
}


def tiny_model(sizes: dict, model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **changes})).eval()


@pytest.mark.parametrize("model_type", MODELS)
def test_cache_and_padding(model_type, sizes, make_maps, tokens):
    config = HybridConfig(window=6, feature_dim=8)
    model = tiny_model(sizes, model_type, **MODELS[model_type])
    softmax = model(tokens).logits
    heads, head_dim = model_heads(model)
    student = linearize(model, config, make_maps(config, heads=heads, head_dim=head_dim))
    expected = student(tokens, use_cache=False).logits
    assert (expected - softmax).abs().max() > 0.01

    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    near = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(student(padded, attention_mask=mask).logits[:, 5:], expected, **near)
    right = student(torch.cat([tokens, padded[:, :5]], 1), attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(right[:, :23], expected, **near)

    cache = student.new_cache()
    parts = [student(part, past_key_values=cache).logits for part in tokens.split([9, 1, 13], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **near)
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(student.generate(padded, **common), student.generate(padded, use_cache=False, **common))


@pytest.mark.parametrize(
    "model_type, changes, reason",
    [
        ("gemma2", {"head_dim": 16}, "attn_logit_softcapping"),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4}, "sinks"),
        ("bloom", {}, "attention interface"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(model_type, changes, reason, sizes):
    model = tiny_model(sizes, model_type, **changes)
    with pytest.raises(BadInput, match=f"(?s){type(model).__name__}.*{reason}"):
        check_servable(model)
