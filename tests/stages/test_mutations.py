"""Damaged and forged artifacts end in an error of ours or in success, with every reader; verify finds all damage."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lolcats_formats import Artifact

from lolcats_cli.artifacts.maps import maps_file
from lolcats_cli.errors import BadInput
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.stages.merge import merge
from lolcats_cli.teacher.load import LoadOptions

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability" / "mutations.py"
COUNT = 880


@pytest.fixture(scope="module")
def mutations() -> Any:
    """benchmarks/reliability/mutations.py, which is no package."""
    spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_mutation_ends_wrong(pipeline: SimpleNamespace, mutations: Any, tmp_path: Path) -> None:
    artifacts = [pipeline.capture, pipeline.transfer, pipeline.lora, pipeline.student]
    results = mutations.run(artifacts, COUNT, 0, tmp_path)
    assert not (tmp_path / "wrong").exists(), (tmp_path / "wrong").read_text()
    assert sum(counter["tried"] for counter in results.values()) == COUNT
    for mutation in mutations.DAMAGE:
        counter = results[mutation.__name__.replace("_", " ")]
        assert counter["found"] == counter["tried"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_maps_that_are_no_numbers_are_not_used(
    pipeline: SimpleNamespace, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Artifact.load

    def spoiled(self, name, names=None):
        tensors = load(self, name, names)
        if name == maps_file(1):
            tensors = {key: tensor.clone() for key, tensor in tensors.items()}
            next(iter(tensors.values())).view(-1)[0] = value
        return tensors

    monkeypatch.setattr(Artifact, "load", spoiled)
    with pytest.raises(BadInput, match=r"layer-001\.safetensors: \w+ holds NaN or infinity"):
        load_any(str(pipeline.transfer), LoadOptions(device="cpu"))
    with pytest.raises(BadInput, match=r"layer-001\.safetensors: \w+ holds NaN or infinity"):
        merge(pipeline.lora, tmp_path / "student")
    assert not (tmp_path / "student" / "manifest.json").exists()
