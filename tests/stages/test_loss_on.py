"""lora --loss-on completion: which tokens are trained on, from the data to the loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact
from safetensors.torch import load_file

from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.loading.student import load_student
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.join import join
from lolcats_cli.stages.lora import lora
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.lora_training import IGNORED, TokenRows
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.data import Rows
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

CPU = LoadOptions(device="cpu")
QUICK = LoraOptions(steps=1, grad_accum=1, eval_steps=1, lr=0.0, loss_on="completion")
WORDS = ["whale", "ship", "sea", "man", "sail", "home"]


@pytest.fixture(scope="module")
def prompted(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`data`: prompts of different lengths and answers; `capture` and `transfer` of it, a document a row."""
    root = tmp_path_factory.mktemp("prompted")
    made = SimpleNamespace(data=root / "data.jsonl", capture=root / "capture", transfer=root / "transfer")
    records = [{"prompt": "the " * (1 + i % 3), "completion": WORDS[i % 6]} for i in range(18)]
    records[4] = {"prompt": "no answer fits into this row", "completion": "!"}
    made.data.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = DataOptions(seq_len=20, pack=False)
    capture(str(tiny_teacher), str(made.data), made.capture, options=options, val_fraction=0.3, load=CPU)
    transfer(made.capture, made.transfer, options=TransferOptions(steps=0))
    return made


@torch.no_grad()
def completion_loss(made: SimpleNamespace, teacher: Path) -> float:
    """The mean over the completions' tokens of the validation rows, of the student as transferred, by hand."""
    model = load_student(Artifact.open(made.transfer), teacher, CPU).eval()
    rows = Rows.from_tensors(Artifact.open(made.capture).load("tokens/validation.safetensors"))
    total, count = 0.0, 0
    for ids, valid, marks in zip(rows.input_ids.long(), rows.valid, rows.completion, strict=True):
        logits = model(input_ids=ids[None], attention_mask=valid[None].long(), use_cache=False).logits[0]
        for place in range(1, len(ids)):
            if marks[place]:
                total -= logits[place - 1].log_softmax(-1)[ids[place]].item()
                count += 1
    return total / count


def test_the_loss_is_over_completions_alone(prompted: SimpleNamespace, tiny_teacher: Path, tmp_path: Path) -> None:
    stored = load_file(prompted.capture / "tokens" / "train.safetensors")
    assert sorted(stored) == ["completion", "input_ids", "valid"]
    artifact = lora(prompted.transfer, tmp_path / "l", options=QUICK, load=CPU)
    assert artifact.config["loss_on"] == "completion"
    assert artifact.summary["initial_loss"] == pytest.approx(completion_loss(prompted, tiny_teacher), rel=1e-5)
    every = lora(
        prompted.transfer, tmp_path / "a", options=LoraOptions(steps=1, grad_accum=1, eval_steps=1, lr=0.0), load=CPU
    )
    assert every.summary["initial_loss"] != pytest.approx(artifact.summary["initial_loss"], rel=1e-2)
    rows = Artifact.open(prompted.capture).data["rows"]
    assert sum(artifact.data["rows"].values()) == 17  # without the row that the prompt fills
    assert sum(every.data["rows"].values()) == sum(rows.values()) == 18


def test_labels() -> None:
    rows = Rows(
        torch.arange(10, dtype=torch.int32).view(2, 5),
        torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        torch.tensor([[True, False, True, True, False], [False, True, True, False, False]]),
    )
    labels = [row["labels"].tolist() for row in map(TokenRows(rows).__getitem__, range(3))]
    assert labels == [
        [IGNORED, IGNORED, 2, 3, IGNORED],
        [IGNORED, 6, 7, IGNORED, IGNORED],
        [IGNORED] * 5,
    ]


def test_other_data(pipeline: SimpleNamespace, prompted: SimpleNamespace, tmp_path: Path) -> None:
    options = DataOptions(seq_len=20, pack=False)
    files = [str(prompted.data), str(prompted.data)]
    artifact = lora(pipeline.transfer, tmp_path / "l", options=QUICK, data=files, data_options=options, load=CPU)
    assert sum(artifact.data["rows"].values()) == 34
    assert artifact.data["path"] == " ".join(files)
    again = lora(
        pipeline.transfer, tmp_path / "c", options=QUICK, data=str(prompted.capture), data_options=options, load=CPU
    )
    assert sum(again.data["rows"].values()) == 17
    with pytest.raises(UsageError, match="is a capture, so it must be the only data"):
        lora(pipeline.transfer, tmp_path / "n", options=QUICK, data=[str(prompted.capture), files[0]], load=CPU)


def test_data_without_completions(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"The captured tokens do not tell .* Pass the data with --data"):
        lora(pipeline.transfer, tmp_path / "l", options=QUICK, load=CPU)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"prompt": "a", "completion": "b"}\n{"text": "plain"}\n')
    options = DataOptions(seq_len=4)
    with pytest.raises(
        BadInput, match=r"mixed\.jsonl, line 2: It does not tell which of its tokens are a completion's"
    ):
        lora(pipeline.transfer, tmp_path / "l", options=QUICK, data=str(mixed), data_options=options, load=CPU)
    mixed.write_text('{"prompt": "a long one", "completion": "b"}\n' * 3)
    options = DataOptions(seq_len=4, pack=False)
    with pytest.raises(BadInput, match="No row holds a completion to predict"):
        lora(pipeline.transfer, tmp_path / "l", options=QUICK, data=str(mixed), data_options=options, load=CPU)


@pytest.mark.parametrize("text_at", [None, 2, 12])
def test_joined_captures_tell_what_one_would(tiny_teacher: Path, tmp_path: Path, text_at: int | None) -> None:
    data = tmp_path / "data.jsonl"
    records: list[dict[str, str]] = [{"prompt": "the", "completion": WORDS[i % 6] * 2} for i in range(16)]
    if text_at is not None:
        records[text_at] = {"text": "plain text of some length"}
    data.write_text("".join(json.dumps(record) + "\n" for record in records))

    def rows(name: str, first: int, samples: int) -> Path:
        options = DataOptions(seq_len=12, pack=False, first=first, samples=samples)
        return capture(str(tiny_teacher), str(data), tmp_path / name, options=options, load=CPU).path

    whole = rows("whole", 0, 16)
    joined = join([rows("a", 0, 8), rows("b", 8, 8)], tmp_path / "joined")
    assert joined.id == Artifact.open(whole).id
    assert ("completion" in load_file(whole / "tokens/train.safetensors")) == (text_at is None)
