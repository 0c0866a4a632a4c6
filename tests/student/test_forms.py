"""generate() in its other forms, training, and what is done with a merged folder: adapters, devices, int8, the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from lolcats_kernels import HybridConfig
from lolcats_kernels.hf_cache import LolcatsCache
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    TorchAoConfig,
)


def load(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}], ids=["sampling", "beams that sample"])
def test_sampling_with_several_sequences_in_a_dictionary(student, tokens, options) -> None:
    """Seeded, with left padding: sequences and scores are those of recomputation."""
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    common = {"attention_mask": mask, "do_sample": True, "top_k": 20, "max_new_tokens": 10, "num_return_sequences": 3}
    common |= {"return_dict_in_generate": True, "output_scores": True, **options}
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(student.generate(tokens, use_cache=use_cache, **common))
    assert torch.equal(found[0].sequences, found[1].sequences) and found[0].sequences.shape == (6, 33)
    torch.testing.assert_close(torch.stack(found[0].scores), torch.stack(found[1].scores), atol=1e-4, rtol=1e-4)
    assert isinstance(found[0].past_key_values, LolcatsCache) and found[0].past_key_values.get_seq_length() == 32


def test_streaming(pipeline: SimpleNamespace) -> None:
    student = load(pipeline.student)
    tokenizer = AutoTokenizer.from_pretrained(pipeline.student, trust_remote_code=True)
    inputs = tokenizer("the ship at sea", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    whole = student.generate(**inputs, max_new_tokens=12, do_sample=False, streamer=streamer)
    pieces = list(streamer)
    assert len(pieces) > 1
    assert "".join(pieces) == tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :])


def test_assisted_decoding_is_refused(make_student, make_teacher, tokens) -> None:
    with pytest.raises(ValueError, match="roll the cache back"):
        make_student().generate(tokens[:1], assistant_model=make_teacher(), max_new_tokens=4)
    with pytest.raises(ValueError, match="roll the cache back"):
        make_teacher().generate(tokens[:1], assistant_model=make_student(), max_new_tokens=4)


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"cache_implementation": "dynamic"}], ids=str)
def test_caches_of_other_names_are_the_students_own(student, tokens, options) -> None:
    expected = student.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(student.generate(tokens, max_new_tokens=8, do_sample=False, **options), expected)


@pytest.mark.slow
@torch.no_grad()
def test_memory_is_constant_over_a_hundred_thousand_tokens(make_student) -> None:
    """In parts; the cache has the same bytes after 1,000 tokens as after 100,000, and generation goes on from it."""
    config = HybridConfig(window=16, feature_dim=8, linear_factor="exp")
    student = make_student(config, num_hidden_layers=2, max_position_embeddings=2**17)
    tokens = torch.randint(3, 128, (1, 100_000), generator=torch.Generator().manual_seed(5))
    cache, sizes = student.new_cache(), set()
    for part in tokens.split(5_000, 1):
        logits = student(part, past_key_values=cache, logits_to_keep=1).logits
        sizes.add(cache.nbytes)
    assert len(sizes) == 1 and cache.get_seq_length() == 100_000
    # Two layers; keys and values of the window, and sums over 16 features of 4 heads of 16.
    assert sizes.pop() < 2 * 4 * (2 * 2 * 16 * 16 + 4 * 16 * 18 + 64)
    both = torch.cat([tokens, logits.argmax(-1)], 1)
    further = student.generate(both, past_key_values=cache, max_new_tokens=4, do_sample=False)
    whole = student.generate(both, prefill_chunk_size=20_000, max_new_tokens=4, do_sample=False)
    assert torch.equal(further, whole)


def test_training_mode_is_as_evaluation_and_learns_with_checkpointing(pipeline: SimpleNamespace) -> None:
    """A whole fine-tuning: every weight gets a gradient, the maps' too."""
    student = load(pipeline.student)
    rows = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = student(rows, labels=rows).loss
    student.train()
    student.gradient_checkpointing_enable()
    assert torch.allclose(student(rows, labels=rows).loss, expected, atol=1e-5)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for _ in range(5):
        loss = student(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < expected
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_an_adapter_on_top_is_trained_saved_loaded_and_merged(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    rows = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    adapted = get_peft_model(load(pipeline.student), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    before = adapted(rows, labels=rows).loss
    for _ in range(4):
        loss = adapted(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < before
    adapted.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(pipeline.student), tmp_path / "adapter").eval()
    assert torch.equal(again(rows).logits, adapted(rows).logits)
    generated = again.generate(rows, max_new_tokens=6, do_sample=False)
    assert torch.equal(generated, again.generate(rows, max_new_tokens=6, do_sample=False, use_cache=False))
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(rows).logits, adapted(rows).logits, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "student")
    assert torch.equal(load(tmp_path / "student")(rows).logits, merged(rows).logits)


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "disk"}], ids=str)
def test_device_maps(pipeline: SimpleNamespace, tmp_path: Path, place: object) -> None:
    rows = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    placed = load(pipeline.student, device_map=place, offload_folder=tmp_path)
    expected = load(pipeline.student).generate(rows, max_new_tokens=4, do_sample=False)
    assert torch.equal(placed.generate(rows, max_new_tokens=4, do_sample=False), expected)


def test_saved_twice_it_is_the_same_to_the_byte(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    source = pipeline.student
    for name in ("once", "twice"):
        load(source).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(source, trust_remote_code=True).save_pretrained(tmp_path / name)
        source = tmp_path / name
    once, twice = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir() if p.is_file()} for n in ("once", "twice"))
    assert once == twice
    assert set(once) >= {
        "config.json",
        "model.safetensors",
        "modeling_lolcats.py",
        "torch_attention.py",
        "tokenizer.json",
    }
    code = {name: text for name, text in once.items() if name.endswith(".py")}
    assert code == {name: (pipeline.student / name).read_bytes() for name in code}


def test_pushed_to_the_hub_it_loads_from_there(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be uploaded, laid out as on the hub."""

    def commit(self: HfApi, repo_id: str, operations: list, **options: object) -> None:
        for operation in operations:
            target = tmp_path / "hub" / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as stream:
                target.write_bytes(stream.read())

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(
        "transformers.utils.hub.create_and_tag_model_card", lambda *args, **options: ModelCard("---\n---\n")
    )
    student = load(pipeline.student)
    student.push_to_hub("someone/student")
    AutoTokenizer.from_pretrained(pipeline.student, trust_remote_code=True).push_to_hub("someone/student")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["auto_map"] == json.loads((pipeline.student / "config.json").read_text())["auto_map"]
    shutil.move(tmp_path / "hub", tmp_path / "elsewhere")
    rows = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    assert torch.equal(load(tmp_path / "elsewhere")(rows).logits, student(rows).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "elsewhere", trust_remote_code=True)("a ship")["input_ids"]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
def test_loading_in_8_bits_costs_what_it_costs_the_teacher(pipeline: SimpleNamespace, library: str) -> None:
    """The maps are left alone."""
    pytest.importorskip(library)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantised: object = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantised = BitsAndBytesConfig(load_in_8bit=True)
    rows = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    errors = {}
    for folder in (pipeline.teacher, pipeline.student):
        whole, small = load(folder), load(folder, quantization_config=quantised, device_map="cpu")
        projections = [model.model.layers[0].self_attn.q_proj for model in (whole, small)]
        assert type(projections[0].weight) is not type(projections[1].weight)
        errors[folder.name] = relative_error(small(rows).logits.float(), whole(rows).logits)
    assert 1e-4 < errors["student"] < 1.5 * errors["teacher"]
    for name, parameter in whole.model.layers[0].self_attn.hybrid.named_parameters():
        assert torch.equal(small.model.layers[0].self_attn.hybrid.get_parameter(name), parameter)
    common = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(small.generate(rows, **common), small.generate(rows, use_cache=False, **common))
