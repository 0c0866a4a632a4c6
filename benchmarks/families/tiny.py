"""A tiny configuration of every causal language model in transformers: what its sizes are called, and what they become.
A model of it, with random weights, runs in milliseconds."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCAB = 260
# Field of a configuration -> its value, in whatever configuration has it.
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "d_model": 64, "n_embd": 64, "emb_dim": 64, "embedding_size": 64,
    "intermediate_size": 96, "ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "n_inner": 96, "dff": 96,
    "d_inner": 96, "ffn_hidden_size": 96, "dim_ff": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "prefix_dense_intermediate_size": 96, "expert_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "kv_channels": 16, "dim_head": 16, "d_head": 16,
    "attention_head_dim": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "max_position_embeddings": 512, "n_positions": 512, "n_ctx": 512, "max_seq_len": 512, "context_length": 512,
    "initializer_range": 0.2, "init_std": 0.2,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0, "sep_token_id": 1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "qk_head_dim": 16,
    "v_head_dim": 16, "o_lora_rank": 8, "o_groups": 2,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 16, "mamba_head_dim": 16, "mamba_n_groups": 1,
    "n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 128, "mamba_expand": 2, "mamba_chunk_size": 8, "chunk_size": 8,
    "ssm_state_size": 8, "state_size": 8, "mamba_dt_rank": 4, "time_step_rank": 4, "n_mamba_heads": 2,
    "mamba_ngroups": 1, "sliding_window": 8, "rotary_dim": 8, "type_vocab_size": 2, "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB, "lru_width": 64, "attention_window_size": 8, "image_size": 16, "patch_size": 8,
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0, "dropout": 0.0, "attention_dropout": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "activation_dropout": 0.0, "decoder_layerdrop": 0.0, "layerdrop": 0.0, "hidden_dropout": 0.0,
    "is_decoder": True,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
INDEXED = {
    **LINEAR, "indexer_budget": 64, "indexer_compress_ratio": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 16, "hc_lowrank": 16,
}  # fmt: skip
# Model type -> what else its configuration needs, by part; layers of each kind that it has.
SPECIAL: dict[str, dict[str, Any]] = {
    "afmoe": SLIDING,
    "bailing_hybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1]},
    "cohere2": SLIDING,
    "cohere2_moe": SLIDING,
    "big_bird": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 50, "vocab_size": VOCAB},
    "cohere_compass_text": {**SLIDING, "rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "dots3_note": {
        "text_config": {"num_key_value_heads": 4, "per_layer_config": None},
        "vision_config": {"pyramid_num_routed": [-1, -1], "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "emu3": {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4, "<|visual token 000000|>": 5}},
    "exaone4": SLIDING,
    "exaone_moe": SLIDING,
    "gemma3": {"text_config": SLIDING},
    "gemma3_text": SLIDING,
    "gemma3n": {"text_config": {**SLIDING, "num_kv_shared_layers": 0}},
    "gemma3n_text": {**SLIDING, "num_kv_shared_layers": 0},
    "glm4v": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": LINEAR,
    "kolibri1": SLIDING,
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "lfm3": CONVOLUTION,
    "llama4": {"text_config": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 512}},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 512},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": SLIDING,
    "ministral": SLIDING,
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "olmo3": SLIDING,
    "qwen2_vl": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [2, 3, 3]}}},
    "qwen3_5": {"text_config": LINEAR},
    "qwen3_5_moe": {"text_config": LINEAR},
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp": {"text_config": INDEXED},
    "qwen4_exp_text": INDEXED,
    "reformer": {"axial_pos_embds": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "smollm3": {"no_rope_layers": [1, 0]},
    "phimoe": {"sliding_window": 512},  # those of its checkpoints are as long as their context
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The tiny configuration of a model type, parts and all."""
    return _shrunk(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}))


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A causal language model of that type with random weights."""
    from lolcats_cli.teacher.load import class_name

    torch.manual_seed(seed)
    config = tiny_config(model_type)
    found = class_name(config.to_dict())
    return getattr(transformers, found[0] if found else "AutoModelForCausalLM").from_config(config).eval()


def _shrunk(kind: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    taken = {kind.attribute_map.get(name, name) for name in names if name in SIZES}
    values = {name: SIZES[name] for name in names if name in SIZES and kind.attribute_map.get(name, name) in taken}
    if "kv_lora_rank" in names:  # latent attention repeats no keys
        values["num_key_value_heads"] = values["num_attention_heads"]
    if kind.sub_configs:
        default = kind()
        for name in kind.sub_configs:
            if (part := getattr(default, name, None)) is not None:
                values[name] = _shrunk(type(part), special.get(name, {}))
    return kind(**values | {name: value for name, value in special.items() if name not in kind.sub_configs})
