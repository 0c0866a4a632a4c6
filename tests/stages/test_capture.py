"""capture: what it stores is what the teacher saw; it is bounded, resumable, and refuses before it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lolcats_formats import Artifact, ConfigMismatch, Damaged, NotAnArtifact
from lolcats_kernels.softmax import softmax_attention
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lolcats_cli import stopping
from lolcats_cli.artifacts import layout
from lolcats_cli.errors import BadInput, NotEnoughSpace, Stopped
from lolcats_cli.progress import Progress
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.checkpoints import Checkpoints
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.record import LayerInfo
from lolcats_cli.teacher.records import DataOptions

OPTIONS = DataOptions(seq_len=32, samples=14)
ROW_BYTES = 32 * (4 + 2 * 2) * 16 * 4  # of one layer: T · (H + 2K) · D · fp32


def attention_outputs(folder: Path, ids: Tensor) -> list[Tensor]:
    """What enters every layer's output projection in the teacher's own eager attention, [N, T, H·D]."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids.long())
    return seen


def stored(artifact: Artifact, layer: int, split: str) -> dict[str, Tensor]:
    shards = [artifact.load(n) for n in sorted(artifact.files) if n.startswith(f"layers/{layer:03d}/{split}-")]
    return {name: torch.cat([shard[name] for shard in shards]) for name in "qkv"}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


@pytest.mark.parametrize("split", ["train", "validation"])
def test_stored_activations_give_the_teachers_attention_outputs(pipeline: SimpleNamespace, split: str) -> None:
    artifact = Artifact.open(pipeline.capture, "capture")
    ids = artifact.load(f"tokens/{split}.safetensors")["input_ids"]
    for layer, expected in enumerate(attention_outputs(pipeline.teacher, ids)):
        spec = LayerInfo.from_dict(artifact.teacher["layers"][layer]).spec
        found = stored(artifact, layer, split)
        assert found["q"].shape == (len(ids), 4, 64, 16)
        assert found["k"].shape == found["v"].shape == (len(ids), 2, 64, 16)
        out = softmax_attention(found["q"], found["k"], found["v"], spec).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_manifest_says_whose_and_what(pipeline: SimpleNamespace) -> None:
    artifact = Artifact.open(pipeline.capture, "capture")
    assert artifact.data["rows"] == {"train": 19, "validation": 1}
    assert artifact.data["tokens"] == {"train": 19 * 64, "validation": 64}
    assert artifact.teacher["architecture"] == "LlamaForCausalLM"
    assert artifact.config["seed"] == 0
    payload = sum(
        info.nbytes for name in artifact.files if name.startswith("layers/") for info in artifact.header(name).values()
    )
    assert artifact.summary["bytes"] == payload


def test_dtype_of_the_model_is_the_dtype_stored(tiny_teacher: Path, tiny_text: Path, tmp_path: Path) -> None:
    artifact = capture(
        str(tiny_teacher), str(tiny_text), tmp_path / "c", options=OPTIONS, load=LoadOptions(dtype="bfloat16")
    )
    assert {tensor.dtype for tensor in stored(artifact, 0, "train").values()} == {torch.bfloat16}
    assert artifact.config["dtype"] == "bfloat16"


def test_shards_are_bounded_and_hold_the_same_rows(
    tiny_teacher: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = capture(str(tiny_teacher), str(tiny_text), tmp_path / "whole", options=OPTIONS)
    monkeypatch.setattr(layout, "SHARD_BYTES", 3 * ROW_BYTES + 1)
    parts = capture(str(tiny_teacher), str(tiny_text), tmp_path / "parts", options=OPTIONS)
    names = [name for name in parts.files if name.startswith("layers/000/train-")]
    assert len(names) == 5  # 13 rows, 3 a shard
    for name in parts.files:
        if name.startswith("layers/"):
            assert sum(info.nbytes for info in parts.header(name).values()) <= 3 * ROW_BYTES
    for layer in range(2):
        for name, tensor in stored(parts, layer, "train").items():
            torch.testing.assert_close(tensor, stored(whole, layer, "train")[name], rtol=1e-5, atol=1e-6)


def stopped() -> None:
    raise Stopped("SIGTERM")


class StopAfter(Progress):
    """Raises `Stopped`, as a second signal would, in the group after the first `groups`."""

    def __init__(self, groups: int) -> None:
        self.left = groups + 2  # the first call says what was there before

    def task(self, name: str, total: int, unit: str = "it") -> Any:
        from contextlib import contextmanager

        @contextmanager
        def steps() -> Iterator[Any]:
            def advance(done: int = 1, **figures: float) -> None:
                self.left -= 1
                if self.left == 0:
                    raise Stopped("SIGTERM")

            yield advance

        return steps()


@pytest.mark.parametrize("groups", [1, 5])
def test_resumed_is_the_same_to_the_byte(
    tiny_teacher: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 3 * ROW_BYTES)
    arguments = (str(tiny_teacher), str(tiny_text))
    whole = capture(*arguments, tmp_path / "whole", options=OPTIONS)
    with pytest.raises(Stopped):
        capture(*arguments, tmp_path / "parts", options=OPTIONS, progress=StopAfter(groups))
    with pytest.raises(NotAnArtifact, match="is not finished"):
        Artifact.open(tmp_path / "parts")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.safetensors")}
    assert len([path for path in kept if "layers" in path.parts]) == 2 * groups
    parts = capture(*arguments, tmp_path / "parts", options=OPTIONS)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not made again
    assert parts.id == whole.id
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    parts.verify()


def test_a_checkpoint_is_due_as_soon_as_the_run_is_resumed(
    tiny_teacher: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal asks for, or a block of weights that took long to load."""
    monkeypatch.setattr(Checkpoints, "due", lambda _: True)
    arguments, place = (str(tiny_teacher), str(tiny_text)), tmp_path / "parts"
    with pytest.raises(Stopped):
        capture(*arguments, place, options=OPTIONS, batch_size=2, progress=StopAfter(2))
    (saved,) = (place / "scratch").iterdir()
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(stopping, "check", stopped)
        capture(*arguments, place, options=OPTIONS, batch_size=2)
    assert list((place / "scratch").iterdir()) == [saved]
    whole = capture(*arguments, tmp_path / "whole", options=OPTIONS, batch_size=2)
    assert capture(*arguments, place, options=OPTIONS, batch_size=2).id == whole.id


def test_finished_is_returned_without_loading_the_teacher(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_teacher
) -> None:
    other = new_teacher(tmp_path / "other", seed=1)
    for name in ("load_model", "check_mergeable"):
        monkeypatch.setattr(f"lolcats_cli.stages.capture.{name}", lambda *_: pytest.fail("loaded the teacher"))
    before = contents(pipeline.capture)
    options = DataOptions(seq_len=64, samples=20)
    for store in ("attention", "auto"):
        again = capture(str(pipeline.teacher), str(pipeline.text), pipeline.capture, options=options, store=store)
        assert again.id == Artifact.open(pipeline.capture).id
    for teacher, asked, fields in (
        (pipeline.teacher, {"load": LoadOptions(dtype="bfloat16")}, ["config.dtype"]),
        (pipeline.teacher, {"store": "tokens"}, ["config.batch_size", "config.store"]),
        (other, {}, ["teacher.weights_sha256"]),
    ):
        with pytest.raises(ConfigMismatch) as caught:
            capture(str(teacher), str(pipeline.text), pipeline.capture, options=options, **asked)
        assert sorted(caught.value.fields) == fields
    assert contents(pipeline.capture) == before


def test_other_settings_in_the_same_place_are_named(pipeline: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(pipeline.capture)
    monkeypatch.setattr("lolcats_cli.stages.capture.load_model", lambda *_: pytest.fail("loaded the teacher"))
    with pytest.raises(ConfigMismatch) as caught:
        capture(
            str(pipeline.teacher), str(pipeline.text), pipeline.capture, options=DataOptions(seq_len=32, samples=20)
        )
    assert "config.data.seq_len" in caught.value.fields
    assert contents(pipeline.capture) == before


def test_other_data_of_the_same_size_is_not_mixed_in(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 3 * ROW_BYTES)
    data = tmp_path / "data.txt"
    data.write_text("a whale at sea. " * 40)
    with pytest.raises(Stopped):
        capture(str(tiny_teacher), str(data), tmp_path / "c", options=OPTIONS, progress=StopAfter(1))
    data.write_text("one ship, home. " * 40)
    with pytest.raises(ConfigMismatch) as caught:
        capture(str(tiny_teacher), str(data), tmp_path / "c", options=OPTIONS)
    assert "data.tokens_sha256.train" in caught.value.fields


def test_no_space_is_said_before_anything_is_written(
    tiny_teacher: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 14 * ROW_BYTES * 2
    free = {"bytes": needed - 1}
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, free["bytes"]))
    with pytest.raises(NotEnoughSpace, match=r"needs 459 kB, and its disk has 459 kB free.*--samples"):
        capture(str(tiny_teacher), str(tiny_text), tmp_path / "c", options=OPTIONS)
    assert not list(tmp_path.iterdir())
    # So the advice can be followed, in the same place.
    capture(str(tiny_teacher), str(tiny_text), tmp_path / "c", options=DataOptions(seq_len=32, samples=13))


def test_no_space_to_resume(
    tiny_teacher: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "SHARD_BYTES", 3 * ROW_BYTES)
    with pytest.raises(Stopped):
        capture(str(tiny_teacher), str(tiny_text), tmp_path / "c", options=OPTIONS, progress=StopAfter(2))
    left = (14 - 6) * ROW_BYTES * 2
    usage = type(shutil.disk_usage("/"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, left - 1))
        with pytest.raises(NotEnoughSpace):
            capture(str(tiny_teacher), str(tiny_text), tmp_path / "c", options=OPTIONS)
        assert not (tmp_path / "c" / "manifest.json").exists()
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, left))
        capture(str(tiny_teacher), str(tiny_text), tmp_path / "c", options=OPTIONS).verify()


def test_longrope_is_captured_with_its_short_factors(new_teacher, tiny_text: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    teacher = new_teacher(
        tmp_path / "teacher", rope_parameters=rope | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    )
    with pytest.raises(BadInput, match=r"--seq-len 33 is over 32\. .*longrope"):
        capture(str(teacher), str(tiny_text), tmp_path / "c", options=DataOptions(seq_len=33))
    assert not (tmp_path / "c").exists()
    assert capture(str(teacher), str(tiny_text), tmp_path / "c", options=DataOptions(seq_len=32, samples=4))


def test_seq_len_over_the_models_limit(tiny_teacher: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--seq-len 129 is over the 128 tokens"):
        capture(str(tiny_teacher), str(tiny_text), tmp_path / "c", options=DataOptions(seq_len=129))
    assert not (tmp_path / "c").exists()


def test_padded_rows_are_what_each_document_gives_alone(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a whale at sea", "one ship", "two men sang of home and the sea", "sail"]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    artifact = capture(
        str(tiny_teacher), str(data), tmp_path / "c", options=DataOptions(seq_len=24, pack=False), batch_size=3
    )
    tokens = artifact.load("tokens/train.safetensors")
    assert artifact.data["tokens"]["train"] == int(tokens["valid"].sum())
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    decoded = [
        tokenizer.decode(row[keep], skip_special_tokens=True)
        for row, keep in zip(tokens["input_ids"], tokens["valid"], strict=True)
    ]
    assert set(decoded) <= {text[:24] for text in texts}
    for row, keep in enumerate(tokens["valid"]):
        ids = tokens["input_ids"][row, keep][None]
        for layer, expected in enumerate(attention_outputs(tiny_teacher, ids)):
            spec = LayerInfo.from_dict(artifact.teacher["layers"][layer]).spec
            q, k, v = (stored(artifact, layer, "train")[name][row : row + 1, :, keep] for name in "qkv")
            out = softmax_attention(q, k, v, spec).transpose(1, 2).flatten(2)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("missing/folder/here", "is not a folder"),
        ("./missing", "is not a folder"),
        ("org/not-there", "is not a local folder, and it could not be fetched"),
    ],
)
def test_missing_teacher(tiny_text: Path, tmp_path: Path, teacher: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        capture(teacher, str(tiny_text), tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_teacher_with_cut_or_missing_weights(tiny_teacher: Path, tiny_text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(Damaged, match="is truncated"):
        capture(str(folder), str(tiny_text), tmp_path / "c", options=OPTIONS)
    weights.write_bytes(data)
    tensors = load_file(weights)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(
        BadInput, match=r"be folded into model\.layers\.1\.self_attn\.q_proj\.weight: the files in .* lack it"
    ):
        capture(str(folder), str(tiny_text), tmp_path / "c", options=OPTIONS)
    assert not (tmp_path / "c").exists()
