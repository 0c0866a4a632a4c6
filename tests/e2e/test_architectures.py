"""Architectures through all four stages, and the merged folder as transformers loads it.

benchmarks/families/run.py does this with every causal language model that transformers has: docs/compatibility.md. Here
are variants of some, and a dozen of those that differ most from Llama.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from lolcats_kernels import HybridConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lolcats_cli.errors import BadInput
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.loading.merged import load_merged
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.lora import lora
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.merge import merge
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.student.build import check_servable
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

RUN = Path(__file__).parents[2] / "benchmarks" / "families" / "run.py"
SIZES = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
SHORT = {**ROPE, "original_max_position_embeddings": 20}  # the sequences below are longer
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
WAVES = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# name -> model type, what its configuration says besides the sizes, and its projections if not q, k, v, o.
SERVED: dict[str, tuple[str, dict, tuple[str, ...]]] = {
    "Llama": ("llama", {}, ()),
    "Llama, tied embeddings": ("llama", {"tie_word_embeddings": True}, ()),
    "Llama, RoPE linear": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}, ()),
    "Llama, RoPE dynamic": (
        "llama",
        {"rope_parameters": {**SHORT, "rope_type": "dynamic"}, "max_position_embeddings": 20},
        (),
    ),
    "Llama, RoPE yarn": ("llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}, ()),
    "Llama, RoPE longrope": ("llama", {"rope_parameters": {**SHORT, "rope_type": "longrope", **FACTORS}}, ()),
    "Llama, RoPE llama3": ("llama", {"rope_parameters": {**ROPE, "rope_type": "llama3", **WAVES}}, ()),
    "Mistral": ("mistral", {"sliding_window": 8, "head_dim": 16}, ()),
    "Qwen2": ("qwen2", {}, ()),
    "Qwen3": ("qwen3", {"head_dim": 32}, ()),
    "Phi-3": ("phi3", {}, ("qkv_proj", "o_proj")),
    "OLMo 2": ("olmo2", {}, ()),
    "Granite": ("granite", {"attention_multiplier": 0.2}, ()),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}, ()),
    "Gemma 2": ("gemma2", {"head_dim": 16, "attn_logit_softcapping": 2.0, **MIXED}, ()),
    "Gemma 3": ("gemma3_text", {"head_dim": 16, **MIXED}, ()),
    "GPT-NeoX": ("gpt_neox", {}, ("query_key_value", "dense")),
    "GPT-2": ("gpt2", {}, ("c_attn", "attn.c_proj")),
    "GLM-4": ("glm4", {"head_dim": 16}, ()),
    "OPT": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, ("q_proj", "k_proj", "v_proj", "out_proj")),
    "Mixtral": ("mixtral", {"num_local_experts": 4}, ()),
    "Qwen3-MoE": ("qwen3_moe", {"head_dim": 16, **EXPERTS}, ()),
}
REFUSED = {
    "BLOOM": ("bloom", {}, "ALiBi"),
}
HYBRID = HybridConfig(window=6, feature_dim=8, linear_factor="exp")
NEAR = {"atol": 1e-4, "rtol": 1e-4}
# Of every kind one: a wrapper around a text model, a decoder of an encoder, positions read off tokens, latent
# attention, an indexer, experts, recurrences beside attention, code of its own for attention, sinks, heads that differ.
KINDS = (
    "gemma3", "bart", "roberta", "deepseek_v3", "llama4_text", "qwen3_next", "lfm2", "jamba", "cohere2", "gpt2",
    "bloom", "gpt_oss", "glm4_moe_lite", "deepseek_v32", "falcon", "gptj", "falcon_h1", "gemma4_text", "mistral3",
    "qwen3_vl",
)  # fmt: skip


def tiny_model(model_type: str, changes: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **changes})).eval()


@pytest.mark.parametrize("name", SERVED)
def test_the_whole_pipeline(name: str, pipeline: SimpleNamespace, tmp_path: Path) -> None:
    model_type, changes, targets = SERVED[name]
    teacher = tmp_path / "teacher"
    shutil.copytree(pipeline.teacher, teacher, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(pipeline.teacher / "tokenizer_config.json", teacher)
    tiny_model(model_type, changes).save_pretrained(teacher)
    data = DataOptions(seq_len=20, samples=6)
    captured = capture(str(teacher), str(pipeline.text), tmp_path / "capture", options=data)
    options = TransferOptions(HYBRID, steps=2, grad_accum=1)
    maps = transfer(captured.path, tmp_path / "maps", options=options)
    rates = {"steps": 2, "grad_accum": 1, "lr": 1e-2, "train_maps": True}
    adapted = lora(maps.path, tmp_path / "lora", options=LoraOptions(**rates))
    assert sorted(adapted.config["targets"]) == sorted(targets or ("q_proj", "k_proj", "v_proj", "o_proj"))
    folder = merge(adapted.path, tmp_path / "student").path
    check_student(folder, load_any(str(adapted.path), LoadOptions()).model)


@torch.no_grad()
def check_student(folder: Path, unmerged: PreTrainedModel) -> None:
    """That a merged folder is the student in memory, in whatever way it is asked."""
    student = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = torch.randint(3, 260, (2, 23), generator=torch.Generator().manual_seed(2))
    expected = student(tokens, labels=tokens, use_cache=False)
    torch.testing.assert_close(expected.logits, unmerged(tokens, use_cache=False).logits, **NEAR)
    padded, mask = check_cache(student, tokens, expected.logits)
    torch.testing.assert_close(student(padded, attention_mask=mask).logits[:, 5:], expected.logits, **NEAR)
    right = student(torch.cat([tokens, padded[:, :5]], 1), attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(right[:, :23], expected.logits, **NEAR)
    for length in (1, 7, 16):
        torch.testing.assert_close(student(tokens[:, :length]).logits, expected.logits[:, :length], **NEAR)
    changed = torch.cat([tokens[:, :16], tokens[:, 16:].flip(1)], 1)
    torch.testing.assert_close(student(changed).logits[:, :16], expected.logits[:, :16], **NEAR)
    student.save_pretrained(folder.with_name("again"))
    again = AutoModelForCausalLM.from_pretrained(folder.with_name("again"), trust_remote_code=True).eval()
    for model in (again, load_merged(folder, LoadOptions(device="cpu"))):  # that with the code that is installed
        found = model(tokens, labels=tokens, use_cache=False)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(found.loss, expected.loss)


def check_cache(student: PreTrainedModel, tokens: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Any chunking, and beams over a padded batch; -> that batch, and its mask."""
    cache = student.new_cache()
    parts = [student(part, past_key_values=cache).logits for part in tokens.split([9, 1, 13], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, **NEAR)
    padded = torch.cat([torch.full((2, 5), 2), tokens], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    common = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert torch.equal(student.generate(padded, **common), student.generate(padded, use_cache=False, **common))
    return padded, mask


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(name: str) -> None:
    model_type, changes, reason = REFUSED[name]
    model = tiny_model(model_type, changes)
    with pytest.raises(BadInput, match=f"(?s){type(model).__name__}.*{reason}"):
        check_servable(model)


@pytest.fixture(scope="module")
def families() -> Iterator[ModuleType]:
    """benchmarks/families/run.py, which is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RUN.parent))
        spec = importlib.util.spec_from_file_location("families_run", RUN)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("model_type", KINDS)
def test_a_family_is_as_the_table_says(model_type: str, families: ModuleType) -> None:
    found, told = families.run_one(model_type), families.read_results()[model_type]
    assert (found["outcome"], found["reason"]) == (told["outcome"], told["reason"])
    assert found["outcome"] in ("served", "refused")


def test_the_page_is_written_of_the_results(families: ModuleType) -> None:
    assert families.TABLE.read_text() == families.page(), "python benchmarks/families/run.py --only none --write"
