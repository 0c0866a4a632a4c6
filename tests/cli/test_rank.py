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


def test_what_converted_layers_cost(pipeline: SimpleNamespace, invoke) -> None:
    found = json.loads(invoke("rank", str(pipeline.transfer), "--json").out)
    assert set(found["layers"]) == {"0", "1"} and found["all"] > 0
    # Of two layers, the one that is left out leaves the other alone.
    assert found["layers"]["0"]["others"] == found["layers"]["1"]["alone"] > 0
    shown = invoke("rank", str(pipeline.transfer)).out
    assert "all others converted" in shown and "All 2 converted layers cost" in shown
    refused = invoke("rank", str(pipeline.transfer), "--heads")
    assert refused.code == 2 and "--heads measures a capture" in refused.err


def test_feature_sizes_from_the_command_line(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    made, steps = tmp_path / "t", ("--steps", "1", "--grad-accum", "1")
    result = invoke("transfer", str(pipeline.capture), "-o", str(made), "--feature-dims", "8,24", *steps)
    assert result.code == 0
    assert Artifact.open(made).config["hybrid"]["feature_dims"] == [8, 24]
    layers = json.loads(invoke("inspect", str(made), "--json").out)["layers"]
    assert [layer["feature_dim"] for layer in layers] == [8, 24]
    for wrong in ("8", "8;24", "0,8"):
        result = invoke("transfer", str(pipeline.capture), "-o", str(tmp_path / "u"), "--feature-dims", wrong)
        assert result.code == 2 and f"--feature-dims {'gives 1' if wrong == '8' else wrong}" in result.err


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
    assert result.code == 2 and "neither auto nor a number of at least 0 for every layer" in result.err


def test_steps_from_the_command_line(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    def made(name: str, steps: str) -> list[int] | int:
        result = invoke("transfer", str(pipeline.capture), "-o", str(tmp_path / name), "--steps", steps)
        assert result.code == 0, result.err
        return Artifact.open(tmp_path / name).config["steps"]

    assert made("t", "1") == 1
    assert made("u", "1,2") == [1, 2]
    result = invoke(
        "transfer",
        str(pipeline.capture),
        "-o",
        str(tmp_path / "v"),
        "--steps",
        "auto",
        "--epochs",
        "1",
        "--window",
        "8",
    )
    assert result.code == 0 and "steps: " in result.err
    assert abs(sum(Artifact.open(tmp_path / "v").config["steps"]) - 2 * 10) <= 1  # 2 layers, 19 rows, 2 a step
    for wrong in ("-1", "1.5", "some"):
        result = invoke("transfer", str(pipeline.capture), "-o", str(tmp_path / "w"), "--steps", wrong)
        assert result.code == 2 and f"--steps {wrong} is neither auto nor" in result.err
