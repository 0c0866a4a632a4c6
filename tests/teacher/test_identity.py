"""A teacher is what its bytes are, wherever it lies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import lolcats_cli.teacher.identity as module
from lolcats_cli.errors import BadInput, IdentityMismatch
from lolcats_cli.teacher.identity import FIELDS, check, identify, read_config, weight_files


@pytest.fixture
def folder(tiny_teacher: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_teacher, tmp_path / "teacher"))


def test_path_and_volatile_settings_do_not_count(tiny_teacher: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": "elsewhere", "transformers_version": "9.9.9"}
    (folder / "config.json").write_text(json.dumps(config))
    assert identify(folder) == identify(tiny_teacher)
    check(identify(tiny_teacher), folder)


def _flip_weight_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def _change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))


def _change_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + "\n")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("config_sha256", _change_config),
        ("weights_sha256", _flip_weight_bit),
        ("tokenizer_sha256", _change_tokenizer),
    ],
)
def test_each_part_counts_and_is_named(tiny_teacher: Path, folder: Path, field: str, change) -> None:
    change(folder)
    with pytest.raises(IdentityMismatch, match=rf"captured: {field} differs\. Pass the original model with --teacher"):
        check(identify(tiny_teacher), folder)


def test_a_large_file_is_read_once_until_it_is_touched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = folder / "model.safetensors"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "REMEMBERED_BYTES", weights.stat().st_size)
    monkeypatch.setattr(module.time, "time", lambda: weights.stat().st_ctime + 3)
    read, reads = module._read_digest, []
    monkeypatch.setattr(module, "_read_digest", lambda file: reads.append(file.name) or read(file))
    first = identify(folder)
    assert identify(folder) == first
    assert reads.count("model.safetensors") == 1
    times = weights.stat()
    _flip_weight_bit(folder)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # even if its time is put back
    assert identify(folder)["weights_sha256"] != first["weights_sha256"]
    assert reads.count("model.safetensors") == 2
    for entry in (tmp_path / "cache" / "lolcats" / "sha256").iterdir():
        entry.write_text("half")
    assert identify(folder)["weights_sha256"] != first["weights_sha256"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))  # no folder can be made there
    assert identify(folder)["weights_sha256"] != first["weights_sha256"]


def test_a_file_written_just_now_is_not_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 0)
    identify(folder)
    assert not (tmp_path / "cache").exists()


def test_all_differing_parts_are_named(tiny_teacher: Path, folder: Path) -> None:
    for change in (_change_config, _flip_weight_bit, _change_tokenizer):
        change(folder)
    with pytest.raises(IdentityMismatch, match=f"{', '.join(FIELDS)} differ"):
        check(identify(tiny_teacher), folder)


def test_sharded_weights_are_those_of_the_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    (folder / "a.safetensors").write_bytes(b"first")
    (folder / "unused.safetensors").write_bytes(b"never listed")
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(folder)] == ["a.safetensors", "b.safetensors"]
    before = identify(folder)
    (folder / "unused.safetensors").write_bytes(b"changed")
    assert identify(folder) == before
    (folder / "a.safetensors").write_bytes(b"second")
    assert identify(folder)["weights_sha256"] != before["weights_sha256"]
    (folder / "a.safetensors").unlink()
    with pytest.raises(BadInput, match=r"lacks the weights a\.safetensors"):
        weight_files(folder)


@pytest.mark.parametrize("text", ['{"weight_map"', '{"other": 1}', "[1]"])
def test_broken_index_is_bad_input(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BadInput, match=r"model\.safetensors\.index\.json"):
        weight_files(folder)


def test_folder_without_model_is_bad_input(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadInput, match=r"has no config\.json"):
        read_config(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="lolcats reads safetensors only"):
        identify(folder)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_broken_config_is_bad_input(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"config\.json is not valid JSON"):
        read_config(folder)
