"""--device-map: weights on the CPU and on the disk compute what weights in memory do, where a stage can take them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact
from lolcats_kernels.hf_student import execution_device

from lolcats_cli.errors import UsageError
from lolcats_cli.evaluation.evaluate import evaluate
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.loading.student import load_student
from lolcats_cli.stages.lora import lora
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.student.build import hybrid_modules
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

WHOLE = LoadOptions(device="cpu")
LAYERS = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
SPREAD = replace(WHOLE, device_map={**LAYERS, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("name", ["teacher", "transfer", "student"])
def test_eval_is_the_same(pipeline: SimpleNamespace, name: str) -> None:
    figures = []
    for load in (WHOLE, SPREAD):
        loaded = load_any(str(getattr(pipeline, name)), load)
        assert any(p.device.type == "meta" for p in loaded.model.parameters()) == (load is SPREAD)
        options = DataOptions(seq_len=64, samples=4)
        figures.append(evaluate(loaded, str(pipeline.text), options=options, recall_count=0)["results"])
    assert figures[1] == figures[0]


def test_maps_compute_where_their_layer_does(pipeline: SimpleNamespace) -> None:
    student = load_student(Artifact.open(pipeline.transfer), pipeline.teacher, SPREAD)
    assert {parameter.device.type for parameter in student.model.layers[1].self_attn.q_proj.parameters()} == {"meta"}
    assert [hybrid.q_weight.device.type for hybrid in hybrid_modules(student)] == ["cpu", "cpu"]
    elsewhere = torch.nn.Linear(2, 2)
    elsewhere._hf_hook = SimpleNamespace(execution_device="meta")  # type: ignore[assignment]  # as accelerate's
    assert execution_device(torch.nn.Sequential(elsewhere)) == torch.device("meta")
    assert execution_device(torch.nn.Linear(2, 2)) == torch.device("cpu")


def test_what_changes_weights_takes_none_that_are_fetched(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"--device-map keeps model\.embed_tokens.*weights must stay there in a training"
    ):
        lora(pipeline.transfer, tmp_path / "l", options=LoraOptions(steps=1), load=SPREAD)
    assert not (tmp_path / "l").exists()
    with pytest.raises(UsageError, match="Merge it"):
        load_any(str(pipeline.lora), SPREAD)


def test_lora_under_a_map_that_keeps_all_in_memory(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    options = LoraOptions(train_maps=False, steps=6, grad_accum=2, eval_steps=3, lr=1e-2)
    trained = lora(pipeline.transfer, tmp_path / "l", options=options, load=replace(WHOLE, device_map="auto"))
    assert trained.id == Artifact.open(pipeline.lora).id


def test_one_device_or_all(pipeline: SimpleNamespace) -> None:
    with pytest.raises(UsageError, match="--device cuda:1 "):
        load_any(str(pipeline.teacher), LoadOptions(device="cuda:1", device_map="auto"))
