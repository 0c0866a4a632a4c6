"""Other architectures that go through the attention interface: the same student, nothing of their own."""

from __future__ import annotations

import pytest
import torch
from lolcats_kernels.maps import HybridConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats_cli.errors import BadInput
from lolcats_cli.student.build import check_servable, linearize, model_heads

ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
SHORT = {**ROPE, "original_max_position_embeddings": 12}  # the tests' sequences are longer
# name -> model type, and what its configuration says besides the sizes.
MODELS = {
    "llama linear RoPE": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}),
    "llama dynamic RoPE": (
        "llama",
        {"rope_parameters": {**SHORT, "rope_type": "dynamic"}, "max_position_embeddings": 12},
    ),
    "llama yarn RoPE": ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}),
    "llama longrope RoPE": (
        "llama",
        {"rope_parameters": {**SHORT, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
    ),
    "llama llama3 RoPE": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"attention_multiplier": 0.2}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "glm4": ("glm4", {"head_dim": 16}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


def tiny_model(sizes: dict, model_type: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **changes})).eval()


@pytest.mark.parametrize("name", MODELS)
def test_cache_padding_and_prefixes(name, sizes, make_maps, tokens):
    config = HybridConfig(window=6, feature_dim=8)
    model_type, changes = MODELS[name]
    model = tiny_model(sizes, model_type, **changes)
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

    for length in (1, 7, 16):
        torch.testing.assert_close(student(tokens[:, :length]).logits, expected[:, :length], **near)
    changed = torch.cat([tokens[:, :16], tokens[:, 16:].flip(1)], 1)
    torch.testing.assert_close(student(changed).logits[:, :16], expected[:, :16], **near)

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
