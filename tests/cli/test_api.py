"""`import lolcats_cli as lolcats`: the commands from Python."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lolcats_formats import Artifact
from lolcats_kernels import HybridConfig

import lolcats_cli as lolcats
from lolcats_cli import api
from lolcats_cli.errors import BadInput, UsageError
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions


def test_importing_it_costs_nothing() -> None:
    code = "import sys, lolcats_cli; print(sorted({'torch', 'typer', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_the_names_are_there() -> None:
    assert set(lolcats.__all__) == set(api.FUNCTIONS) <= set(dir(lolcats))
    for name in lolcats.__all__:
        assert inspect.getdoc(getattr(lolcats, name))
    with pytest.raises(AttributeError, match="no attribute 'captured'"):
        lolcats.captured  # noqa: B018


def test_the_same_from_python_and_from_the_shell(pipeline: SimpleNamespace, invoke: Callable, tmp_path: Path) -> None:
    commands: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "capture": ([pipeline.teacher, pipeline.text], {"seq_len": 32, "samples": "4", "pack": True}),
        "transfer": ([tmp_path / "capture"], {"steps": 2, "window": 8, "feature_dim": 16, "gamma": 0.25}),
        "lora": ([tmp_path / "transfer"], {"steps": 2, "rank": 2, "train_maps": False}),
        "merge": ([tmp_path / "lora"], {"max_shard_size": 1}),
    }
    for name, (given, options) in commands.items():
        made = getattr(lolcats, name)(*given, tmp_path / name, **options)
        flags = {"train_maps": "--freeze-maps", "pack": "--pack"}
        shell = [
            part
            for key, value in options.items()
            for part in ([flags[key]] if key in flags else [f"--{key.replace('_', '-')}", value])
        ]
        assert invoke(name, *given, "-o", tmp_path / f"{name}-by-shell", *shell).code == 0
        assert made.id == Artifact.open(tmp_path / f"{name}-by-shell").id
    assert lolcats.verify(tmp_path / "merge")["kind"] == "student"
    assert lolcats.inspect(tmp_path / "merge")["kind"] == "student"
    found = lolcats.eval(tmp_path / "merge", data=pipeline.text, seq_len=32, recall=0)
    assert found["results"]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("transfer", {"window": -1}, "--window"),
        ("transfer", {"recipe": "worst"}, "--recipe"),
        ("transfer", {"lr": float("nan")}, "--lr"),
        ("transfer", {"gamma": 2.0}, "--gamma"),
        ("transfer", {"steps": "many"}, "--steps"),
        ("lora", {"alpha": 0.0}, "--alpha"),
        ("transfer", {"devices": "0-1"}, "--devices works on the command line"),
    ],
)
def test_what_the_command_line_refuses_is_refused(
    pipeline: SimpleNamespace, tmp_path: Path, name: str, options: dict, words: str
) -> None:
    given = {"transfer": pipeline.capture, "lora": pipeline.transfer}[name]
    with pytest.raises(UsageError, match=words):
        getattr(lolcats, name)(given, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_errors_are_exceptions(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="widths"):
        lolcats.transfer(tmp_path, tmp_path / "out", widths=3)  # type: ignore[call-arg]
    with pytest.raises(BadInput, match="no-such-teacher"):
        lolcats.capture(str(tmp_path / "no-such-teacher"), __file__, tmp_path / "out")


class Asked(Exception):
    """In place of a stage."""


@pytest.mark.parametrize("name", ["capture", "transfer", "lora"])
def test_the_defaults_of_options_are_those_of_the_stages(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A command without options gives its stage what the stage takes without them."""

    def ask(*given: Any, **options: Any) -> None:
        raise Asked(options)

    stage = __import__(f"lolcats_cli.stages.{name}", fromlist=[name])
    signature = inspect.signature(getattr(stage, name))
    monkeypatch.setattr(stage, name, ask)
    given = {"capture": [pipeline.teacher, pipeline.text], "transfer": [pipeline.capture], "lora": [pipeline.transfer]}
    with pytest.raises(Asked) as asked:
        getattr(lolcats, name)(*given[name], tmp_path / "out")
    for option, value in asked.value.args[0].items():
        default = signature.parameters[option].default
        if option not in ("progress", "store"):  # a stage is silent of itself; to choose a store is the command's offer
            assert (option, value) == (option, list(default) if isinstance(default, tuple) else default)


@pytest.mark.parametrize(
    ("name", "options", "hidden"),
    [
        ("capture", DataOptions, {"first", "completion"}),
        ("lora", DataOptions, {"first", "completion"}),
        ("eval", DataOptions, {"first", "completion"}),
        ("lora", LoadOptions, set()),
        ("transfer", TransferOptions, {"hybrid", "clip", "kept_heads"}),
        ("transfer", HybridConfig, {"kept_heads"}),  # of --keep-softmax
        ("lora", LoraOptions, {"clip"}),
    ],
)
def test_every_option_is_one_of_the_command(name: str, options: type, hidden: set[str]) -> None:
    names = {field.name for field in fields(options)}
    assert hidden < names | {""}
    assert names - hidden <= inspect.signature(getattr(lolcats, name)).parameters.keys()
