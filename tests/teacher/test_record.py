"""Recording: the attention interface of real architectures, with random weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from lolcats_cli.errors import BadInput
from lolcats_cli.teacher.attention import AttentionSpec, softmax_attention
from lolcats_cli.teacher.record import LayerInfo, probe, recording

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# name -> what its configuration says besides SMALL
SERVED = {
    "Llama": {},
    "Mistral": {"sliding_window": 7},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {
        "head_dim": 16,
        "sliding_window": 9,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GPTNeoX": {},
}
SPECS = {
    "Llama": [AttentionSpec(8**-0.5)] * 2,
    "Mistral": [AttentionSpec(8**-0.5, sliding_window=7)] * 2,
    "Qwen3": [AttentionSpec(0.25)] * 2,
    "Gemma2": [AttentionSpec(0.5, 9, 2.0), AttentionSpec(0.5, None, 2.0)],
    "GPTNeoX": [AttentionSpec(8**-0.5)] * 2,
}


def make(name: str, seed: int = 0, **other: object) -> PreTrainedModel:
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(seed)
    config = config_class(**(SMALL | SERVED.get(name, {}) | other))
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", SERVED)
def test_probe_finds_every_layer(name: str) -> None:
    model = make(name)
    before = model.config._attn_implementation
    layers = probe(model)
    heads = SMALL["num_attention_heads"] if name == "GPTNeoX" else SMALL["num_key_value_heads"]
    size = SERVED[name].get("head_dim", 8)
    assert layers == [LayerInfo(4, heads, size, spec) for spec in SPECS[name]]
    assert model.config._attn_implementation == before
    assert [LayerInfo.from_dict(layer.to_dict()) for layer in layers] == layers
    assert layers[0].bytes_per_token(torch.bfloat16) == (4 + 2 * heads) * size * 2


@pytest.mark.parametrize("name", SERVED)
def test_recording_changes_no_logit_and_hands_over_what_makes_them(name: str) -> None:
    model = make(name)
    ids = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(1))
    seen: dict[int, tuple[Tensor, Tensor, Tensor, AttentionSpec]] = {}
    model.set_attn_implementation("eager")
    outputs: dict[int, Tensor] = {}
    layers = model.base_model.layers
    for index, layer in enumerate(layers):
        attention = layer.attention if name == "GPTNeoX" else layer.self_attn
        projection = attention.dense if name == "GPTNeoX" else attention.o_proj
        projection.register_forward_pre_hook(lambda _, args, i=index: outputs.__setitem__(i, args[0]))
    with torch.no_grad():
        own = model(input_ids=ids).logits
        eager = dict(outputs)
        with recording(model, lambda layer, *rest: seen.__setitem__(layer, rest)):
            ours = model(input_ids=ids).logits
        assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    for layer, (q, k, v, spec) in seen.items():
        out = softmax_attention(q, k, v, spec).transpose(1, 2).reshape(2, 20, -1)
        torch.testing.assert_close(out, eager[layer], rtol=1e-4, atol=1e-4)
    assert sorted(seen) == [0, 1]


def test_recording_ends_on_an_exception() -> None:
    model = make("Llama")
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), recording(model, lambda *_: None):
        raise RuntimeError
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["Falcon", "Bloom"])
def test_model_without_the_interface_is_refused_by_name(name: str) -> None:
    model = make(name, n_head=4, n_layer=2)
    with pytest.raises(BadInput, match=rf"{name}ForCausalLM cannot be linearized: layer 0 \(2 of 2 layers\)"):
        probe(model)


def test_sinks_are_refused_by_layer() -> None:
    model = make("GptOss", num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    with pytest.raises(BadInput, match=r"GptOssForCausalLM cannot be linearized: the attention of layer 0 .* sinks"):
        probe(model)


def test_latent_attention_of_two_head_sizes_is_refused() -> None:
    model = make(
        "DeepseekV3",
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=6,
        first_k_dense_replace=2,
    )
    with pytest.raises(BadInput, match=r"DeepseekV3ForCausalLM cannot be linearized: in layer 0 .* \(8, 8, 6\)"):
        probe(model)
