"""What single options of transfer, lora and import resolve to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), ("exp", 2, 2e-2, 400)),
        (("--recipe", "best", "--lr", "0.5"), ("exp", 2, 0.5, 400)),
        (("--recipe", "lolcats"), ("one", 8, 1e-2, 100)),
        (("--recipe", "lolcats", "--linear-factor", "affine", "--grad-accum", "3"), ("affine", 3, 1e-2, 100)),
    ],
)
def test_recipes_of_transfer(
    pipeline: SimpleNamespace, invoke, tmp_path: Path, options: tuple, expected: tuple
) -> None:
    result = invoke("transfer", pipeline.capture, "-o", tmp_path / "t", "--steps", "0", "--layers", "0", *options)
    assert result.code == 0
    found = Artifact.open(tmp_path / "t").config
    assert (found["hybrid"]["linear_factor"], found["grad_accum"], found["lr"], found["eval_steps"]) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), (True, "text", 2, 5e-4, "plateau", 400)),
        (("--freeze-maps", "--lr", "0.5"), (False, "text", 2, 0.5, "plateau", 400)),
        (("--match", "teacher", "--schedule", "linear"), (True, "teacher", 2, 5e-4, "linear", 400)),
        (("--recipe", "lolcats"), (False, "text", 8, 1e-4, "plateau", 100)),
        (("--recipe", "lolcats", "--train-maps", "--grad-accum", "3"), (True, "text", 3, 1e-4, "plateau", 100)),
    ],
)
def test_recipes_of_lora(pipeline: SimpleNamespace, invoke, tmp_path: Path, options: tuple, expected: tuple) -> None:
    assert invoke("lora", pipeline.transfer, "-o", tmp_path / "l", "--steps", "1", *options).code == 0
    found = Artifact.open(tmp_path / "l").config
    names = ("train_maps", "match", "grad_accum", "lr", "schedule", "eval_steps")
    assert tuple(found[name] for name in names) == expected


@pytest.mark.parametrize(
    ("given", "code", "expected"),
    [
        ("0", 0, [0]),
        ("sliding", 0, None),
        ("1,sliding", 0, [1]),
        ("first", 2, "--keep-softmax first"),
        ("0-1", 2, "no layer"),
        ("auto:2", 2, "no layer"),
        ("auto:0", 2, "--keep-softmax auto:0"),
        ("auto:1,auto:1", 2, "auto more than once"),
        ("1.0,1.1", 0, [1]),
        ("heads:4", 2, "no layer"),
        ("heads:1,heads:1", 2, "heads more than once"),
        ("heads:0", 2, "--keep-softmax heads:0"),
        ("0.2", 2, "--keep-softmax 0.2 names key head 2 of layer 0, which has 2 key heads"),
        ("7.0", 2, "--keep-softmax 7.0 names layer 7, and the teacher has 2 layers"),
        ("0.0-1", 2, "--keep-softmax 0.0-1"),
    ],
)
def test_keep_softmax(pipeline: SimpleNamespace, invoke, tmp_path: Path, given: str, code: int, expected) -> None:
    result = invoke("transfer", pipeline.capture, "-o", tmp_path / "t", "--steps", "0", "--keep-softmax", given)
    assert result.code == code
    if code:
        assert expected in " ".join(result.err.split())
    else:
        assert Artifact.open(tmp_path / "t").config.get("keep_softmax") == expected


def test_import(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    name = "model.layers.{}.self_attn.{}"
    maps = {name.format(i, f"feature_map_{s}.mlp.layer"): torch.ones(4, 16, 8) for i in range(2) for s in "qk"}
    maps |= {name.format(i, "window_factors"): torch.zeros(1, 4, 1, 1) for i in range(2)}
    lora = {
        f"base_model.model.{name.format(i, 'o_proj')}.lora_{x}.default.weight": torch.ones(2, 64)
        for i, x in ((0, "A"),)
    }
    lora |= {key.replace("lora_A", "lora_B"): value.T.contiguous() for key, value in lora.items()}
    for file, weights in (("maps.pt", maps), ("lora.pt", lora)):
        torch.save({"model_state_dict": weights, "step": 1}, tmp_path / file)
    into = ("-o", tmp_path / "m")
    for wrong, words in ((("maps.pt",), "--teacher MODEL"), (("lora.pt",), "--transfer MAPS")):
        result = invoke("import", tmp_path / wrong[0], *into)
        assert (result.code, result.out) == (2, "")
        assert words in result.err
    result = invoke("import", tmp_path / "maps.pt", *into, "--teacher", pipeline.teacher, "--window", "8")
    assert (result.code, result.out) == (0, f"{tmp_path / 'm'}\n")
    hybrid = Artifact.open(tmp_path / "m", "transfer").config["hybrid"]
    assert (hybrid["window"], hybrid["layout"], hybrid["feature_dim"]) == (8, "terraced", 8)
    result = invoke("import", tmp_path / "lora.pt", "-o", tmp_path / "l", "--transfer", tmp_path / "m", "--alpha", "3")
    assert (result.code, result.out) == (0, f"{tmp_path / 'l'}\n")
    assert Artifact.open(tmp_path / "l", "lora").config["alpha"] == 3
    assert invoke("merge", tmp_path / "l", "-o", tmp_path / "s").code == 0
    assert invoke("inspect", tmp_path / "m").code == 0
    result = invoke("import", tmp_path / "gone.pt", *into)
    assert (result.code, result.out) == (3, "")


def test_select_and_keep_go_together(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    command = ("capture", pipeline.teacher, pipeline.text, "-o", tmp_path / "c", "--seq-len", "32")
    for options in (("--select", "top-esl"), ("--keep", "3")):
        result = invoke(*command, *options)
        assert (result.code, "--select and --keep need each other" in result.err) == (2, True)
    result = invoke(*command, "--samples", "10-19", "--select", "top-esl", "--keep", "3")
    assert result.code == 0
    assert Artifact.open(tmp_path / "c").config["samples"] == [10, 19]


def test_heads_that_keep_softmax(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    result = invoke("transfer", pipeline.capture, "-o", tmp_path / "t", "--steps", "0", "--keep-softmax", "1.1")
    assert result.code == 0
    assert Artifact.open(tmp_path / "t").config["hybrid"]["kept_heads"] == {"1": [1]}
    assert "kept_heads" in invoke("inspect", tmp_path / "t").out
