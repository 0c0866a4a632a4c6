"""What merge needs is asked for by capture, before any work: what can be served is served, the rest refused at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_kernels import HybridConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, Phi3Config, Phi3ForCausalLM

from lolcats_cli.errors import BadInput
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.lora import lora
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.merge import merge
from lolcats_cli.stages.mergeable import check_mergeable, teacher_files
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

CPU = LoadOptions(device="cpu")


def change(folder: Path, file: str = "config.json", **fields: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def student_of(teacher: Path, text: Path, folder: Path, load: LoadOptions = CPU) -> Path:
    """The four stages, a step each; that the merged folder is the student in memory is checked."""
    hybrid = HybridConfig(window=6, feature_dim=8)
    captured = capture(str(teacher), str(text), folder / "c", options=DataOptions(seq_len=20, samples=4), load=load)
    maps = transfer(captured.path, folder / "m", options=TransferOptions(hybrid, steps=1, grad_accum=1))
    adapted = lora(maps.path, folder / "l", options=LoraOptions(steps=1, grad_accum=1, lr=1e-2), load=CPU)
    merged = merge(adapted.path, folder / "s").path
    tokens = torch.randint(3, 250, (1, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True).eval()(tokens).logits
        torch.testing.assert_close(found, load_any(str(adapted.path), CPU).model(tokens).logits, atol=1e-4, rtol=1e-4)
    return merged


@pytest.fixture
def teacher(pipeline: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline.teacher, tmp_path / "teacher"))


def other_teacher(model: torch.nn.Module, pipeline: SimpleNamespace, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(pipeline.teacher).save_pretrained(folder)
    return folder


def test_own_code_beside_a_native_class_is_not_used(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 260, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    config = Phi3Config(**sizes, **tokens, num_key_value_heads=2, max_position_embeddings=128)
    folder = other_teacher(Phi3ForCausalLM(config), pipeline, tmp_path / "teacher")
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    change(folder, auto_map=code)
    change(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_phi3.Tokenizer"]})
    (folder / "modeling_phi3.py").write_text("raise AssertionError('this code must not run')\n")
    merged = student_of(folder, pipeline.text, tmp_path, LoadOptions(device="cpu", trust_remote_code=True))
    assert AutoTokenizer.from_pretrained(merged, trust_remote_code=True)("a ship")["input_ids"]
    assert "auto_map" not in json.loads((merged / "tokenizer_config.json").read_text())


def test_weights_without_the_name_of_the_base_model(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=64, vocab_size=260, bos_token_id=0, eos_token_id=1)
    folder = other_teacher(GPT2LMHeadModel(config), pipeline, tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    assert teacher_files(folder).places["transformer.h.1.attn.c_attn.weight"] == "h.1.attn.c_attn.weight"
    student_of(folder, pipeline.text, tmp_path)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "own code": (
        lambda folder: change(folder, model_type="mine", auto_map={"AutoModelForCausalLM": "mine.Mine"}),
        "code of its own .*auto_map.* no class for its model_type 'mine'",
    ),
    "own tokenizer": (
        lambda folder: change(
            folder,
            "tokenizer_config.json",
            tokenizer_class="Mine",
            auto_map={"AutoTokenizer": ["mine.Mine", None]},
        ),
        "needs code of its own",
    ),
    "quantised": (lambda folder: change(folder, quantization_config={"quant_method": "fp8"}), "are quantised. Give"),
    "T5": (lambda folder: change(folder, model_type="t5", is_encoder_decoder=True), "is an encoder with a decoder"),
    "BERT": (lambda folder: change(folder, model_type="bert"), "is an encoder .bert.: its tokens see all others"),
    "ViT": (lambda folder: change(folder, model_type="vit"), "'vit', which is not a causal language model"),
    "unheard of": (lambda folder: change(folder, model_type="mine"), "'mine', which is not known to transformers"),
    "no heads": (lambda folder: change(folder, num_attention_heads=0), "num_attention_heads: 0"),
    "not the shapes": (
        lambda folder: change(folder, num_key_value_heads=1),
        "be folded into model.layers.0.self_attn.k_proj",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused_by_capture(
    name: str, teacher: Path, pipeline: SimpleNamespace, tmp_path: Path
) -> None:
    spoil, message = REFUSED[name]
    spoil(teacher)
    load = LoadOptions(device="cpu", trust_remote_code=name == "own code")
    with pytest.raises(BadInput, match=f"(?s){message}"):
        capture(str(teacher), str(pipeline.text), tmp_path / "c", options=DataOptions(seq_len=20), load=load)
    assert not (tmp_path / "c").exists()


def test_projections_in_a_dtype_that_cannot_be_folded(teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=r"layers.1.self_attn.q_proj.weight in .* is stored as F8_E4M3"):
        check_mergeable(teacher)


def test_a_first_layer_with_nan_is_refused(teacher: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][:] = torch.nan
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match="NaN or infinite"):
        check_mergeable(teacher)


def test_one_block_is_tried_and_no_more(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second layer of NaN is not looked at: capture's probe finds it."""
    tensors = load_file(teacher / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][:] = torch.nan
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    check_mergeable(teacher)
