"""--log-to: curves in an experiment tracker, beside artifacts that are the same without them."""

from __future__ import annotations

import io
import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from lolcats_formats import Artifact

import lolcats_cli as lolcats
from lolcats_cli.errors import UsageError
from lolcats_cli.main import run


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}


def events(artifact: Artifact, kind: str) -> list[dict]:
    lines = (artifact.path / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def assert_same(one: Artifact, other: Artifact) -> None:
    """The same identity and the same files, byte for byte."""
    assert (one.id, one.config, one.files) == (other.id, other.config, other.files)
    lie_there = [sorted(str(file.relative_to(made.path)) for file in made.path.rglob("*")) for made in (one, other)]
    assert lie_there[0] == lie_there[1]


def test_a_lora_in_tensorboard(pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    plain = lolcats.lora(pipeline.transfer, tmp_path / "plain", steps=3, eval_steps=2, rank=2)
    shown = lolcats.lora(pipeline.transfer, tmp_path / "shown", steps=3, eval_steps=2, rank=2, log_to="tensorboard")
    assert_same(plain, shown)
    found: dict[str, list[tuple[int, float]]] = {}
    for folder in sorted((tmp_path / "shown-runs").rglob("events.*")):
        for name, points in scalars(folder).items():
            found.setdefault(name, []).extend(points)
    for name, kind in (("eval/loss", "validation"), ("train/loss", "train")):
        wanted = [(event["step"], pytest.approx(event["loss"], rel=1e-3)) for event in events(plain, kind)]
        assert sorted(found[name]) == wanted and len(wanted) >= 3


def test_a_transfer_in_tensorboard(pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    options = {"steps": 3, "eval_steps": 2, "window": 8, "feature_dim": 8}
    plain = lolcats.transfer(pipeline.capture, tmp_path / "plain", **options)
    shown = lolcats.transfer(pipeline.capture, tmp_path / "shown", **options, log_to="tensorboard")
    assert_same(plain, shown)
    for layer in plain.config["layers"]:
        found = scalars(tmp_path / "elsewhere" / f"layer-{layer:03d}")
        for name, kind in (("mse", "validation"), ("loss", "train")):
            told = [event for event in events(plain, kind) if event["layer"] == layer]
            assert found[name] == [(event["step"], pytest.approx(event[name])) for event in told] and len(told) >= 3


@pytest.mark.parametrize(
    ("library", "wanted"), [("tensorboard", "'lolcats[log]'"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_library_that_is_not_there_is_told_first(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, wanted: str
) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(UsageError, match=re.escape(f"needs {library}. Install it with: pip install {wanted}")) as told:
        lolcats.lora(pipeline.transfer, tmp_path / "out", log_to=library)
    assert told.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_what_a_tracker_prints_is_no_result(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerCallback, integrations

    class Talker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            print(f"the run {args.run_name} of {args.project} begins")

    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [Talker])
    monkeypatch.setattr("lolcats_cli.commands._checks.tracker", lambda log_to: None)
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    output = tmp_path / "out"
    assert run(["lora", str(pipeline.transfer), "-o", str(output), "--steps", "1", "--log-to", "trackio"]) == 0
    assert out.getvalue() == f"{output}\n"
    assert "the run out of lolcats begins\n" in err.getvalue()
