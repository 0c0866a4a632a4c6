"""--keep-softmax with single key heads: from transfer to the merged folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, artifact_id
from lolcats_kernels import HybridConfig

from lolcats_cli.artifacts.describe import describe
from lolcats_cli.commands.rank import rank
from lolcats_cli.errors import BadInput, IdentityMismatch, Stopped, UsageError
from lolcats_cli.evaluation.evaluate import evaluate
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.reporting.page import page
from lolcats_cli.stages import layer_training
from lolcats_cli.stages.activations import MappedHeads, StoredActivations
from lolcats_cli.stages.importance import Importance
from lolcats_cli.stages.join import join
from lolcats_cli.stages.merge import merge
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.student.memory import student_bytes
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

HYBRID = HybridConfig(window=16, feature_dim=16, linear_factor="exp")
OPTIONS = TransferOptions(HYBRID, steps=2, grad_accum=2)


@pytest.fixture(scope="module")
def deep(through_all_stages: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    """Three layers of two key heads, of which the second head of the first layer is kept, through all stages."""
    return through_all_stages(OPTIONS, [(0, 1)])


def test_the_choice_travels_through_every_stage(deep: SimpleNamespace) -> None:
    opened = {name: Artifact.open(getattr(deep, name)) for name in ("transfer", "lora", "student")}
    for artifact in opened.values():
        assert artifact.config["hybrid"] == {**HYBRID.to_dict(), "kept_heads": {"0": [1]}}
        assert "keep_softmax" not in artifact.config
        assert [layer["kept_heads"] for layer in describe(artifact)["layers"]] == [[1], [], []]
        assert "kept_heads" in page(artifact)
    for name in ("transfer", "lora"):
        shapes = [opened[name].header(f"maps/layer-00{i}.safetensors")["q_weight"].shape for i in range(3)]
        assert [tuple(shape) for shape in shapes] == [(2, 16, 16), (4, 16, 16), (4, 16, 16)]
    errors = opened["transfer"].summary["layers"]["0"]["head_relative_mse"]
    assert errors[2:] == [0, 0] and min(errors[:2]) > 0
    assert json.loads((deep.student / "config.json").read_text())["lolcats"] == {
        "hybrid": {**HYBRID.to_dict(), "kept_heads": {"0": [1]}},
        "layers": [0, 1, 2],
        "num_heads": [2, 4, 4],
        "head_dim": 16,
    }
    assert "- key heads that stay softmax, as layer.head: 0.1\n" in (deep.student / "README.md").read_text()


def test_the_merged_folder_is_the_student(deep: SimpleNamespace, merged: Callable) -> None:
    cache = merged(deep.student, deep.lora)(torch.arange(3, 43)[None], use_cache=True).past_key_values
    artifact = Artifact.open(deep.student)
    held = student_bytes(artifact.teacher["layers"], artifact.config["hybrid"], (), 40, 4)
    assert cache.nbytes == held + 40  # a byte for each of the kept keys says whether it is padding


def test_a_kept_head_has_no_error(deep: SimpleNamespace, tmp_path: Path) -> None:
    """The error of a layer after transfer is that of its other heads, and `eval` counts all of them."""
    options = DataOptions(seq_len=48, samples=4)
    one = transfer(deep.capture, tmp_path / "one", options=replace(OPTIONS, steps=0), keep_softmax=[(0, 1), 1, 2])
    none = transfer(deep.capture, tmp_path / "none", options=replace(OPTIONS, steps=0), keep_softmax=[1, 2])
    found = [made.summary["layers"]["0"]["head_relative_mse"] for made in (one, none)]
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-4)
    errors = [
        evaluate(load_any(str(made.path), LoadOptions()), str(deep.text), options=options, recall_count=0)["results"]
        for made in (one, none)
    ]
    assert 0 < errors[0]["both"]["attention_mse"] < errors[1]["both"]["attention_mse"]


def test_maps_are_trained_on_the_other_heads_alone(deep: SimpleNamespace, tmp_path: Path) -> None:
    whole = StoredActivations(Artifact.open(deep.capture))
    others = MappedHeads(whole, [(0, 1)])
    assert [(info.num_heads, info.num_key_value_heads) for info in others.layers] == [(2, 1), (4, 2), (4, 2)]
    for layer, heads in ((0, 2), (1, 4)):
        wanted, given = (next(x.batches([layer], "train", 2))[layer] for x in (whole, others))
        assert torch.equal(given.q, wanted.q[:, :heads])
        assert torch.equal(given.k, wanted.k[:, : heads // 2]) and torch.equal(given.v, wanted.v[:, : heads // 2])
    plain = transfer(deep.capture, tmp_path / "plain", options=OPTIONS)
    kept = Artifact.open(deep.transfer)
    for layer in (1, 2):  # nothing of another layer's choice reaches them
        assert kept.summary["layers"][str(layer)] == plain.summary["layers"][str(layer)]
        name = f"maps/layer-00{layer}.safetensors"
        assert (kept.path / name).read_bytes() == (plain.path / name).read_bytes()


def test_it_resumes_and_its_parts_are_joined(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        accumulate, done = layer_training.accumulate, []

        def stops(*args: object) -> None:
            done.append(1)
            if len(done) == 2:
                raise Stopped("SIGKILL")
            accumulate(*args)

        patch.setattr(layer_training, "accumulate", stops)
        patch.setattr("lolcats_cli.stages.checkpoints.Checkpoints.due", lambda _: True)
        with pytest.raises(Stopped):
            transfer(deep.capture, tmp_path / "t", options=OPTIONS, keep_softmax=[(0, 1)])
    whole = Artifact.open(deep.transfer)
    assert transfer(deep.capture, tmp_path / "t", options=OPTIONS, keep_softmax=[(0, 1)]).id == whole.id
    parts = [
        transfer(deep.capture, tmp_path / str(i), options=OPTIONS, layers=layers, keep_softmax=[(0, 1)]).path
        for i, layers in enumerate(([0], [1, 2]))
    ]
    assert join(parts, tmp_path / "joined").id == whole.id
    other = transfer(deep.capture, tmp_path / "other", options=OPTIONS, layers=[0], keep_softmax=[(0, 0)]).path
    with pytest.raises(IdentityMismatch, match="differ in --keep-softmax"):
        join([other, parts[1]], tmp_path / "wrong")


def test_heads_that_the_loss_needs_are_kept(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rank(str(deep.capture), heads=True)
    losses = {(int(layer), head): x for layer, several in found["heads"].items() for head, x in enumerate(several)}
    worst = sorted(losses, key=lambda one: -losses[one])
    made = transfer(deep.capture, tmp_path / "one", options=OPTIONS, keep_heads=1)
    assert made.config["hybrid"]["kept_heads"] == {str(worst[0][0]): [worst[0][1]]}
    assert made.read_json("importance.json")["heads"] == found["heads"]
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", None)
    assert transfer(deep.capture, tmp_path / "one", options=OPTIONS, keep_heads=1).id == made.id
    monkeypatch.undo()

    layer = worst[0][0]
    beside = [(layer, 1 - worst[0][1])]
    whole = transfer(deep.capture, tmp_path / "two", options=OPTIONS, keep_heads=1, keep_softmax=beside)
    assert whole.config["keep_softmax"] == [layer] and "kept_heads" not in whole.config["hybrid"]


@pytest.mark.parametrize(
    ("how", "kept", "longer"),
    [
        ({"keep_softmax": [(0, 1)]}, 1, False),
        ({"keep_softmax": [(0, 0)]}, 0, True),
        ({"keep_heads": 1}, 1, False),
    ],
)
def test_windows_go_by_what_the_other_heads_lose_and_take(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict, kept: int, longer: bool
) -> None:
    """All layers lose the same, of which head 1 of the first one has most. The other takes half of a key's bytes."""
    heads = {0: (0.02, 0.18), 1: (0.1, 0.1), 2: (0.1, 0.1)}
    needs, asked = Importance((8, 16), dict.fromkeys(range(3), (0.2, 0.1)), 40, 8, heads), []
    monkeypatch.setattr(
        "lolcats_cli.stages.transfer.measure_importance", lambda *given: asked.append(given[-1]) or needs
    )
    options = replace(OPTIONS, hybrid=replace(HYBRID, window=8), steps=0)
    made = transfer(deep.capture, tmp_path / "t", options=options, auto=["windows"], **how)
    hybrid, layers = made.config["hybrid"], made.teacher["layers"]
    assert hybrid["kept_heads"] == {"0": [kept]}
    first, *others = hybrid["windows"]
    assert (first > max(others)) if longer else (first < min(others))
    alike = {**options.hybrid.to_dict(), "kept_heads": hybrid["kept_heads"]}
    assert student_bytes(layers, hybrid, (), 0, 4) <= student_bytes(layers, alike, (), 0, 4)
    assert transfer(deep.capture, tmp_path / "t", options=options, auto=["windows"], **how).id == made.id
    assert asked == [8]  # once, single heads too


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_softmax": [(3, 0)]}, r"--keep-softmax 3\.0 names layer 3, and the teacher has 3 layers"),
        ({"keep_softmax": [(1, 2)]}, r"--keep-softmax 1\.2 names key head 2 of layer 1, which has 2 key heads"),
        ({"keep_softmax": [0, (1, 0), (1, 1), 2]}, "leaves no layer"),
        ({"keep_softmax": [(1, 0), (1, 1)], "layers": [1]}, "Layer 1 is in --layers and in --keep-softmax"),
        ({"keep_heads": 6}, "leaves no layer"),
        ({"keep_heads": 1, "layers": [0]}, r"heads:N looks at all layers\. With --layers, name the heads"),
        ({"keep_heads": 1, "options": replace(OPTIONS, hybrid=replace(HYBRID, window=0))}, "--window is 0"),
    ],
)
def test_what_cannot_be_kept(deep: SimpleNamespace, tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transfer(deep.capture, tmp_path / "t", **{"options": OPTIONS, **arguments})
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        ({"0": [1, 0]}, BadInput, r"does not describe .*in order, each once"),
        ({"0": [2]}, IdentityMismatch, "layer 0: The kept heads .2. must be some of 2 key heads"),
        ({"1": [1]}, IdentityMismatch, "this model and options need|The teacher and options need"),
    ],
)
def test_forged_heads_are_refused(deep: SimpleNamespace, tmp_path: Path, kept: dict, error: type, message: str) -> None:
    forged = shutil.copytree(deep.transfer, tmp_path / "forged")
    manifest = json.loads((forged / "manifest.json").read_text())
    manifest["config"]["hybrid"]["kept_heads"] = kept
    manifest["id"] = artifact_id(manifest)
    (forged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(error, match=message):
        merge(forged, tmp_path / "student")
    with pytest.raises(error, match=message):
        load_any(str(forged), LoadOptions())
