"""--keep-softmax: layers that stay what they are, from transfer to the merged folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lolcats_formats import Artifact, ConfigMismatch, Damaged
from lolcats_kernels import HybridConfig
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from lolcats_cli.commands.rank import rank
from lolcats_cli.errors import IdentityMismatch, Stopped, UsageError
from lolcats_cli.evaluation.evaluate import evaluate
from lolcats_cli.loading.any_model import load_any
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.importance import Importance
from lolcats_cli.stages.join import join
from lolcats_cli.stages.lora import lora
from lolcats_cli.stages.lora_options import LoraOptions
from lolcats_cli.stages.merge import merge
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.student.memory import student_bytes
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

HYBRID = HybridConfig(window=8, feature_dim=16, linear_factor="exp")
OPTIONS = TransferOptions(HYBRID, steps=2, grad_accum=2)
LORA = LoraOptions(steps=2, grad_accum=1, lr=1e-2, train_maps=True)


def stopped(*_: object, **__: object) -> None:
    raise Stopped("SIGTERM")


@pytest.fixture(scope="module")
def deep(through_all_stages: Callable[..., SimpleNamespace]) -> SimpleNamespace:
    """Three layers, of which the second is kept, through all stages."""
    return through_all_stages(OPTIONS, [1])


def test_the_choice_travels_through_every_stage(deep: SimpleNamespace) -> None:
    for name in ("transfer", "lora", "student"):
        assert Artifact.open(getattr(deep, name)).config["keep_softmax"] == [1]
    for name in ("transfer", "lora"):
        maps = [file for file in Artifact.open(getattr(deep, name)).files if file.startswith("maps/")]
        assert sorted(maps) == ["maps/layer-000.safetensors", "maps/layer-002.safetensors"]
    assert list(Artifact.open(deep.transfer).summary["layers"]) == ["0", "2"]
    assert json.loads((deep.student / "config.json").read_text())["lolcats"]["layers"] == [0, 2]
    assert "layers that stay softmax: 1" in (deep.student / "README.md").read_text()


def test_the_merged_folder_is_the_student(deep: SimpleNamespace, merged: Callable) -> None:
    model = merged(deep.student, deep.lora)
    assert [hasattr(layer.self_attn, "hybrid") for layer in model.model.layers] == [True, False, True]


def test_eval_measures_the_layers_that_were_converted(deep: SimpleNamespace) -> None:
    loaded = load_any(str(deep.student), LoadOptions(dtype="float32"))
    options = DataOptions(seq_len=48, samples=4)
    results = evaluate(loaded, str(deep.text), options=options, recall_count=0)["results"]
    assert results["both"]["relative_attention_mse"] > 0
    assert results["window"]["nats_per_token"] != results["both"]["nats_per_token"]


def test_parts_are_joined_without_the_kept_layer(deep: SimpleNamespace, tmp_path: Path) -> None:
    parts = [
        transfer(deep.capture, tmp_path / str(i), options=OPTIONS, layers=[i], keep_softmax=[1]).path for i in (0, 2)
    ]
    assert join(parts, tmp_path / "joined").id == Artifact.open(deep.transfer).id
    with pytest.raises(IdentityMismatch, match="No part has layer 1"):
        others = [transfer(deep.capture, tmp_path / f"all-{i}", options=OPTIONS, layers=[i]).path for i in (0, 2)]
        join(others, tmp_path / "other")


@pytest.mark.parametrize(
    ("kept", "layers", "message"),
    [
        ([3], None, "--keep-softmax 3 names layer 3, and the teacher has 3 layers"),
        ([0, 1, 2], None, "leaves no layer"),
        ([1], [0, 1], "Layer 1 is in --layers and in --keep-softmax"),
    ],
)
def test_what_cannot_be_kept(deep: SimpleNamespace, tmp_path: Path, kept, layers, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transfer(deep.capture, tmp_path / "t", options=OPTIONS, layers=layers, keep_softmax=kept)
    assert not (tmp_path / "t").exists()


def test_maps_of_a_layer_that_should_be_kept_are_refused(deep: SimpleNamespace, tmp_path: Path) -> None:
    from lolcats_formats import artifact_id

    forged = shutil.copytree(deep.transfer, tmp_path / "forged")
    manifest = json.loads((forged / "manifest.json").read_text())
    manifest["config"]["keep_softmax"] = [0]
    manifest["id"] = artifact_id(manifest)
    (forged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IdentityMismatch):
        merge(forged, tmp_path / "student")
    with pytest.raises(IdentityMismatch):
        load_any(str(forged), LoadOptions())


def test_layers_with_a_sliding_window(pipeline: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    """`sliding` keeps them, and automatic windows are no longer than theirs."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 16, "num_hidden_layers": 3}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    teacher = tmp_path / "teacher"
    shutil.copytree(pipeline.teacher, teacher, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=8, layer_types=kinds)).save_pretrained(teacher)
    data = DataOptions(seq_len=48, samples=6)
    captured = capture(str(teacher), str(pipeline.text), tmp_path / "capture", options=data).path
    made = transfer(captured, tmp_path / "transfer", options=OPTIONS, keep_softmax=["sliding"])
    assert (made.config["keep_softmax"], made.config["layers"]) == ([0, 2], [1])
    student = AutoModelForCausalLM.from_pretrained(merge(made.path, tmp_path / "s").path, trust_remote_code=True)
    tokens = torch.randint(3, 260, (2, 40), generator=torch.Generator().manual_seed(0))
    common = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(student.generate(tokens, **common), student.generate(tokens, use_cache=False, **common))
    sizes_seen = []
    cache = student.new_cache()
    for _ in range(3):
        student(tokens, past_key_values=cache)
        sizes_seen.append(cache.nbytes)
    assert sizes_seen[0] == sizes_seen[1] == sizes_seen[2]  # nothing grows: full attention alone was converted

    needs = Importance((8, 16), {0: (1.0, 0.5), 1: (0.1, 0.09), 2: (1.0, 0.5)}, 40)
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", lambda *_: needs)
    made = transfer(captured, tmp_path / "auto", options=OPTIONS, auto=["windows"])
    first, between, last = made.config["hybrid"]["windows"]
    assert first == last == 8 <= between  # as the teacher's attention: keys before those are none of its

    torch.manual_seed(0)
    every = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    every.save_pretrained(teacher)
    captured = capture(str(teacher), str(pipeline.text), tmp_path / "capture-2", options=data).path
    with pytest.raises(UsageError, match="leaves no layer"):
        transfer(captured, tmp_path / "transfer-2", options=OPTIONS, keep_softmax=["sliding"])


def test_auto_keeps_what_the_loss_needs(deep: SimpleNamespace, tmp_path: Path) -> None:
    found = rank(str(deep.capture))
    window = found["windows"].index(16)
    worst = sorted(range(3), key=lambda layer: -found["layers"][str(layer)][window])
    wide = replace(OPTIONS, hybrid=replace(HYBRID, window=16))
    made = transfer(deep.capture, tmp_path / "one", options=wide, keep_auto=1)
    assert made.config["keep_softmax"] == worst[:1]
    assert made.read_json("importance.json")["layers"] == found["layers"]
    two = transfer(deep.capture, tmp_path / "two", options=wide, keep_softmax=[worst[2]], keep_auto=1)
    assert two.config["keep_softmax"] == sorted([worst[2], worst[0]])  # the worst of the others


def test_a_continued_transfer_measures_nothing_again(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = transfer(deep.capture, tmp_path / "one", options=OPTIONS, auto=["windows"])
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", None)
    assert transfer(deep.capture, tmp_path / "one", options=OPTIONS, auto=["windows"]).id == made.id


@pytest.mark.parametrize("text", ['{"tokens": 1, "win', "{}", "[]", '{"layers": []}'])
def test_a_damaged_measurement_of_an_unfinished_transfer(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    asked = {"options": OPTIONS, "keep_auto": 1}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("lolcats_cli.stages.transfer.train_layers", stopped)
        transfer(deep.capture, tmp_path / "t", **asked)
    (tmp_path / "t" / "importance.json").write_text(text)
    with pytest.raises(Damaged, match=r"importance\.json has changed since it was completed\. Remove "):
        transfer(deep.capture, tmp_path / "t", **asked)


def test_other_choices_are_refused_before_the_teacher_is_loaded(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataOptions(seq_len=48, samples=10)
    tokens = capture(str(deep.teacher), str(deep.text), tmp_path / "capture", options=data, store="tokens").path
    for name, asked in (("plain", {}), ("auto", {"keep_auto": 1}), ("windows", {"auto": ["windows"]})):
        transfer(tokens, tmp_path / name, options=OPTIONS, **asked)
    monkeypatch.setattr("lolcats_cli.stages.transfer.load_captured", lambda *_: pytest.fail("loaded the teacher"))
    for name, asked, message in (
        ("plain", {"options": replace(OPTIONS, lr=1.0)}, "lr"),
        ("plain", {"keep_auto": 1}, "--keep-softmax is not given there and auto:1 here"),
        ("auto", {"keep_auto": 1, "options": replace(OPTIONS, lr=1.0)}, "lr is 0.02 there and 1.0 here"),
        ("auto", {"keep_auto": 2}, "--keep-softmax"),
        ("auto", {"keep_heads": 1}, "without measuring single key heads"),
        ("auto", {}, "--keep-softmax"),
        ("windows", {}, "windows"),
    ):
        with pytest.raises((ConfigMismatch, IdentityMismatch), match=message):
            transfer(tokens, tmp_path / name, **{"options": OPTIONS, **asked})
    assert transfer(tokens, tmp_path / "plain", options=OPTIONS).config["layers"] == [0, 1, 2]


def test_an_unfinished_transfer_without_choices_is_refused_before_they_are_measured(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped before its first maps, so that its configuration alone tells how it was made."""
    with monkeypatch.context() as patch:
        patch.setattr("lolcats_cli.stages.transfer.train_layers", stopped)
        with pytest.raises(Stopped):
            transfer(deep.capture, tmp_path / "t", options=OPTIONS)
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", lambda *_: pytest.fail("measured first"))
    for asked, message in (
        ({"keep_auto": 1}, "--keep-softmax is not given there and auto:1 here"),
        ({"keep_heads": 1}, "--keep-softmax is not given there and heads:1 here"),
        ({"auto": ["windows"]}, "--windows is not given there and auto here"),
        ({"auto": ["feature_dims"]}, "--feature-dims is not given there and auto here"),
        ({"auto": ["steps"]}, "--steps is 2 there and auto here"),
    ):
        with pytest.raises(ConfigMismatch, match=message):
            transfer(deep.capture, tmp_path / "t", options=OPTIONS, **asked)
    assert transfer(deep.capture, tmp_path / "t", options=OPTIONS).config["layers"] == [0, 1, 2]


def test_an_automatic_choice_goes_on_if_it_was_stopped_before_it_was_written(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"options": OPTIONS, "keep_heads": 1, "auto": ["feature_dims", "steps"]}
    with monkeypatch.context() as patch:
        patch.setattr("lolcats_cli.stages.transfer.Importance.to_json", stopped)
        with pytest.raises(Stopped):
            transfer(deep.capture, tmp_path / "t", **asked)
    assert not (tmp_path / "t" / "importance.json").exists()
    whole = transfer(deep.capture, tmp_path / "whole", **asked)
    assert transfer(deep.capture, tmp_path / "t", **asked).id == whole.id


def test_an_automatic_window_leaves_keys_to_learn_from(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows of 48 tokens it takes a third, though the first layer alone needs any, and 20 would fit."""
    needs = Importance((8, 16), {0: (9.0, 3.0), 1: (0.0, 0.0), 2: (0.0, 0.0)}, 40)
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", lambda *_: needs)
    made = transfer(deep.capture, tmp_path / "one", options=OPTIONS, auto=["windows"])
    assert made.config["hybrid"]["windows"][0] == 16


def test_columns_go_where_no_window_reaches(deep: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    needs = Importance((8, 16), {0: (0.1, 0.001), 1: (0.2, 0.1), 2: (0.1, 0.001)}, 40)
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", lambda *_: needs)
    options = replace(OPTIONS, hybrid=replace(HYBRID, feature_dim=7))
    made = transfer(deep.capture, tmp_path / "one", options=options, auto=["feature_dims"])
    assert made.config["hybrid"]["feature_dims"] == [4, 7, 4] and "windows" not in made.config["hybrid"]
    both = transfer(deep.capture, tmp_path / "two", options=options, auto=["feature_dims", "windows"])
    alone = transfer(deep.capture, tmp_path / "three", options=options, auto=["windows"])
    assert sum(both.config["hybrid"]["windows"]) > sum(alone.config["hybrid"]["windows"])  # with the columns' memory
    hybrids = options.hybrid.to_dict(), both.config["hybrid"]
    alike, given = (student_bytes(made.teacher["layers"], hybrid, (), 0, 4) for hybrid in hybrids)
    assert given <= alike


def test_steps_go_where_the_loss_is(deep: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    """By the loss with each layer's own window: layer 1 has none left with 16 keys."""
    needs = Importance((8, 16), {0: (0.1, 0.1), 1: (0.9, 0.0), 2: (0.3, 0.3)}, 40)
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", lambda *_: needs)
    options = replace(OPTIONS, hybrid=replace(HYBRID, window=8), steps=8, windows=(8, 16, 8))
    made = transfer(deep.capture, tmp_path / "one", options=options, auto=["steps"])
    assert made.config["steps"] == [7, 4, 13] == [made.summary["layers"][str(i)]["steps"] for i in range(3)]


def test_sizes_by_layer_travel_through_every_stage(deep: SimpleNamespace, tmp_path: Path, merged: Callable) -> None:
    windows, sizes = (4, 12, 6), (8, 2, 5)
    options = replace(OPTIONS, windows=windows, feature_dims=sizes)
    made = transfer(deep.capture, tmp_path / "transfer", options=options)
    tuned = lora(made.path, tmp_path / "lora", options=LORA)
    student = merge(tuned.path, tmp_path / "student")
    for artifact in (made, tuned, student):
        assert artifact.config["hybrid"] == {
            **HYBRID.to_dict(),
            "windows": list(windows),
            "feature_dims": list(sizes),
        }
    card = (student.path / "README.md").read_text()
    assert "window: 4 to 12, by layer" in card and "size 2 to 8, by layer" in card
    model = merged(student.path, tuned.path)
    assert [layer.self_attn.hybrid.config.window for layer in model.model.layers] == list(windows)
    cache = model.new_cache()
    model(torch.arange(3, 43)[None], past_key_values=cache)
    assert [layer.state.keys.shape[-2] for layer in cache.layers] == list(windows)
    assert [layer.state.sums.shape[-2] for layer in cache.layers] == [2 * size for size in sizes]


def test_a_long_window_is_not_trained_with(deep: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lolcats_cli.stages.transfer_options.TRAINED_WINDOW", 4)
    options = replace(OPTIONS, hybrid=replace(HYBRID, window=6), eval_steps=1)
    alike = transfer(deep.capture, tmp_path / "alike", options=options)
    longer = transfer(deep.capture, tmp_path / "longer", options=replace(options, windows=(6, 24, 6)))
    of_layer = [
        [e for e in made.metrics() if e["layer"] == 1 and e["event"] == "validation"] for made in (alike, longer)
    ]
    assert of_layer[0] == of_layer[1]  # trained alike
    figures = [made.summary["layers"]["1"] for made in (alike, longer)]
    assert figures[1]["window_mse"] < figures[0]["window_mse"]  # measured with its own window


def test_the_windows_of_parts_are_named(deep: SimpleNamespace, tmp_path: Path) -> None:
    options = replace(OPTIONS, windows=(4, 12, 6))
    whole = transfer(deep.capture, tmp_path / "whole", options=options)
    parts = [transfer(deep.capture, tmp_path / str(i), options=options, layers=[i]).path for i in range(3)]
    assert join(parts, tmp_path / "joined").id == whole.id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_auto": 3}, "leaves no layer"),
        ({"keep_auto": 2, "keep_softmax": [0]}, "leaves no layer"),
        ({"keep_auto": 1, "layers": [0]}, r"auto:N looks at all layers\. With --layers, name the layers"),
        ({"keep_auto": 1, "options": replace(OPTIONS, hybrid=replace(HYBRID, window=0))}, "--window is 0"),
        ({"auto": ["windows"], "layers": [0]}, r"--windows auto looks at all layers\."),
        (
            {"auto": ["windows"], "options": replace(OPTIONS, feature_dims=(64, 64, 64))},
            "leave no memory for --windows",
        ),
        (
            {"auto": ["windows"], "keep_auto": 1, "options": replace(OPTIONS, feature_dims=(64, 64, 1))},
            "leave no memory for --windows",
        ),
        ({"auto": ["feature_dims"], "layers": [0]}, r"--feature-dims auto looks at all layers\."),
        (
            {"auto": ["feature_dims"], "options": replace(OPTIONS, hybrid=HybridConfig("elu"))},
            "are for Hedgehog's maps",
        ),
        ({"auto": ["windows"], "options": replace(OPTIONS, hybrid=replace(HYBRID, window=0))}, "which is 0"),
        ({"auto": ["feature_dims"], "options": replace(OPTIONS, hybrid=replace(HYBRID, window=0))}, "--window is 0"),
        ({"keep_heads": 99, "teacher": "not there"}, "leaves no layer"),
        ({"auto": ["steps"], "layers": [0]}, r"--steps auto looks at all layers\."),
        ({"auto": ["steps"], "options": replace(OPTIONS, hybrid=replace(HYBRID, window=0))}, "--window is 0"),
        ({"auto": ["steps"], "options": replace(OPTIONS, windows=(4, 0, 4))}, "--windows gives layer 1 none"),
        ({"auto": ["feature_dims"], "options": replace(OPTIONS, windows=(0, 4, 4))}, "--windows gives layer 0 none"),
        ({"keep_auto": 1, "options": replace(OPTIONS, windows=(4, 4, 0))}, "--windows gives layer 2 none"),
        ({"keep_heads": 1, "options": replace(OPTIONS, windows=(4, 4, 0))}, "--windows gives layer 2 none"),
        ({"options": replace(OPTIONS, steps=(4, 4))}, "--steps gives 2 numbers, and the teacher has 3 layers"),
        ({"options": replace(OPTIONS, windows=(4, 4))}, "--windows gives 2 numbers, and the teacher has 3 layers"),
        (
            {"options": replace(OPTIONS, feature_dims=(4,))},
            "--feature-dims gives 1 number, and",
        ),
    ],
)
def test_what_cannot_be_chosen(
    deep: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict, message: str
) -> None:
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", lambda *_: pytest.fail("measured first"))
    with pytest.raises(UsageError, match=message):
        transfer(deep.capture, tmp_path / "t", **{"options": OPTIONS, **arguments})
    assert not (tmp_path / "t").exists()


def test_layers_are_chosen_by_their_own_windows(deep: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    needs = Importance((4, 16), {0: (0.5, 0.4), 1: (0.9, 0.1), 2: (0.3, 0.2)}, 40)
    monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", lambda *_: needs)
    for windows, kept in (((4, 4, 4), 1), ((4, 16, 4), 0)):
        made = transfer(
            deep.capture, tmp_path / str(kept), options=replace(OPTIONS, steps=0, windows=windows), keep_auto=1
        )
        assert made.config["keep_softmax"] == [kept]


def test_memory_that_depends_on_the_kept_layer(deep: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    """The layer with many columns leaves no memory for the others' windows, unless it is the one that keeps softmax."""
    asked = {"options": replace(OPTIONS, feature_dims=(64, 1, 1)), "keep_auto": 1, "auto": ["windows"]}
    for worst, refused in ((1, True), (0, False)):
        needs = Importance((8, 16), {layer: (0.2 + (layer == worst), 0.1) for layer in range(3)}, 40)
        monkeypatch.setattr("lolcats_cli.stages.transfer.measure_importance", lambda *_, needs=needs: needs)
        with pytest.raises(UsageError, match="leave no memory") if refused else nullcontext():
            made = transfer(deep.capture, tmp_path / "t", **asked)
    assert made.config["keep_softmax"] == [0] and min(made.config["hybrid"]["windows"][1:]) > 2
