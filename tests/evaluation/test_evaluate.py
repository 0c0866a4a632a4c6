"""eval: its figures against direct computations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_kernels import HybridConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from lolcats_cli.errors import BadInput
from lolcats_cli.evaluation.evaluate import evaluate
from lolcats_cli.evaluation.generate import Sampling, generate
from lolcats_cli.loading.any_model import Loaded, load_any
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.data import read_rows
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

CPU = LoadOptions(device="cpu")
OPTIONS = DataOptions(seq_len=48, samples=6)


@pytest.fixture(scope="module")
def teacher(pipeline: SimpleNamespace) -> Loaded:
    return load_any(str(pipeline.teacher), CPU)


@pytest.fixture(scope="module")
def student(pipeline: SimpleNamespace) -> Loaded:
    return load_any(str(pipeline.transfer), CPU)


def row_losses(folder: Path, ids: torch.Tensor) -> list[list[float]]:
    """Nats of every token of every row but the first, one row and one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        log = model(input_ids=ids.long()).logits.double().log_softmax(-1)
    return [[-log[n, t - 1, ids[n, t]].item() for t in range(1, ids.shape[1])] for n in range(len(ids))]


def test_teacher_figures_are_those_of_a_direct_computation(pipeline: SimpleNamespace, teacher: Loaded) -> None:
    found = evaluate(teacher, str(pipeline.text), options=OPTIONS, recall_count=0, batch_size=4)
    assert (found["rows"], found["tokens"], found["seq_len"]) == (6, 6 * 48, 48)
    assert list(found["results"]) == ["both"]
    figures = found["results"]["both"]
    tokenizer = AutoTokenizer.from_pretrained(pipeline.teacher)
    rows = row_losses(pipeline.teacher, read_rows(str(pipeline.text), tokenizer, OPTIONS).input_ids)
    means = torch.tensor(rows, dtype=torch.float64).mean(1)
    assert figures["nats_per_token"] == pytest.approx(means.mean().item(), rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(means.mean()), rel=1e-4)
    # Rows of equal length: the standard error of their mean.
    assert figures["standard_error"] == pytest.approx((means.std() / math.sqrt(6)).item(), rel=1e-3)
    assert figures["attention_mse"] == figures["relative_attention_mse"] == 0
    assert figures["recall"] == {}


def test_padding_is_not_predicted(pipeline: SimpleNamespace, teacher: Loaded, tmp_path: Path) -> None:
    texts = ["one ship", "two men at sea sang of home", "a white sail and the sea"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    padded = evaluate(teacher, str(data), options=DataOptions(seq_len=40, pack=False), recall_count=0)
    tokenizer = AutoTokenizer.from_pretrained(pipeline.teacher)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        (losses,) = row_losses(pipeline.teacher, ids)
        total, count = total + sum(losses), count + len(losses)
    assert padded["results"]["both"]["nats_per_token"] == pytest.approx(total / count, rel=1e-4)


def test_ablations_differ_and_leave_the_student_whole(pipeline: SimpleNamespace, student: Loaded) -> None:
    found = evaluate(student, str(pipeline.text), options=OPTIONS, recall_count=0)["results"]
    assert list(found) == ["both", "window", "linear"]
    nats = [figures["nats_per_token"] for figures in found.values()]
    assert len({round(value, 4) for value in nats}) == 3
    assert found["both"]["attention_mse"] < min(found[term]["attention_mse"] for term in ("window", "linear"))
    again = evaluate(student, str(pipeline.text), options=OPTIONS, recall_count=0, terms=("both",))["results"]
    assert again == {"both": found["both"]}


def test_a_window_over_the_whole_row_is_the_teacher(pipeline: SimpleNamespace, teacher: Loaded, tmp_path: Path) -> None:
    options = TransferOptions(HybridConfig(window=64, feature_dim=16), steps=0)
    artifact = transfer(pipeline.capture, tmp_path / "t", options=options)
    swapped = evaluate(load_any(str(artifact.path), CPU), str(pipeline.text), options=OPTIONS, recall_count=0)[
        "results"
    ]
    own = evaluate(teacher, str(pipeline.text), options=OPTIONS, recall_count=0)["results"]["both"]
    for term in ("both", "window"):
        assert swapped[term]["nats_per_token"] == pytest.approx(own["nats_per_token"], rel=1e-5)
        assert swapped[term]["relative_attention_mse"] < 1e-9
    assert swapped["linear"]["relative_attention_mse"] > 0.9  # nothing is left to sum: the output is 0


def test_attention_error_is_that_of_the_transfer_on_its_own_rows(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """With one layer replaced after the other the inputs differ; in the first layer they are the teacher's own."""
    from lolcats_formats import Artifact

    artifact = Artifact.open(pipeline.transfer)
    rows = Artifact.open(pipeline.capture).load("tokens/validation.safetensors")["input_ids"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"input_ids": row.tolist()}) + "\n" for row in rows))
    student = load_any(str(pipeline.transfer), CPU)
    first = student.model.model.layers[0]
    student.model.model.layers = torch.nn.ModuleList([first])  # what eval sees of a student of one layer
    found = evaluate(student, str(data), options=DataOptions(seq_len=64), recall_count=0, terms=("both", "window"))
    figures = artifact.summary["layers"]["0"]
    for term, prefix in (("both", ""), ("window", "window_")):
        assert found["results"][term]["attention_mse"] == pytest.approx(figures[f"{prefix}mse"], rel=1e-3)
        assert found["results"][term]["relative_attention_mse"] == pytest.approx(
            figures[f"relative_{prefix}mse"], rel=1e-3
        )


def test_recall_is_measured_where_it_fits(pipeline: SimpleNamespace, new_teacher, tmp_path: Path) -> None:
    """The byte-level teacher of 512 tokens has room for facts 128 tokens back; a random one recalls none."""
    loaded = load_any(str(new_teacher(tmp_path / "long", max_position_embeddings=512)), CPU)
    found = evaluate(loaded, str(pipeline.text), options=DataOptions(seq_len=256), recall_count=4)
    assert found["results"]["both"]["recall"] == {"128": 0.0}


def test_too_long_and_too_short(pipeline: SimpleNamespace, teacher: Loaded, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--seq-len 129 is over the 128"):
        evaluate(teacher, str(pipeline.text), options=DataOptions(seq_len=129))
    (tmp_path / "short.txt").write_text("sea")
    with pytest.raises(BadInput, match="fewer than the 48 tokens"):
        evaluate(teacher, str(tmp_path / "short.txt"), options=OPTIONS)


def test_generation_streams_what_it_returns_and_is_the_argmax(pipeline: SimpleNamespace, teacher: Loaded) -> None:
    pieces: list[str] = []
    text = generate(teacher, "the whale", max_new_tokens=8, write=pieces.append)
    assert "".join(pieces) == text
    tokenizer = AutoTokenizer.from_pretrained(pipeline.teacher)
    model = AutoModelForCausalLM.from_pretrained(pipeline.teacher).eval()
    ids = tokenizer("the whale", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert text == tokenizer.decode(ids[0, len(tokenizer("the whale")["input_ids"]) :], skip_special_tokens=True)


def test_sampling_goes_by_the_seed(student: Loaded) -> None:
    drawn = [generate(student, "sea", max_new_tokens=12, sampling=Sampling(1.5, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
