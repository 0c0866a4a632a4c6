"""A teacher's sizes from its configuration alone, beside those of the model that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lolcats_cli.errors import BadInput
from lolcats_cli.teacher.shape import EXPERTS, GATED, PLAIN, parse, read_shape

SIZES = {
    "vocab_size": 20000,
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
FINE = {**MIXTURE, "moe_intermediate_size": 512}
OF_TYPE: dict[str, dict] = {
    "gpt2": {"vocab_size": 20000, "n_embd": 1024, "n_layer": 3, "n_head": 8},
    "gpt_neox": {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")},
    "opt": {
        **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "ffn_dim": 1536,
        "word_embed_proj_dim": 1024,
        "max_position_embeddings": 64,
    },
    "mixtral": {**SIZES, **MIXTURE},
    "granitemoe": {**SIZES, **MIXTURE},
    "olmoe": {**SIZES, **MIXTURE},
    "qwen2_moe": {**SIZES, **FINE, "shared_expert_intermediate_size": 256, "mlp_only_layers": [1]},
    "qwen3_moe": {**SIZES, **FINE, "decoder_sparse_step": 2},
    "glm4_moe": {**SIZES, **FINE, "first_k_dense_replace": 1, "n_shared_experts": 2},
}
LLAMA = {**SIZES, "model_type": "llama", "dtype": "bfloat16"}


@pytest.mark.parametrize("kind", sorted(GATED | PLAIN | EXPERTS))
def test_weights_and_heads_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    """Of a model without its weights, from the configuration as transformers writes it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lolcats_cli.student.build import attention_modules, stated_heads

    config = AutoConfig.for_model(kind, **{"pad_token_id": 0, **OF_TYPE.get(kind, SIZES)})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert shape.weights == pytest.approx(
        sum(p.numel() for p in model.parameters()), rel=0.03 if kind == "gpt2" else 0.005
    )
    assert (shape.num_heads, shape.head_dim) == stated_heads(model, attention_modules(model)[0])
    assert len(shape.layers) == model.config.num_hidden_layers
    assert all(layer.active <= layer.mlp for layer in shape.layers)


def test_experts_that_a_token_goes_through() -> None:
    shape = parse({**LLAMA, **FINE, "model_type": "glm4_moe", "first_k_dense_replace": 1, "n_shared_experts": 2}, "X")
    dense, sparse = shape.layers[0], shape.layers[1]
    assert dense.active == dense.mlp == 3 * 1024 * 1536
    assert (sparse.active, sparse.mlp) == (3 * 1024 * 512 * (2 + 2), 3 * 1024 * 512 * (4 + 2))


def test_the_text_model_of_a_wrapper() -> None:
    inner = {**LLAMA, "model_type": "gemma3_text", "dtype": None}
    shape = parse({"model_type": "gemma3", "torch_dtype": "bfloat16", "text_config": inner}, "X")
    assert (shape.model_type, shape.dtype, shape.tied) == ("gemma3_text", "bfloat16", True)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba2"}, "'mamba2'"),
        ({"model_type": None}, "'None'"),
        ({"hidden_size": None}, "hidden_size or n_embd"),
        ({"num_attention_heads": "eight"}, "num_attention_heads: eight"),
        ({"vocab_size": -1}, "vocab_size: -1"),
        ({"dtype": "float8_e4m3fn"}, "'float8_e4m3fn'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"model_type": "mixtral"}, "num_local_experts|num_experts_per_tok"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict, named: str) -> None:
    with pytest.raises(BadInput, match=named) as caught:
        parse({**LLAMA, **changes}, "some/teacher")
    assert "some/teacher" in str(caught.value)


def test_a_hub_id_that_cannot_be_fetched(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no-such/model is not a local folder"):
        read_shape("no-such/model")
    with pytest.raises(BadInput, match="is not a folder"):
        read_shape(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_shape(str(tmp_path)).attention_token == (8 + 2 * 2) * 128 * 2
