"""Layers run block by block see what they see in the whole model, to the bit, for many architectures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats_cli.errors import BadInput
from lolcats_cli.teacher.blocks import block, decoder_layers
from lolcats_cli.teacher.record import recording

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# Layers with and without sliding windows, RoPE and experts; positions that are added; fused projections.
FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "gemma2": {"sliding_window": 16, "head_dim": 16},
    "gemma3_text": {"sliding_window": 16, "head_dim": 16},
    "phi3": {"pad_token_id": 0},
    "olmo2": {},
    "granite": {},
    "smollm3": {"pad_token_id": 0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128},
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "cohere2": {"pad_token_id": 0, "sliding_window": 16},
}


def make(family: str) -> PreTrainedModel:
    sizes = {"vocab_size": 260, "bos_token_id": 0, "eos_token_id": 1} if family == "gpt2" else SIZES
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(type(AutoConfig.for_model(family))(**sizes | FAMILIES[family])).eval()


def seen_by(model: PreTrainedModel, blocks: list[range], ids: Tensor, valid: Tensor | None) -> dict[int, list[Tensor]]:
    """q, k and v of every layer."""
    seen: dict[int, list[Tensor]] = {}
    hidden = None
    with recording(model, lambda layer, q, k, v, spec: seen.__setitem__(layer, [q, k, v])):
        for layers in blocks:
            with block(model, layers, CPU) as run:
                hidden = run(ids, valid, hidden)
    assert hidden is None, "behind the last layer nothing is handed on"
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_the_whole(family: str) -> None:
    model = make(family)
    ids, valid = torch.randint(0, 260, (3, 48)), torch.ones(3, 48, dtype=torch.bool)
    valid[1, 40:] = False
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for mask in (None, valid):
        whole = seen_by(model, [range(4)], ids, mask)
        parts = seen_by(model, [range(1), range(1, 3), range(3, 4)], ids, mask)
        assert sorted(parts) == sorted(whole) == [0, 1, 2, 3]
        assert all(torch.equal(a, b) for layer in whole for a, b in zip(parts[layer], whole[layer], strict=True))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    with torch.no_grad():  # no hook is left
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_only_the_blocks_layers_run() -> None:
    model = make("llama")
    ran: list[int] = []
    for number, layer in enumerate(decoder_layers(model)):
        layer.self_attn.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    with block(model, range(1, 3), CPU) as run:
        out = run(torch.zeros(1, 8, dtype=torch.int32), None, torch.randn(1, 8, 64))
    assert ran == [1, 2]
    assert out is not None and out.shape == (1, 8, 64)


def test_a_model_without_a_list_of_layers_is_named() -> None:
    model = make("llama")
    model.config.num_hidden_layers = 5
    with pytest.raises(BadInput, match=r"LlamaForCausalLM cannot be captured: it has no list of 5 decoder layers"):
        decoder_layers(model)


def test_weights_come_to_the_device_and_go_back() -> None:
    """The meta device stands for one whose weights are not in memory: only a block's are moved there."""
    model, meta = make("llama"), torch.device("meta")
    inside = [name for name, _ in model.named_parameters() if ".layers.1." in name or ".layers.2." in name]
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    with block(model, range(1, 3), meta):
        there = {name for name, tensor in model.named_parameters() if tensor.device == meta}
        assert there == {*inside, "model.embed_tokens.weight", "model.norm.weight"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
