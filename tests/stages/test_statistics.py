"""capture's statistics and what is selected by them: exact, resumable, joined, and refused where they mean nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, artifact_id
from lolcats_kernels.softmax import softmax_weights

import lolcats_cli.stages.capture as module
from lolcats_cli.artifacts.layout import SPLITS, Layout
from lolcats_cli.errors import IdentityMismatch, Stopped, UsageError
from lolcats_cli.progress import Progress
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.join import join
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.data import split_numbers
from lolcats_cli.teacher.record import LayerInfo
from lolcats_cli.teacher.records import DataOptions

OPTIONS = DataOptions(seq_len=32, samples=20)
KEEP = 7


def dense(artifact: Artifact, split: str) -> dict[str, torch.Tensor]:
    """Every row's entropy and ESL [n, L, H], from the stored q and k and all weights at once."""
    found: dict[str, list[torch.Tensor]] = {"entropy": [], "esl": []}
    valid = artifact.load(f"tokens/{split}.safetensors").get("valid")
    for layer, info in enumerate(artifact.teacher["layers"]):
        shard = artifact.load(f"layers/{layer:03d}/{split}-00000.safetensors")
        weights = softmax_weights(shard["q"], shard["k"], LayerInfo.from_dict(info).spec, valid).double()
        time = torch.arange(weights.shape[-1])
        found["entropy"].append(-torch.xlogy(weights, weights).sum((2, 3)))
        found["esl"].append((weights * (time[:, None] - time[None, :])).sum((2, 3)))
    return {name: torch.stack(layers, 1) for name, layers in found.items()}


def check_statistics(artifact: Artifact) -> None:
    rows: dict[str, list[torch.Tensor]] = {"entropy": [], "esl": []}
    for split in SPLITS:
        expected, stored = dense(artifact, split), artifact.load(f"statistics/{split}-00000.safetensors")
        assert len(stored) == 4  # entropy and ESL of two layers
        for name, tensor in expected.items():
            rows[name].append(tensor)
            for layer in range(2):
                found = stored[f"{name}.{layer:03d}"].double()
                torch.testing.assert_close(found, tensor[:, layer], rtol=1e-4, atol=1e-4)
    tokens = sum(artifact.data["tokens"].values())
    for layer in range(2):
        figures = artifact.summary["layers"][str(layer)]
        heads = torch.cat(rows["entropy"])[:, layer].sum(0) / tokens
        assert figures["head_entropy"] == pytest.approx(heads.tolist(), rel=1e-4)
        assert figures["entropy"] == pytest.approx(heads.mean().item(), rel=1e-4)
        assert figures["esl"] == pytest.approx(torch.cat(rows["esl"])[:, layer].mean().item(), rel=1e-4)


@pytest.fixture(scope="module")
def everything(pipeline: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("everything") / "c"
    return capture(str(pipeline.teacher), str(pipeline.text), folder, options=OPTIONS, statistics="all")


def test_statistics_are_those_of_the_stored_activations(everything: Artifact) -> None:
    check_statistics(everything)


@pytest.mark.parametrize("store", [{}, {"store": "block", "block_size": 1}, {"store": "tokens"}])
def test_a_sample_of_rows_is_measured_whatever_is_stored(
    pipeline: SimpleNamespace, everything: Artifact, tmp_path: Path, store: dict
) -> None:
    artifact = capture(str(pipeline.teacher), str(pipeline.text), tmp_path / "c", options=OPTIONS, **store)
    wanted = [0, 16]  # of the rows in the data
    found: dict[str, dict[int, torch.Tensor]] = {}
    for split, numbers in Layout.of(artifact.manifest).rows.items():
        measured = [number for number in numbers if number in wanted]
        for name in (name for name in artifact.files if name.startswith("statistics/") and split in name):
            for key, tensor in artifact.load(name).items():
                assert len(tensor) == len(measured)
                found.setdefault(key, {}).update(zip(measured, tensor, strict=True))
    assert len(found) == 4  # two figures of two layers
    for split, numbers in Layout.of(everything.manifest).rows.items():
        for key, expected in everything.load(f"statistics/{split}-00000.safetensors").items():
            for number in set(wanted).intersection(numbers):
                torch.testing.assert_close(found[key][number], expected[numbers.index(number)], rtol=1e-5, atol=1e-4)
    for layer in range(2):
        heads = torch.stack(list(found[f"entropy.{layer:03d}"].values())).double().sum(0) / (2 * 32)
        assert artifact.summary["layers"][str(layer)]["head_entropy"] == pytest.approx(heads.tolist())


def test_padding_is_left_out(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    words = pipeline.text.read_text().split()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(words[i : i + 2 + i % 5])}) + "\n" for i in range(8)))
    options = DataOptions(seq_len=32, pack=False)
    artifact = capture(
        str(pipeline.teacher), str(data), tmp_path / "c", options=options, batch_size=3, statistics="all"
    )
    assert sum(artifact.data["tokens"].values()) < 8 * 32
    check_statistics(artifact)


def test_an_unfinished_capture_without_statistics_is_given_them(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """As an earlier version left it."""
    whole = capture(str(pipeline.teacher), str(pipeline.text), tmp_path / "whole", options=OPTIONS, statistics="all")
    old = tmp_path / "old"
    capture(str(pipeline.teacher), str(pipeline.text), old, options=OPTIONS, statistics="all")
    manifest = json.loads((old / "manifest.json").read_text())
    (old / "manifest.json").unlink()
    files = {name: entry for name, entry in manifest["files"].items() if not name.startswith("statistics/")}
    progress = {key: manifest[key] for key in ("format", "kind", "config", "teacher", "data", "parents")}
    (old / "progress.json").write_text(json.dumps({**progress, "version": "1.0", "files": files, "metrics": 0}))
    for file in (old / "statistics").iterdir():
        file.unlink()
    assert capture(str(pipeline.teacher), str(pipeline.text), old, options=OPTIONS, statistics="all").id == whole.id


def test_the_longest_rows_are_kept_in_their_order(
    pipeline: SimpleNamespace, everything: Artifact, tmp_path: Path
) -> None:
    esl, ids = torch.empty(20, dtype=torch.float64), torch.empty(20, 32, dtype=torch.int32)
    for split, numbers in zip(SPLITS, split_numbers(20, 0.05, 0), strict=True):
        esl[numbers] = dense(everything, split)["esl"].mean((1, 2))
        ids[numbers] = everything.load(f"tokens/{split}.safetensors")["input_ids"]
    best = esl.argsort(descending=True)[:KEEP].sort().values
    artifact = capture(
        str(pipeline.teacher), str(pipeline.text), tmp_path / "c", options=OPTIONS, keep=KEEP, statistics="all"
    )
    artifact.verify()
    for split, numbers in zip(SPLITS, split_numbers(KEEP, 0.05, 0), strict=True):
        assert torch.equal(artifact.load(f"tokens/{split}.safetensors")["input_ids"], ids[best[numbers]])
    torch.testing.assert_close(artifact.load("candidates/00000.safetensors")["esl"], esl, rtol=1e-4, atol=1e-4)
    assert artifact.data["rows"] == {"train": KEEP - 1, "validation": 1}
    assert (artifact.config["samples"], artifact.config["select"], artifact.config["keep"]) == ([0, 19], "top-esl", 7)
    assert artifact.summary["layers"]["0"]["esl"] > everything.summary["layers"]["0"]["esl"]
    trained = transfer(artifact.path, tmp_path / "t", options=TransferOptions(steps=1, grad_accum=1))
    assert trained.data["rows"]["train"] == KEEP - 1


class StopIn(Progress):
    """Raises `Stopped`, as a signal would, when the task `name` advances for the so manieth time."""

    def __init__(self, name: str, advances: int) -> None:
        self.name, self.left = name, advances

    def task(self, name: str, total: int, unit: str = "it"):
        from contextlib import contextmanager

        @contextmanager
        def steps():
            def advance(done: int = 1, **figures: float) -> None:
                self.left -= name == self.name
                if self.left == 0:
                    raise Stopped("SIGTERM")

            yield advance

        return steps()


def test_a_stopped_selection_goes_on_to_the_same_bytes(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 6)
    arguments = (str(pipeline.teacher), str(pipeline.text))
    whole = capture(*arguments, tmp_path / "whole", options=OPTIONS, keep=KEEP)
    assert len([name for name in whole.files if name.startswith("candidates/")]) == 4
    parts = tmp_path / "parts"
    for name, advances in (("select", 2), ("select", 4), ("capture", 2)):
        with pytest.raises(Stopped):
            capture(*arguments, parts, options=OPTIONS, keep=KEEP, progress=StopIn(name, advances))
    made = parts / "candidates" / "00000.safetensors"
    before = made.stat().st_mtime_ns
    found = capture(*arguments, parts, options=OPTIONS, keep=KEEP)
    assert made.stat().st_mtime_ns == before  # not made again
    assert found.id == whole.id
    assert all(found.read(name) == whole.read(name) for name in whole.files)


def test_all_rows_may_be_kept_but_no_more(pipeline: SimpleNamespace, everything: Artifact, tmp_path: Path) -> None:
    arguments = (str(pipeline.teacher), str(pipeline.text))
    with pytest.raises(UsageError, match=r"--keep 21 is more than the 20 rows"):
        capture(*arguments, tmp_path / "c", options=OPTIONS, keep=21)
    assert not (tmp_path / "c").exists()
    found = capture(*arguments, tmp_path / "c", options=OPTIONS, keep=20, statistics="all")
    shared = [name for name in everything.files if not name.startswith("candidates/")]
    assert all(found.read(name) == everything.read(name) for name in shared)


def test_selected_rows_are_not_joined(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    parts = [
        capture(
            str(pipeline.teacher),
            str(pipeline.text),
            tmp_path / str(first),
            options=replace(OPTIONS, first=first, samples=5),
            keep=2,
        ).path
        for first in (0, 5)
    ]
    with pytest.raises(IdentityMismatch, match="were selected from its own part"):
        join(parts, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_parts_without_statistics_are_not_joined(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    parts = [
        capture(
            str(pipeline.teacher),
            str(pipeline.text),
            tmp_path / str(first),
            options=replace(OPTIONS, first=first, samples=4),
            statistics="all",
        ).path
        for first in (0, 4)
    ]
    manifest = json.loads((parts[1] / "manifest.json").read_text())
    for split in SPLITS:
        del manifest["files"][f"statistics/{split}-00000.safetensors"]
        (parts[1] / "statistics" / f"{split}-00000.safetensors").unlink()
    manifest["id"] = artifact_id(manifest)
    (parts[1] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IdentityMismatch, match=r"has no statistics\. Capture it again"):
        join(parts, tmp_path / "joined")
