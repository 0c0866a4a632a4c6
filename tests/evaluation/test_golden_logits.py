"""golden.safetensors: every merged student brings its logits along, and verify computes them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import GOLDEN, Artifact
from lolcats_kernels.hf_attention import HybridAttention
from lolcats_kernels.hf_student import LolcatsMixin
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import Concatenate, WeightConverter

from lolcats_cli.errors import BadInput, NotEnoughSpace
from lolcats_cli.evaluation import golden_logits
from lolcats_cli.main import run
from lolcats_cli.student.build import set_terms

OLD = Path(__file__).parents[1] / "formats" / "fixtures" / "v1" / "student"  # merged before there were golden logits


def forged(student: Path, folder: Path, **changes: torch.Tensor) -> Artifact:
    """A student with other golden tensors, whose manifest vouches for them."""
    shutil.copytree(student, folder)
    artifact = Artifact.open(folder)
    tensors = {**load_file(folder / GOLDEN), **changes}
    save_file(tensors, folder / GOLDEN)
    artifact.load = lambda name: tensors  # type: ignore[method-assign, assignment]
    return artifact


def test_they_are_the_students_own_answers_past_its_window(pipeline: SimpleNamespace) -> None:
    found = load_file(pipeline.student / GOLDEN)
    input_ids = found["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(pipeline.student, trust_remote_code=True)
    assert input_ids.shape == (2, 8 + golden_logits.BEYOND)  # window 8
    assert [p.startswith(tokenizer.decode(row)) for p, row in zip(golden_logits.PROMPTS, input_ids, strict=True)] == [
        True
    ] * 2
    student = AutoModelForCausalLM.from_pretrained(pipeline.student, trust_remote_code=True)
    expected = student(input_ids).logits[:, -1]
    torch.testing.assert_close(found["logits"], expected, atol=1e-5, rtol=1e-5)
    set_terms(student, "window")
    assert (student(input_ids).logits[:, -1] - expected).abs().max() > 0.1  # so the linear term is looked at too


def test_verify_computes_them_again(
    pipeline: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(pipeline.student, tmp_path / "moved")
    for folder, known in ((moved, True), (OLD, False)):
        assert run(["verify", str(folder), "--json"]) == 0
        error = json.loads(capsys.readouterr().out).get("golden_error")
        assert error < 1e-6 if known else error is None


def test_the_specification_states_the_same_tolerances() -> None:
    text = (Path(__file__).parents[2] / "formats" / "SPEC.md").read_text()
    for dtype, tolerance in golden_logits.TOLERANCE.items():
        assert f"{tolerance:g} ({str(dtype).removeprefix('torch.')})" in text


def test_another_computation_is_noticed(
    pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when another version of a library hands the attention something else: here, the linear term is lost."""
    made = HybridAttention.__init__

    def without(self, *args: object) -> None:
        made(self, *args)
        self.terms = "window"

    monkeypatch.setattr(HybridAttention, "__init__", without)
    with pytest.raises(
        BadInput, match=r"computes other logits.*of their standard deviation.*0\.001.*torch .*transformers"
    ):
        golden_logits.check(Artifact.open(pipeline.student))
    assert run(["verify", str(pipeline.student)]) == 3
    found = capsys.readouterr()
    assert found.out == "" and "computes other logits than when it was merged" in found.err


def test_forged_golden_files_are_refused(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    true = load_file(pipeline.student / GOLDEN)
    cases = {
        "computes other logits": {"logits": true["logits"] + 0.01 * true["logits"].std() * torch.randn(2, 260)},
        "computes other logits.*nan": {"logits": torch.full((2, 260), torch.nan)},
        "does not hold": {"input_ids": true["input_ids"] + 260},
        "does not hold input_ids": {"input_ids": true["input_ids"][:1]},
        "does not hold .*logits": {"logits": true["logits"].double()},
        "does not hold input_ids .prompts": {"input_ids": true["input_ids"][:, :0]},
        "does not hold input_ids .prompts, tokens": {"more": true["logits"].clone()},
        "for a vocabulary of 300": {"logits": torch.zeros(2, 300)},
    }
    for number, (message, changes) in enumerate(cases.items()):
        with pytest.raises(BadInput, match=message):
            golden_logits.check(forged(pipeline.student, tmp_path / str(number), **changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_tolerance_of_fp32(
    pipeline: SimpleNamespace, tmp_path: Path, dtype: torch.dtype
) -> None:
    """The golden logits are those of the dtype; a machine that rounds otherwise is not taken for a fault."""
    student = AutoModelForCausalLM.from_pretrained(pipeline.student, trust_remote_code=True, dtype=dtype)
    student.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(pipeline.student, trust_remote_code=True).save_pretrained(tmp_path / "half")
    half = golden_logits.golden(tmp_path / "half", tmp_path / "scratch")
    whole = load_file(pipeline.student / GOLDEN)["logits"]
    error = ((half["logits"] - whole).square().mean().sqrt() / whole.std()).item()
    assert 1e-4 < error < golden_logits.TOLERANCE[dtype] / 2


def test_without_a_tokenizer_the_prompts_are_bytes(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline.student, tmp_path / "student", ignore=shutil.ignore_patterns("tokenizer*"))
    input_ids = golden_logits.golden(folder, tmp_path / "scratch")["input_ids"]
    assert input_ids[0].tolist() == list(golden_logits.PROMPTS[0].encode()[: 8 + golden_logits.BEYOND])


def test_a_short_model_is_not_overrun(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline.student, tmp_path / "student")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 12}))
    assert golden_logits.golden(folder, tmp_path / "scratch")["input_ids"].shape == (2, 12)


def test_weights_stay_on_the_disk(pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of modules that hold weights in another form than the files: while one layer computes, no other is in memory."""
    converter = WeightConverter(["a.weight"], "b.weight", operations=[Concatenate()])
    monkeypatch.setattr(golden_logits, "get_checkpoint_conversion_mapping", lambda kind: [converter])
    from transformers.models.llama.modeling_llama import LlamaMLP

    seen = []

    def look(module, args) -> None:
        if isinstance(module, LlamaMLP):
            seen.append([p.device.type for name, p in student[0].named_parameters() if ".layers." in name])

    student: list[torch.nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: student.append(module) if isinstance(module, LolcatsMixin) else look(module, args)
    )
    try:
        golden_logits.check(Artifact.open(pipeline.student))
    finally:
        handle.remove()
    assert len(seen) == 2 and all(set(devices) == {"meta"} for devices in seen)


def test_weights_that_are_laid_out_anew_need_their_space(
    pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of mixtures of experts."""
    converter = WeightConverter(["a.weight"], "b.weight", operations=[Concatenate()])
    monkeypatch.setattr(golden_logits, "get_checkpoint_conversion_mapping", lambda kind: [converter])
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(NotEnoughSpace, match="experts"):
        golden_logits.golden(pipeline.student, tmp_path)
