"""What an earlier lolcats wrote is found finished by the same command, and the next stage goes on from it: sizes by
layer, kept heads, and stored predictions (tests/formats/fixtures/v1.2)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lolcats_formats import Artifact
from lolcats_kernels import HybridConfig

from lolcats_cli.artifacts.describe import describe
from lolcats_cli.progress import Progress
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.lora import lora
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.merge import merge
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures" / "v1.2"
TEACHER = str(FIXTURES / "teacher")
HYBRID = HybridConfig(window=4, feature_dim=4, linear_factor="exp", decay=True)
OPTIONS = TransferOptions(HYBRID, windows=(4, 2), feature_dims=(2, 3), steps=(2, 1), grad_accum=1)
LORA = LoraOptions(rank=2, steps=2, grad_accum=1, match="teacher")
CPU = LoadOptions(device="cpu")


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def fixtures(tmp_path: Path) -> Path:
    """A copy that commands may look into."""
    return shutil.copytree(FIXTURES, tmp_path / "v1.2")


def test_the_same_commands_find_them_finished(fixtures: Path, tmp_path: Path) -> None:
    text, told = tmp_path / "text.txt", Notes()
    text.write_text("two men sang of home and a whale at sea. " * 3)
    rows = DataOptions(seq_len=16, samples=4)
    captured = capture(TEACHER, str(text), fixtures / "capture", options=rows, store_logits=4, load=CPU, progress=told)
    mapped = transfer(
        captured.path, fixtures / "transfer", options=OPTIONS, keep_softmax=[(0, 1)], load=CPU, progress=told
    )
    tuned = lora(mapped.path, fixtures / "lora", options=LORA, teacher=TEACHER, load=CPU, progress=told)
    assert told.notes == [f"{made.path} is finished already" for made in (captured, mapped, tuned)]


def test_stored_predictions_are_trained_on(tmp_path: Path) -> None:
    told = Notes()
    made = lora(FIXTURES / "transfer", tmp_path / "lora", options=LORA, teacher=TEACHER, load=CPU, progress=told)
    assert (made.config["logits"], made.summary["steps"]) == (4, 2)
    assert f"--match teacher takes the 4 likeliest next tokens that {FIXTURES / 'capture'} stores" in told.notes


def test_maps_are_trained_as_they_were(tmp_path: Path) -> None:
    made = transfer(FIXTURES / "capture", tmp_path / "t", options=OPTIONS, keep_softmax=[(0, 1)], load=CPU)
    then = Artifact.open(FIXTURES / "transfer")
    assert (made.config, made.parents[0]["id"]) == (then.config, then.parents[0]["id"])
    for name in (f"maps/layer-00{layer}.safetensors" for layer in range(2)):
        torch.testing.assert_close(made.load(name), then.load(name), rtol=1e-3, atol=1e-3)


def test_a_student_is_merged_from_sizes_by_layer_and_kept_heads(tmp_path: Path, merged: Callable) -> None:
    shown = describe(Artifact.open(FIXTURES / "transfer"))["layers"]
    assert [(x["window"], x["feature_dim"], x["kept_heads"]) for x in shown] == [(4, 2, [1]), (2, 3, [])]
    folder = merge(FIXTURES / "lora", tmp_path / "student", teacher=TEACHER).path
    model = merged(folder, FIXTURES / "lora", TEACHER)
    assert [layer.self_attn.hybrid.config.kept_heads for layer in model.model.layers] == [(1,), ()]
