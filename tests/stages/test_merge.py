"""merge: the folder it writes is the unmerged student, loads without lolcats, and refuses what it cannot fold."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, ArtifactWriter, ConfigMismatch, Damaged, WrongKind
from lolcats_kernels import HybridConfig, HybridMaps
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from lolcats_cli.errors import BadInput, IdentityMismatch, UsageError
from lolcats_cli.evaluation.golden_logits import check_saved_again
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.loading.merged import load_merged
from lolcats_cli.stages.merge import merge, plan_shards
from lolcats_cli.student.build import hybrid_modules, linearize, set_terms
from lolcats_cli.teacher.identity import identify
from lolcats_cli.teacher.load import LoadOptions

CONFIG = HybridConfig(window=6, feature_dim=8)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LAYER = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "scaling": 0.25}
IDS = torch.randint(3, 128, (2, 23), generator=torch.Generator().manual_seed(2))


def save_teacher(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, **changes})
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>").save_pretrained(folder)
    return folder


def layer_maps() -> dict[int, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    states = {layer: HybridMaps(CONFIG, 4, 16).state_dict() for layer in range(2)}
    return {
        layer: {name: t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in state.items()}
        for layer, state in states.items()
    }


def load_teacher(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def save_artifact(folder: Path, teacher: Path, adapter: Path | None = None, layers: int = 2) -> Artifact:
    """A transfer artifact, or a LoRA artifact with a copy of `adapter`."""
    with ArtifactWriter.create(
        folder,
        "lora" if adapter else "transfer",
        config={"hybrid": CONFIG.to_dict()},
        teacher={"path": str(teacher), "architecture": "LlamaForCausalLM", "layers": [LAYER] * 2, **identify(teacher)},
        data={"tokens": 0},
        tool="test",
    ) as writer:
        for layer in range(layers):
            writer.save(f"maps/layer-{layer:03d}.safetensors", layer_maps()[layer])
        for file in sorted(adapter.iterdir()) if adapter else ():
            writer.copy(f"adapter/{file.name}", file)
        return writer.finish({"loss": 1.25, "layers": {"0": {"relative_mse": 0.5}, "1": {"gamma": {"mean": 0.1}}}})


def save_adapter(folder: Path, teacher: Path, **options: object) -> Path:
    """A LoRA adapter with random B, so that it changes the model."""
    torch.manual_seed(3)
    peft = get_peft_model(
        load_teacher(teacher), LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": PROJECTIONS, **options})
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        if "magnitude" in name:
            parameter.data *= torch.rand(parameter.shape) + 0.5
        if "modules_to_save" in name:
            parameter.data += 0.1
    peft.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def unmerged(teacher: Path, adapter: Path | None) -> torch.nn.Module:
    student = linearize(load_teacher(teacher), CONFIG, layer_maps())
    return PeftModel.from_pretrained(student, adapter).eval() if adapter else student


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, teacher) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"), teacher)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, teacher, adapter) -> Path:
    return save_artifact(tmp_path_factory.mktemp("artifacts") / "lora", teacher, adapter).path


@pytest.fixture(scope="module")
def merged(tmp_path_factory, lora) -> Path:
    return merge(lora, tmp_path_factory.mktemp("merged") / "student").path


def test_merged_logits_equal_the_unmerged_students(teacher, adapter, merged):
    expected = unmerged(teacher, adapter)
    student = load(merged)
    torch.testing.assert_close(student(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)
    assert (expected(IDS).logits - unmerged(teacher, None)(IDS).logits).abs().max() > 0.1  # the adapter matters
    generated = student.generate(IDS, max_new_tokens=10, do_sample=False)
    assert torch.equal(generated, student.generate(IDS, max_new_tokens=10, do_sample=False, use_cache=False))
    for terms in ("window", "linear"):
        set_terms(student, terms)
        set_terms(expected, terms)
        torch.testing.assert_close(student(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_transfer_artifact_merges_without_an_adapter(tmp_path, teacher):
    transfer = save_artifact(tmp_path / "transfer", teacher)
    student = merge(transfer.path, tmp_path / "student")
    assert student.summary["folded"] == 0 and student.parents[0]["id"] == transfer.id
    weights = load_file(student.path / "model.safetensors")
    original = load_file(teacher / "model.safetensors")
    assert all(torch.equal(weights[name], original[name]) for name in original)
    torch.testing.assert_close(load(student.path)(IDS).logits, unmerged(teacher, None)(IDS).logits, atol=0, rtol=0)


def test_it_is_an_artifact_with_everything_a_model_folder_has(merged, lora):
    artifact = Artifact.open(merged, "student")
    artifact.verify()
    assert artifact.parents[0]["id"] == Artifact.open(lora).id and artifact.summary["folded"] == 8
    code = {"modeling_lolcats.py", "configuration_lolcats.py", "teacher.py", "hf_student.py", "hf_cache.py", "maps.py"}
    code |= {f"triton_{part}.py" for part in ("attention", "parts", "forward", "backward", "decoding")}
    rest = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    rest |= {"golden.safetensors", "model.safetensors.index.json"}
    assert code | rest <= set(artifact.files)
    # For servers: which files are the weights, and which layers have a state.
    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(load_file(merged / "model.safetensors"), "model.safetensors")
    assert json.loads((merged / "config.json").read_text())["layers_block_type"] == ["linear_attention"] * 2
    card = (merged / "README.md").read_text()
    assert Artifact.open(lora).id in card and "2410.10254" in card and "trust_remote_code=True" in card
    assert "| lora | validation loss, nats per token | 1.250 |" in card
    assert "| layer | error |" in card and "| 0 | 50.00% |" in card and "| 1 |  |" in card
    assert str(merged.parent) not in card
    assert AutoTokenizer.from_pretrained(merged, trust_remote_code=True)("w5 w9")["input_ids"] == [5, 9]


SCRIPT = """
import sys, importlib.util
absent = ("lolcats_cli", "lolcats_kernels", "lolcats_formats", "triton")
assert not [n for n in absent if importlib.util.find_spec(n)]
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor(IDS)
torch.save((model(ids).logits, model.generate(ids, max_new_tokens=8, do_sample=False)), sys.argv[3])
model.save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
assert not [n for n in sys.modules if n.startswith("lolcats")]
"""


def test_it_loads_where_lolcats_is_not_installed(tmp_path, merged, teacher, adapter):
    """In a process that can import torch and transformers but neither ours nor Triton; then saved, moved, loaded."""
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not re.search("lolcats|^triton", entry.name.lower()) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    run = f"import sys; sys.path.insert(0, {str(site)!r}); exec(sys.argv.pop(1))"
    done = subprocess.run(
        [
            sys.executable, "-I", "-S", "-c", run, SCRIPT.replace("IDS", str(IDS.tolist())),
            str(merged), str(tmp_path / "again"), str(tmp_path / "result.pt"),
        ],
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logits, out = torch.load(tmp_path / "result.pt", weights_only=True)
    expected = unmerged(teacher, adapter)
    torch.testing.assert_close(logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(out, expected.generate(IDS, max_new_tokens=8, do_sample=False))
    for folder, again in (("again", "moved"), ("moved", "thrice")):
        shutil.copytree(tmp_path / folder, tmp_path / "elsewhere", dirs_exist_ok=True)
        student = load(tmp_path / "elsewhere")
        assert torch.equal(student(IDS).logits, load(merged)(IDS).logits)
        student.save_pretrained(tmp_path / again)
        for name in (
            "modeling_lolcats.py",
            "configuration_lolcats.py",
            "teacher.py",
            "hf_student.py",
            "torch_attention.py",
        ):
            assert (tmp_path / again / name).read_bytes() == (merged / name).read_bytes()


def test_its_own_kernels(merged):
    """The folder's Triton files register under names of their own, beside those of the installed package."""
    pytest.importorskip("triton")
    student = load(merged)
    hybrid = importlib.import_module(type(student).__module__.rpartition(".")[0] + ".hybrid")
    maps = student.model.layers[0].self_attn.hybrid
    q, k = (torch.randn(1, heads, 5, maps.head_dim) for heads in (maps.num_heads, 1))
    with torch.no_grad():
        outs = [hybrid.hybrid_attention(q, k, k, maps, scaling=0.4, backend=x) for x in ("reference", "triton")]
    torch.testing.assert_close(*outs)


def test_without_trust_it_fails_rather_than_load_as_its_teacher(merged):
    assert json.loads((merged / "config.json").read_text())["model_type"] == "lolcats_llama"
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(merged, trust_remote_code=False)


def test_missing_maps_are_not_passed_over(tmp_path, merged):
    shutil.copytree(merged, tmp_path / "student")
    weights = load_file(merged / "model.safetensors")
    del weights["model.layers.1.self_attn.hybrid.q_weight"]
    save_file(weights, tmp_path / "student" / "model.safetensors", {"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match="hybrid"):
        load(tmp_path / "student")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folds_with_one_rounding_and_keeps_maps_in_fp32(tmp_path, dtype):
    teacher = save_teacher(tmp_path / "teacher", dtype)
    adapter = save_adapter(tmp_path / "adapter", teacher)
    folder = merge(save_artifact(tmp_path / "lora", teacher, adapter).path, tmp_path / "student").path
    original, changed = load_file(teacher / "model.safetensors"), load_file(folder / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    for name, weight in original.items():
        parts = [lora.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB"]
        delta = 4.0 * (parts[1].double() @ parts[0].double()) if parts[0] is not None else 0.0
        exact = weight.double() + delta
        rounding = (changed[name].double() - exact).abs() / exact.abs().clamp(min=1e-3)
        assert changed[name].dtype == dtype and rounding.max() <= torch.finfo(dtype).eps / 2 * 1.01
        if parts[0] is None:
            assert torch.equal(changed[name], weight)
    for student in (load(folder), load(folder, dtype="auto"), load(folder, dtype=dtype)):
        assert student.dtype == dtype and student.model.layers[0].self_attn.hybrid.q_weight.dtype == torch.float32
        assert torch.equal(student.model.layers[1].self_attn.hybrid.k_weight, layer_maps()[1]["k_weight"])
    expected, logits = unmerged(teacher, adapter)(IDS).logits.float(), load(folder)(IDS).logits.float()
    assert torch.nn.functional.mse_loss(logits, expected) < 1e-3 * expected.var()
    assert load(folder, dtype=torch.float32)(IDS).logits.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tmp_path, tied):
    teacher = save_teacher(tmp_path / "teacher", tie_word_embeddings=tied)
    folder = merge(save_artifact(tmp_path / "transfer", teacher).path, tmp_path / "student").path
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) == (not tied)
    student = load(folder)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    torch.testing.assert_close(student(IDS).logits, unmerged(teacher, None)(IDS).logits, atol=0, rtol=0)


def test_sharded_teacher_and_output(tmp_path, teacher, adapter):
    whole = tmp_path / "whole"
    load_teacher(teacher).save_pretrained(whole, max_shard_size="60KB")
    assert (whole / "model.safetensors.index.json").is_file()
    artifact = save_artifact(tmp_path / "lora", whole, adapter)
    folder = merge(artifact.path, tmp_path / "student", max_shard_bytes=50_000).path
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3 and not (folder / "model.safetensors").exists()
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(folder / file)
        assert sum(t.nbytes for t in tensors.values()) <= 50_000 or len(tensors) == 1
        assert {name for name, where in index["weight_map"].items() if where == file} == set(tensors)
    torch.testing.assert_close(load(folder)(IDS).logits, unmerged(whole, adapter)(IDS).logits, atol=1e-5, rtol=1e-5)


def test_plan_shards_keeps_order_and_never_cuts_a_tensor():
    sizes = {"a": 5, "b": 5, "c": 30, "d": 1, "e": 9, "f": 1}
    assert list(plan_shards(sizes, 10).values()) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert plan_shards(sizes, 51) == {"model.safetensors": list(sizes)}


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}, "alpha_pattern": {"o_proj": 3}},
        {"target_modules": ["v_proj", "down_proj"], "lora_dropout": 0.5},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True, "rank_pattern": {"k_proj": 2}, "target_modules": ["k_proj", "up_proj"]},
        {"modules_to_save": ["down_proj"]},
    ],
    ids=["rslora", "patterns", "other targets", "dora", "dora, rslora, patterns", "lora and whole weights"],
)
def test_folds_as_peft_does_to_the_bit(tmp_path, teacher, options):
    adapter = save_adapter(tmp_path / "adapter", teacher, **options)
    folder = merge(save_artifact(tmp_path / "lora", teacher, adapter).path, tmp_path / "student").path
    expected = PeftModel.from_pretrained(load_teacher(teacher), adapter).merge_and_unload().state_dict()
    found = load_file(folder / "model.safetensors")
    assert {name for name in found if ".hybrid." not in name} == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
    ],
)
def test_adapters_that_are_not_understood_are_refused_by_name(tmp_path, teacher, options, message):
    adapter = save_adapter(tmp_path / "adapter", teacher, **options)
    with pytest.raises(BadInput, match=message):
        merge(save_artifact(tmp_path / "lora", teacher, adapter).path, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_damaged_adapters_are_refused(tmp_path, teacher, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changes = [
        ({**tensors, name: tensors[name][:2]}, "rank 2"),
        ({k: v for k, v in tensors.items() if k != name}, "incomplete"),
        ({k.replace("layers.1.", "layers.7."): v for k, v in tensors.items()}, "layers.7"),
        ({**tensors, name: tensors[name][:, :32].contiguous()}, "another model"),
        ({**tensors, "base_model.model.x.lora_C.weight": tensors[name].clone()}, "lora_C"),
        ({**tensors, name.replace("A.weight", "magnitude_vector"): torch.ones(64)}, "magnitude_vector, which"),
    ]
    for i, (changed, message) in enumerate(changes):
        folder = tmp_path / f"adapter{i}"
        shutil.copytree(adapter, folder)
        save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(BadInput, match=message):
            merge(save_artifact(tmp_path / f"lora{i}", teacher, folder).path, tmp_path / f"student{i}")
        assert not (tmp_path / f"student{i}" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "maps/layer-001.safetensors"])
def test_a_flipped_bit_in_the_source_is_found(tmp_path, lora, name):
    shutil.copytree(lora, tmp_path / "lora")
    content = bytearray((tmp_path / "lora" / name).read_bytes())
    content[-1] ^= 1
    (tmp_path / "lora" / name).write_bytes(content)
    with pytest.raises(Damaged, match=name.split("/")[1]):
        merge(tmp_path / "lora", tmp_path / "student")
    assert not (tmp_path / "student" / "manifest.json").exists()


def test_another_teacher_is_refused_and_a_moved_one_is_found(tmp_path, teacher, lora, merged):
    other = save_teacher(tmp_path / "other", rms_norm_eps=1e-5)
    with pytest.raises(IdentityMismatch, match="differs in its configuration"):
        merge(lora, tmp_path / "a", teacher=other)
    with pytest.raises(BadInput, match="not a folder"):
        merge(lora, tmp_path / "b", teacher=tmp_path / "nowhere")
    shutil.copytree(teacher, tmp_path / "moved")
    assert merge(lora, tmp_path / "c", teacher=tmp_path / "moved").id == Artifact.open(merged).id


def test_the_installed_code_loads_it_without_the_folders_own(merged):
    before = set(sys.modules)
    ours = load_merged(merged, LoadOptions(device="cpu"))
    assert not [name for name in set(sys.modules) - before if name.startswith("transformers_modules")]
    assert torch.equal(ours(IDS).logits, load(merged)(IDS).logits)


def test_bin_weights_and_quantised_ones_are_refused(tmp_path):
    teacher = save_teacher(tmp_path / "teacher")
    artifact = save_artifact(tmp_path / "transfer", teacher)
    weights = teacher / "model.safetensors"
    torch.save(load_file(weights), teacher / "pytorch_model.bin")
    weights.rename(tmp_path / "kept")
    with pytest.raises(BadInput, match="safetensors only"):
        merge(artifact.path, tmp_path / "student")
    (tmp_path / "kept").rename(weights)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "quantization_config": {"a": "b"}}))
    with pytest.raises(BadInput, match="quantised"):
        merge(save_artifact(tmp_path / "quantised", teacher).path, tmp_path / "student")


def test_maps_that_do_not_fit_are_refused(tmp_path, teacher):
    with pytest.raises(IdentityMismatch, match="layer 1"):
        merge(save_artifact(tmp_path / "part", teacher, layers=1).path, tmp_path / "student")
    with pytest.raises(WrongKind):
        merge(merge(save_artifact(tmp_path / "whole", teacher).path, tmp_path / "student").path, tmp_path / "again")
    with pytest.raises(UsageError, match="max-shard-size"):
        merge(tmp_path / "whole", tmp_path / "never", max_shard_bytes=0)


def test_again_it_resumes_or_is_done(tmp_path, lora, merged, monkeypatch):
    output = tmp_path / "student"
    saved = ArtifactWriter.save
    calls: list[str] = []

    def stop_at_the_third(self: ArtifactWriter, name: str, *args: object) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(name)
        saved(self, name, *args)

    monkeypatch.setattr(ArtifactWriter, "save", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        merge(lora, output, max_shard_bytes=50_000)
    assert not (output / "manifest.json").exists()
    first, calls[:] = list(calls), []
    monkeypatch.setattr(
        ArtifactWriter, "save", lambda self, name, *args: (calls.append(name), saved(self, name, *args))
    )
    done = merge(lora, output, max_shard_bytes=50_000)
    assert not set(first) & set(calls)
    assert merge(lora, output, max_shard_bytes=50_000).id == done.id
    assert merge(lora, tmp_path / "fresh", max_shard_bytes=50_000).id == done.id
    with pytest.raises(ConfigMismatch):
        merge(lora, output)


def test_the_code_is_the_installed_folder_as_it_is(merged):
    """But for what it says of the teacher."""
    package = Path(importlib.import_module("lolcats_kernels").__file__).parent
    brought = {file.name: file.read_text() for file in merged.glob("*.py")}
    installed = {file.name: file.read_text() for file in package.glob("*.py") if file.name != "__init__.py"}
    assert brought.keys() == installed.keys()
    assert [name for name in brought if brought[name] != installed[name]] == ["teacher.py"]
    assert 'MODEL_CLASS = "LlamaForCausalLM"' in brought["teacher.py"]


def test_a_student_that_is_saved_again_stays_one(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    student = AutoModelForCausalLM.from_pretrained(pipeline.student, trust_remote_code=True).eval()
    tokens = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for parameter in student.parameters():  # as fine-tuning does
            parameter.mul_(1.01)
        student.save_pretrained(tmp_path / "again")
        AutoTokenizer.from_pretrained(pipeline.student, trust_remote_code=True).save_pretrained(tmp_path / "again")
        again = load_any(str(tmp_path / "again"), LoadOptions(device="cpu"))
        assert again.kind == "student"
        torch.testing.assert_close(again.model(tokens).logits, student(tokens).logits, atol=1e-5, rtol=1e-5)
        assert len(hybrid_modules(again.model)) == 2
    assert check_saved_again(tmp_path / "again")["kind"] == "student"
    weights = load_file(tmp_path / "again/model.safetensors")
    name = next(name for name in weights if name.endswith("hybrid.q_weight"))
    save_file({**weights, name: torch.full_like(weights[name], math.nan)}, tmp_path / "again/model.safetensors")
    with pytest.raises(BadInput, match="NaN"):
        check_saved_again(tmp_path / "again")


def test_automodel_loads_a_student_without_its_head(pipeline: SimpleNamespace) -> None:
    student = AutoModelForCausalLM.from_pretrained(pipeline.student, trust_remote_code=True).eval()
    base = AutoModel.from_pretrained(pipeline.student, trust_remote_code=True).eval()
    tokens = torch.randint(3, 60, (2, 23), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = base(tokens).last_hidden_state
        torch.testing.assert_close(hidden, student.model(tokens).last_hidden_state, rtol=0, atol=0)
        first = base(tokens[:, :9], use_cache=True)
        rest = base(tokens[:, 9:], past_key_values=first.past_key_values).last_hidden_state
        torch.testing.assert_close(rest, hidden[:, 9:], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="output_attentions=True cannot be served"):
        base(tokens, output_attentions=True)
