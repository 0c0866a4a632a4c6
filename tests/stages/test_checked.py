"""Artifacts are checked before they are used: bytes, what lies beside them, forged adapters, numbers that are none."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, Damaged, FormatError, artifact_id
from safetensors.torch import load_file, save_file

from lolcats_cli.errors import BadInput
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.stages.merge import merge
from lolcats_cli.teacher.load import LoadOptions

CPU = LoadOptions(device="cpu")
IDS = torch.randint(3, 260, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def student(pipeline: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline.student, tmp_path / "student"))


@pytest.fixture
def lora(pipeline: SimpleNamespace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pipeline.lora, tmp_path / "lora"))


def forge(folder: Path) -> None:
    """Put sizes, hashes and the id right again, of the files that are there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    manifest["files"] = {
        name: {"size": len(data := (folder / name).read_bytes()), "sha256": hashlib.sha256(data).hexdigest()}
        for name in names
        if name not in ("manifest.json", "README.md")
    }
    manifest["id"] = artifact_id(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def logits(path: Path, load: LoadOptions = CPU) -> torch.Tensor:
    return load_any(str(path), load).model(IDS).logits


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_flipped_bit_of_a_student_is_found_before_it_is_used(student: Path, name: str) -> None:
    data = bytearray((student / name).read_bytes())
    data[len(data) // 2] ^= 1
    (student / name).write_bytes(data)
    with pytest.raises(Damaged, match=name):
        load_any(str(student), CPU)


def test_what_lies_beside_a_students_files_is_not_used(
    student: Path, pipeline: SimpleNamespace, tmp_path: Path
) -> None:
    """An adapter, code, and a template that somebody put there."""
    expected = logits(student)
    for file in (pipeline.lora / "adapter").iterdir():
        shutil.copy(file, student)
    edit(student / "adapter_config.json", base_model_name_or_path=str(pipeline.teacher))
    (student / "custom_generate").mkdir()
    (student / "custom_generate" / "generate.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\ndef generate(*args, **kwargs): open({str(tmp_path / 'ran')!r}, 'w')\n"
    )
    (student / "chat_template.jinja").write_text("from outside")
    loaded = load_any(str(student), LoadOptions(device="cpu", trust_remote_code=True))
    assert torch.equal(loaded.model(IDS).logits, expected)
    assert loaded.tokenizer.chat_template is None
    loaded.model.generate(IDS, max_new_tokens=1)
    assert not (tmp_path / "ran").exists()


def test_listed_code_of_a_student_is_not_run(student: Path, tmp_path: Path) -> None:
    (student / "custom_generate").mkdir()
    (student / "custom_generate" / "generate.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (student / "modeling_lolcats.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    forge(student)
    Artifact.open(student).verify()
    load_any(str(student), LoadOptions(device="cpu", trust_remote_code=True)).model.generate(IDS, max_new_tokens=1)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_is_a_pickle_is_refused(lora: Path) -> None:
    tensors = load_file(lora / "adapter" / "adapter_model.safetensors")
    torch.save(tensors, lora / "adapter" / "adapter_model.bin")
    (lora / "adapter" / "adapter_model.safetensors").unlink()
    forge(lora)
    for use in (lambda: Artifact.open(lora), lambda: load_any(str(lora), CPU)):
        with pytest.raises(Damaged, match=r"adapter_model\.bin' is neither safetensors nor JSON, or not one of an"):
            use()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_not_there_is_named(lora: Path, name: str) -> None:
    (lora / "adapter" / name).unlink()
    forge(lora)
    with pytest.raises(FormatError, match=f"has no file 'adapter/{name}'"):
        load_any(str(lora), CPU)


def test_an_unlisted_adapter_is_not_used(lora: Path) -> None:
    """Beside the listed one: PEFT would take the safetensors, and then its own search goes on."""
    expected = logits(lora)
    (lora / "adapter" / "adapter_model.bin").write_bytes(b"pickle")
    assert torch.equal(logits(lora), expected)


def test_a_lora_in_memory_is_what_merge_makes_of_it(pipeline: SimpleNamespace) -> None:
    assert torch.equal(logits(pipeline.lora), logits(pipeline.student))


HOSTILE = [
    ({"rank_pattern": {"(([a-z_.0-9])*)*X": 8}}, "only names of modules"),
    ({"alpha_pattern": {"(": 8}}, "only names of modules"),
    ({"rank_pattern": {"^model": 8}}, "only names of modules"),
    ({"rank_pattern": ["q_proj"]}, "only names of modules|not one"),
    ({"rank_pattern": {"q_proj": 0}}, "the rank 0"),
    ({"rank_pattern": {"q_proj": "8"}}, "the rank '8'"),
    ({"alpha_pattern": {"q_proj": None}}, "the alpha None"),
    ({"r": 0}, "the rank 0"),
    ({"r": -8}, "the rank -8"),
    ({"r": 10**9}, "the rank 1000000000"),
    ({"r": 8.0}, r"the rank 8\.0"),
    ({"r": True}, "the rank True"),
    ({"r": 4}, "has rank 8. Its configuration says 4"),
    ({"lora_alpha": "16"}, "the alpha '16'"),
    ({"lora_alpha": 1e300}, r"the alpha 1e\+300"),
    ({"use_rslora": "yes"}, "use_rslora='yes'"),
    ({"use_dora": 1}, "use_dora=1"),
    ({"peft_type": ["LORA"]}, "adapter. merge folds LORA only"),
    ({"bias": "all"}, "trained biases"),
    ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
    ({"modules_to_save": ["lm_head"] * 10_000}, "modules_to_save"),
]


@pytest.mark.parametrize(("changes", "message"), HOSTILE, ids=lambda value: json.dumps(value)[:40])
def test_hostile_configurations_of_adapters(lora: Path, tmp_path: Path, changes: dict, message: str) -> None:
    edit(lora / "adapter" / "adapter_config.json", **changes)
    forge(lora)
    for use in (lambda: load_any(str(lora), CPU), lambda: merge(lora, tmp_path / "out")):
        with pytest.raises(BadInput, match=message) as caught:
            use()
        assert len(str(caught.value)) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "LORA", "r": 8, "lora_alpha": NaN}', "holds NaN"),
        ('{"peft_type": "LORA", "r": 8, "lora_alpha": 1e400}', "the alpha inf"),
        ('{"peft_type": "LORA", "r": 8, "lora_alpha": -Infinity}', "the alpha -inf"),
        ('{"a": ' + "[" * 50_000, "nested too deep"),
        ("[]", "does not hold a JSON object"),
        ("", "not valid JSON"),
    ],
)
def test_adapter_configurations_that_are_no_plain_json(lora: Path, tmp_path: Path, text: str, message: str) -> None:
    (lora / "adapter" / "adapter_config.json").write_text(text)
    forge(lora)
    for use in (lambda: load_any(str(lora), CPU), lambda: merge(lora, tmp_path / "out")):
        with pytest.raises(BadInput, match=message):
            use()


def _change_first(tensors: dict[str, torch.Tensor], value: object) -> dict:
    name = next(name for name in tensors if "lora_B" in name)
    return {**tensors, name: value(tensors[name])}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b * torch.nan, "lora_B.weight holds NaN"),
        (lambda b: b.fill_(torch.inf), "lora_B.weight holds NaN or infinity"),
        (lambda b: b.int(), "is not of floating point"),
        (lambda b: b[0], "has the wrong number of dimensions"),
        (lambda b: torch.zeros(()), "has the wrong number of dimensions"),
    ],
    ids=["nan", "inf", "int", "1-d", "0-d"],
)
def test_adapters_that_are_no_numbers(lora: Path, tmp_path: Path, change, message: str) -> None:
    file = lora / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(_change_first(tensors, lambda b: change(b.clone())), file, {"format": "pt"})
    forge(lora)
    for use in (lambda: load_any(str(lora), CPU), lambda: merge(lora, tmp_path / "out")):
        with pytest.raises(BadInput, match=message):
            use()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_fold_that_overflows(lora: Path, tmp_path: Path) -> None:
    edit(lora / "adapter" / "adapter_config.json", lora_alpha=1e9)
    file = lora / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor * 1e20 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    forge(lora)
    for use in (lambda: load_any(str(lora), CPU), lambda: merge(lora, tmp_path / "out")):
        with pytest.raises(
            BadInput,
            match=r"With the adapter, .*proj\.weight holds NaN, or numbers that are too large for torch\.float32",
        ):
            use()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_student_that_answers_nan_is_not_finished(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The golden logits are what tells: here of a teacher whose last norm overflows."""
    from lolcats_cli.evaluation import golden_logits

    monkeypatch.setattr(golden_logits, "_logits", lambda *args: (torch.full((2, 260), torch.nan), torch.float32))
    with pytest.raises(BadInput, match="is not finished, because its logits for two prompts are NaN or infinite"):
        merge(pipeline.lora, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.undo()
    merge(pipeline.lora, tmp_path / "out").verify()


@pytest.fixture
def spoilt(pipeline: SimpleNamespace, tmp_path: Path) -> Path:
    """A teacher whose last norm is NaN."""
    folder = Path(shutil.copytree(pipeline.teacher, tmp_path / "spoilt"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_is_not_drawn_from_nan(spoilt: Path, temperature: float) -> None:
    from lolcats_cli.evaluation.generate import Sampling, generate

    with pytest.raises(BadInput, match="The model predicts NaN or infinity"):
        generate(load_any(str(spoilt), CPU), "the whale", max_new_tokens=2, sampling=Sampling(temperature))


def test_a_perplexity_that_is_no_number_is_no_result(spoilt: Path, pipeline: SimpleNamespace) -> None:
    from lolcats_cli.evaluation.evaluate import evaluate
    from lolcats_cli.teacher.records import DataOptions

    options = DataOptions(seq_len=32, samples=4)
    with pytest.raises(BadInput, match="The model predicts NaN or infinity"):
        evaluate(load_any(str(spoilt), CPU), str(pipeline.text), options=options, recall_count=0)


def test_settings_of_generation_that_cannot_be_followed(student: Path) -> None:
    from lolcats_cli.evaluation.generate import generate

    edit(student / "generation_config.json", num_beams=4)
    forge(student)
    with pytest.raises(BadInput, match="cannot generate with its generation_config"):
        generate(load_any(str(student), CPU), "the whale", max_new_tokens=2)
