"""rank, and the options of transfer that measure the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from lolcats_formats import Artifact


def test_rank_from_the_command_line(pipeline: SimpleNamespace, invoke) -> None:
    result = invoke("rank", str(pipeline.capture), "--heads", "--json")
    found = json.loads(result.out)
    assert set(found["layers"]) == {"0", "1"} == set(found["heads"])
    assert len(found["heads"]["0"]) == 2
    shown = invoke("rank", str(pipeline.capture), "--heads").out
    assert "key head 1" in shown and "nats per token that the teacher loses" in shown


def test_auto_needs_the_teacher(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    for option in (("--windows", "auto"), ("--keep-softmax", "auto:1")):
        result = invoke("transfer", str(pipeline.capture), "-o", str(tmp_path / "t"), *option, "--teacher", gone)
        assert result.code == 3 and "gone" in result.err
        assert not (tmp_path / "t").exists()


def test_windows_from_the_command_line(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    steps = ("--steps", "1", "--grad-accum", "1")
    result = invoke("transfer", str(pipeline.capture), "-o", str(tmp_path / "t"), "--windows", "8,24", *steps)
    assert result.code == 0
    assert Artifact.open(tmp_path / "t").config["hybrid"]["windows"] == [8, 24]
    result = invoke("transfer", str(pipeline.capture), "-o", str(tmp_path / "u"), "--windows", "auto", *steps)
    assert result.code == 0 and "windows: " in result.err
    assert sum(Artifact.open(tmp_path / "u").config["hybrid"]["windows"]) <= 2 * 64
    shown = json.loads(invoke("inspect", str(tmp_path / "u"), "--json").out)["layers"][0]
    assert shown["window"] >= 16 and shown["loss@16"] > 0
    result = invoke("transfer", str(pipeline.capture), "-o", str(tmp_path / "v"), "--windows", "8;24")
    assert result.code == 2 and "neither auto nor a window for every layer" in result.err
