"""Recording: the attention interface of real architectures, with random weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from lolcats_kernels import hf_adapters
from lolcats_kernels.softmax import AttentionSpec, softmax_attention, softmax_scores
from torch import Tensor
from transformers import PreTrainedModel

from lolcats_cli.errors import BadInput
from lolcats_cli.teacher.record import LayerInfo, checking, probe, recording

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


def test_model_without_the_interface_is_refused_by_name() -> None:
    model = make("Bloom", n_head=4, n_layer=2)
    with pytest.raises(BadInput, match="BloomForCausalLM cannot be linearized: none of its 2 layers has an attention"):
        probe(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_of_its_own_is_reached_by_its_adapter_and_compared(dtype, monkeypatch) -> None:
    model = make("Falcon", num_attention_heads=4, ffn_hidden_size=32).to(dtype)
    assert [(x.num_heads, x.num_key_value_heads) for x in probe(model)] == [(4, 1)] * 2
    with recording(model, lambda layer, q, k, v, spec: None):
        pass
    assert "forward" not in vars(model.transformer.h[0].self_attention)  # as it was
    method, falcon = hf_adapters.ADAPTERS["FalconAttention"]

    def wrong(attend, module, *args, **options):
        out, weights = falcon(attend, module, *args, **options)
        return out * 1.1, weights

    monkeypatch.setitem(hf_adapters.ADAPTERS, "FalconAttention", (method, wrong))
    with pytest.raises(BadInput, match="with lolcats' adapter the attention of layer 0 differs"):
        probe(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_are_recorded(dtype: torch.dtype) -> None:
    model = make("GptOss", num_local_experts=2, num_experts_per_tok=1, head_dim=8).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([-2.0, 0.0, 1.0, 6.0]))
    for info in probe(model):
        assert info.spec.sinks.tolist() == [-2.0, 0.0, 1.0, 6.0]
        again = LayerInfo.from_dict(json.loads(json.dumps(info.to_dict())))
        assert again == info and again.spec.sinks.tolist() == info.spec.sinks.tolist()


def test_other_sinks_than_those_that_are_told_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("GptOss", num_local_experts=2, num_experts_per_tok=1, head_dim=8)
    modeling = transformers.models.gpt_oss.modeling_gpt_oss
    own = modeling.eager_attention_forward

    def other(module, *args, **options):
        module = SimpleNamespace(**vars(module), sinks=module.sinks + 0.1)
        return own(module, *args, **options)

    monkeypatch.setattr(modeling, "eager_attention_forward", other)
    with pytest.raises(BadInput, match="GptOssForCausalLM cannot be linearized: the attention of layer 0"):
        probe(model)


def other_bias(q: Tensor, k: Tensor, mask: Tensor, scaling: float) -> tuple[Tensor, float]:
    """ALiBi, small: a penalty for each token of distance."""
    place = torch.arange(k.shape[2])
    return mask - 0.01 * (place[:, None] - place).clamp(min=0), scaling


def other_scaling(q: Tensor, k: Tensor, mask: Tensor, scaling: float) -> tuple[Tensor, float]:
    return mask, scaling * 1.01


def other_mask(q: Tensor, k: Tensor, mask: Tensor, scaling: float) -> tuple[Tensor, float]:
    """The last token does not see the third."""
    mask = mask.clone()
    mask[..., -1, 2] = torch.finfo(mask.dtype).min
    return mask, scaling


@pytest.mark.parametrize("other", [other_bias, other_scaling, other_mask])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_that_does_something_else_is_refused(other, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = transformers.models.llama.modeling_llama
    eager = modeling.eager_attention_forward

    def changed(module, query, key, value, attention_mask, scaling, **options):
        if module.layer_idx == 1:
            attention_mask, scaling = other(query, key, attention_mask, scaling)
        return eager(module, query, key, value, attention_mask, scaling=scaling, **options)

    model = make("Llama").to(dtype)
    probe(model)
    monkeypatch.setattr(modeling, "eager_attention_forward", changed)
    with pytest.raises(BadInput, match=r"LlamaForCausalLM cannot be linearized: the attention of layer 1 is not repro"):
        probe(model)


def test_attention_in_chunks_is_refused() -> None:
    config = transformers.Llama4TextConfig(
        **SMALL, attention_chunk_size=16, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    with pytest.raises(BadInput, match="the attention of layer 0 is not reproduced"):
        probe(model)


def test_a_deep_model_in_bf16_with_sharp_scores_is_taken() -> None:
    model = make("Llama", num_hidden_layers=64, initializer_range=1.0).bfloat16()
    largest = []

    def note(_: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
        largest.append(softmax_scores(q, k, spec).max())

    with torch.no_grad(), recording(model, note):
        model(input_ids=torch.arange(3, 51)[None])
    assert max(largest) > 100
    assert len(probe(model)) == 64


def test_some_layers_can_be_checked_alone() -> None:
    model = make("Llama", num_hidden_layers=3)
    model.model.layers = model.model.layers[1:]
    valid = torch.ones(1, 9, dtype=torch.bool)
    valid[:, :4] = False
    with torch.no_grad(), checking(model, valid) as found:
        model.model(input_ids=torch.arange(3, 12)[None], attention_mask=valid.long(), use_cache=False)
    assert found == {layer: LayerInfo(4, 2, 8, AttentionSpec(8**-0.5)) for layer in (1, 2)}


def test_weights_that_are_nan_are_named_by_layer() -> None:
    model = make("Llama", num_hidden_layers=3)
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BadInput, match=r"keys or values of layer 1 are NaN or infinite.* --dtype bfloat16 or float32"):
        probe(model)


def test_an_overflow_of_float16_is_named_by_layer() -> None:
    model = make("Llama", num_hidden_layers=3)
    model.model.layers[1].mlp.down_proj.weight.data *= 1e5
    assert len(probe(model)) == 3
    with pytest.raises(BadInput, match=r"keys or values of layer 2 are NaN or infinite.* --dtype bfloat16 or float32"):
        probe(model.half())


def test_a_last_layer_that_overflows_is_named() -> None:
    model = make("Llama")
    model.model.layers[1].mlp.down_proj.weight.data[:] = torch.inf
    with pytest.raises(BadInput, match="the output of its last layer, 1, is NaN or infinite"):
        probe(model)


def test_latent_attention_is_recorded_behind_its_up_projections() -> None:
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
    for info in probe(model):
        assert info.shapes == {"q": (4, 8), "k": (4, 8), "v": (4, 6)}
        assert info.bytes_per_token(torch.bfloat16) == 4 * (8 + 8 + 6) * 2
        assert LayerInfo.from_dict(info.to_dict()) == info and info.to_dict()["v_head_dim"] == 6


def test_an_indexer_chooses_nothing_while_it_is_recorded() -> None:
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    indexer = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2, "mlp_layer_types": ["dense"] * 2}
    model = make("DeepseekV32", num_key_value_heads=4, **sizes, **indexer)
    assert [info.num_heads for info in probe(model)] == [4, 4]
    seen = {}
    with recording(model, lambda layer, q, k, v, spec: seen.update({layer: softmax_attention(q, k, v, spec)})):
        model.model(torch.arange(3, 23)[None])
    assert set(seen) == {0, 1}
    assert "forward" not in vars(model.model.layers[0].self_attn.indexer)
