"""A teacher is what its bytes are, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import time
from pathlib import Path

import pytest

import lolcats_cli.teacher.identity as module
from lolcats_cli.errors import BadInput, IdentityMismatch
from lolcats_cli.teacher.identity import (
    CHAT_TEMPLATES,
    PARTS,
    SETTINGS,
    check,
    identify,
    read_config,
    weight_files,
)


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


def _edit(path: Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _add_a_template(folder: Path) -> None:
    (folder / CHAT_TEMPLATES).mkdir()
    (folder / CHAT_TEMPLATES / "tools.jinja").write_text("{{ tools }}")


def _change_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text + "\n")


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("configuration", _change_config),
        ("weights", _flip_weight_bit),
        ("tokenizer", _change_tokenizer),
        ("tokenizer settings", lambda folder: _edit(folder / "tokenizer_config.json", {"bos_token": "</s>"})),
        ("tokenizer settings", lambda folder: (folder / "spiece.model").write_bytes(b"x")),
        ("tokenizer settings", lambda folder: (folder / "added_tokens.json").write_text("{}")),
        ("tokenizer settings", lambda folder: (folder / "special_tokens_map.json").write_text("{}")),
        ("tokenizer settings", lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}")),
        ("tokenizer settings", _add_a_template),
    ],
)
def test_each_part_counts_and_is_named(tiny_teacher: Path, folder: Path, field: str, change) -> None:
    change(folder)
    with pytest.raises(IdentityMismatch, match=rf"captured: It differs in its {field}\. Pass the original"):
        check(identify(tiny_teacher), folder)


def test_a_large_file_is_read_once_until_it_is_touched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = folder / "model.safetensors"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "REMEMBERED_BYTES", weights.stat().st_size)
    monkeypatch.setattr(module, "_file_system", lambda file: "ext4")
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
    second = identify(folder)["weights_sha256"]
    for text in (b"half", b"z" * 64, b"A" * 64, "é".encode() * 32, b"\xff" * 64, b"0" * 63 + b"\n"):
        for entry in (tmp_path / "cache" / "lolcats" / "sha256").iterdir():
            entry.write_bytes(text)
        assert identify(folder)["weights_sha256"] == second
    monkeypatch.setenv("XDG_CACHE_HOME", str(weights))  # no folder can be made there
    assert identify(folder)["weights_sha256"] != first["weights_sha256"]


def test_a_write_through_a_mapping_is_noticed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system tells such a write by the file's times, and where nothing is remembered because it does
    not. The mapping is held open, and its page was changed before the file was hashed."""
    weights = folder / "model.safetensors"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 0)
    with weights.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[-1] ^= 1
        monkeypatch.setattr(module.time, "time", lambda: weights.stat().st_ctime + 3)
        before = identify(folder)
        time.sleep(0.02)  # more than a tick of the file system's clock
        mapping[-1] ^= 1
        assert identify(folder)["weights_sha256"] != before["weights_sha256"]


def test_on_other_file_systems_nothing_is_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(module, "_file_system", lambda file: "tmpfs")
    monkeypatch.setattr(module.time, "time", lambda: 2**33)
    identify(folder)
    assert not (tmp_path / "cache").exists()


def test_the_type_of_a_file_system() -> None:
    assert module._file_system(Path("/proc/self/stat")) == "proc"


def test_a_file_written_just_now_is_not_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 0)
    identify(folder)
    assert not (tmp_path / "cache").exists()


def test_all_differing_parts_are_named(tiny_teacher: Path, folder: Path) -> None:
    for change in (_change_config, _flip_weight_bit, _change_tokenizer, _add_a_template):
        change(folder)
    with pytest.raises(IdentityMismatch, match=f"differs in its {', '.join(PARTS.values())}\\."):
        check(identify(tiny_teacher), folder)


def test_artifacts_that_know_no_settings_of_the_tokenizer_stay_valid(tiny_teacher: Path, folder: Path) -> None:
    """Its three older fields are what they were; the settings are compared where they were recorded."""
    older = identify(tiny_teacher)
    del older[SETTINGS]
    check(older, folder)
    _edit(folder / "tokenizer_config.json", {"bos_token": "</s>"})
    check(older, folder)
    with pytest.raises(IdentityMismatch, match="tokenizer settings"):
        check(identify(tiny_teacher), folder)


def test_identities_are_those_of_the_first_version(tmp_path: Path) -> None:
    """Computed by hand, as the first version did: a changed rule would disown every artifact."""
    (tmp_path / "config.json").write_text('{"b": 1, "a": 2, "_name_or_path": "x"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "merges.txt").write_bytes(b"a b")
    digest = {name: hashlib.sha256(text).hexdigest() for name, text in (("w", b"weights"), ("t", b"{}"), ("m", b"a b"))}
    assert identify(tmp_path) == {
        "config_sha256": hashlib.sha256(b'{"a": 2, "b": 1}').hexdigest(),
        "weights_sha256": hashlib.sha256(f"model.safetensors {digest['w']}\n".encode()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(
            f"tokenizer.json {digest['t']}\nmerges.txt {digest['m']}\n".encode()
        ).hexdigest(),
        SETTINGS: hashlib.sha256(b"").hexdigest(),
    }


def _drop_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _add_an_index(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "other.safetensors"}}')


def _index(name: str):
    def change(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_an_adapter, "holds an adapter"),
        (_add_an_index, "holds two sets of weights"),
        (lambda folder: _edit(folder / "config.json", {"transformers_weights": "other.safetensors"}), "names the weig"),
        (lambda folder: _edit(folder / "config.json", {"transformers_weights": ["x"]}), "names the weights"),
        (_index("../other.safetensors"), "lists '../other.safetensors', which is not the name of"),
        (_index("/etc/passwd"), "lists '/etc/passwd'"),
        (_index("sub/../x.safetensors"), "lists"),
        (_index("x.bin"), "lists"),
        (_index("a\nb.safetensors"), "lists"),
    ],
)
def test_weights_that_would_not_be_those_that_are_loaded_are_refused(folder: Path, change, message: str) -> None:
    change(folder)
    with pytest.raises(BadInput, match=message):
        identify(folder)


def test_an_index_of_the_one_file_is_no_second_set(tiny_teacher: Path, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    assert identify(folder) == identify(tiny_teacher)


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


@pytest.mark.parametrize("text", ['{"weight_map"', '{"other": 1}', "[1]", '{"weight_map": {}}', "[" * 100_000])
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


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"\xff\xfe", b'{"eps": NaN}', b'{"a": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_broken_config_is_bad_input(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(BadInput, match=r"config\.json (is not valid JSON|does not hold a JSON object)"):
        read_config(folder)


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
        ({"n_layer": -1}, "n_layer: -1"),
        ({"text_config": {"hidden_size": 2**40}}, "hidden_size: 1099511627776"),
        ({"vocab_size": 10**400}, "vocab_size: 1000"),
    ],
)
def test_sizes_that_no_model_has(folder: Path, sizes: dict, named: str) -> None:
    _edit(folder / "config.json", sizes)
    with pytest.raises(BadInput, match=f"has {named}"):
        read_config(folder)


def test_sizes_of_other_forms_are_the_models_own_matter(folder: Path) -> None:
    _edit(folder / "config.json", {"num_key_value_heads": None, "head_dim": [1, 2], "text_config": None})
    assert read_config(folder)["head_dim"] == [1, 2]
