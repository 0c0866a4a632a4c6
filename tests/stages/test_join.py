"""join: what several machines made is what one would have made, to the byte; parts that do not fit are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from lolcats_formats import Artifact, Damaged, WrongKind
from lolcats_kernels import HybridConfig

from lolcats_cli.artifacts import layout
from lolcats_cli.errors import IdentityMismatch, NotEnoughSpace, UsageError
from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.join import join
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.load import LoadOptions
from lolcats_cli.teacher.records import DataOptions

HYBRID = HybridConfig(window=8, feature_dim=16, linear_factor="exp")
OPTIONS = TransferOptions(HYBRID, steps=6, grad_accum=4, lr=2e-2, eval_steps=3)  # of `pipeline`
DATA = DataOptions(seq_len=32)


def same(found: Artifact, expected: Artifact) -> bool:
    return found.id == expected.id and all(found.read(name) == expected.read(name) for name in expected.files)


@pytest.fixture(scope="module")
def halves(pipeline: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The layers of `pipeline.transfer`, one a machine."""
    root = tmp_path_factory.mktemp("halves")
    return [transfer(pipeline.capture, root / str(i), options=OPTIONS, layers=[i]).path for i in range(2)]


def test_layers_trained_apart_are_the_transfer_of_one_machine(
    pipeline: SimpleNamespace, halves: list[Path], tmp_path: Path
) -> None:
    whole = Artifact.open(pipeline.transfer)
    joined = join(halves[::-1], tmp_path / "maps")
    assert same(joined, whole)
    joined.verify()
    assert join(halves, tmp_path / "maps").id == whole.id  # finished already


def test_missing_and_doubled_layers(halves: list[Path], tmp_path: Path) -> None:
    again = shutil.copytree(halves[0], tmp_path / "again")
    with pytest.raises(IdentityMismatch, match=r"Layer 0 is in .* and in "):
        join([*halves, again], tmp_path / "maps")
    with pytest.raises(IdentityMismatch, match="No part has layer 1"):
        part = shutil.copytree(halves[0], tmp_path / "part")
        manifest = json.loads((part / "manifest.json").read_text())
        manifest["config"]["layers"] = []
        from lolcats_formats import artifact_id

        manifest["id"] = artifact_id(manifest)
        (part / "manifest.json").write_text(json.dumps(manifest))
        join([halves[0], part], tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


def test_parts_of_other_settings_or_another_capture_are_named(
    pipeline: SimpleNamespace, halves: list[Path], tmp_path: Path, new_teacher
) -> None:
    seeded = transfer(pipeline.capture, tmp_path / "seeded", options=replace(OPTIONS, seed=1), layers=[1])
    with pytest.raises(IdentityMismatch, match=r"differ in --seed\. Make"):
        join([halves[0], seeded.path], tmp_path / "maps")
    teacher = new_teacher(tmp_path / "teacher", seed=5)
    other = capture(str(teacher), str(pipeline.text), tmp_path / "c", options=DataOptions(seq_len=64, samples=20))
    moved = transfer(other.path, tmp_path / "moved", options=OPTIONS, layers=[1])
    with pytest.raises(IdentityMismatch, match="differ in the artifact that it is made from, the teacher's weights"):
        join([halves[0], moved.path], tmp_path / "maps")


def test_kinds_are_not_mixed(pipeline: SimpleNamespace, halves: list[Path], tmp_path: Path) -> None:
    for parts in ([halves[0]], [halves[0], pipeline.capture]):
        with pytest.raises(UsageError, match="two or more parts of one kind"):
            join(parts, tmp_path / "x")
    with pytest.raises(WrongKind):
        join([pipeline.lora, pipeline.lora], tmp_path / "x")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranges", [[(0, 7), (8, 19)], [(0, 4), (5, 11), (12, 19)]])
def test_rows_captured_apart_are_the_capture_of_one_machine(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, ranges: list
) -> None:
    load = LoadOptions(dtype=dtype)
    monkeypatch.setattr(layout, "SHARD_BYTES", 3 * 32 * 8 * 16 * 4)

    def run(name: str, first: int, samples: int) -> Artifact:
        options = replace(DATA, first=first, samples=samples)
        return capture(str(pipeline.teacher), str(pipeline.text), tmp_path / name, options=options, load=load)

    whole = run("whole", 0, 20)
    parts = [run(f"{a}-{b}", a, b - a + 1).path for a, b in ranges]
    joined = join(parts[::-1], tmp_path / "joined")
    assert same(joined, whole)
    joined.verify()
    assert run("joined", 0, 20).id == whole.id  # and the whole command finds it finished


def test_padded_rows(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    words = pipeline.text.read_text().split()
    texts = [" ".join(words[i : i + 2 + i % 5]) for i in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def run(name: str, first: int, samples: int) -> Artifact:
        options = DataOptions(seq_len=32, pack=False, first=first, samples=samples)
        return capture(str(pipeline.teacher), str(data), tmp_path / name, options=options)

    joined = join([run("a", 0, 5).path, run("b", 5, 7).path], tmp_path / "joined")
    assert same(joined, run("whole", 0, 12))


def test_rows_missing_doubled_or_without_room(
    pipeline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(first: int, samples: int) -> Path:
        options = replace(DATA, first=first, samples=samples)
        return capture(str(pipeline.teacher), str(pipeline.text), tmp_path / f"{first}+{samples}", options=options).path

    first, next_, late = run(0, 4), run(3, 4), run(6, 4)
    with pytest.raises(IdentityMismatch, match=r"Rows 3 to 3 are in .* and in "):
        join([first, next_], tmp_path / "x")
    with pytest.raises(IdentityMismatch, match="Rows 4 to 5 are missing"):
        join([first, late], tmp_path / "x")
    assert not (tmp_path / "x").exists()
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 100))
    with pytest.raises(NotEnoughSpace):
        join([first, run_after(pipeline, tmp_path)], tmp_path / "x")
    assert not (tmp_path / "x" / "manifest.json").exists()


def run_after(pipeline: SimpleNamespace, tmp_path: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        usage = type(shutil.disk_usage("/"))
        patch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12, 10**12))
        options = replace(DATA, first=4, samples=4)
        return capture(str(pipeline.teacher), str(pipeline.text), tmp_path / "after", options=options).path


def test_a_damaged_part_is_not_joined(halves: list[Path], tmp_path: Path) -> None:
    part = shutil.copytree(halves[1], tmp_path / "part")
    file = part / "maps" / "layer-001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged):
        join([halves[0], part], tmp_path / "maps")
    assert not (tmp_path / "maps" / "manifest.json").exists()
