"""Writing: resumable at every moment, finished only by the manifest, the same bytes in the end."""

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import lolcats_formats
import pytest
import safetensors.torch
import torch
from lolcats_formats import (
    Artifact,
    ConfigMismatch,
    Damaged,
    FormatError,
    Locked,
    NotAnArtifact,
    Unfinished,
    atomic,
    check_config,
)

FOLDER = str(Path(lolcats_formats.__file__).parents[1])


def content(path: Path) -> dict[str, bytes]:
    """All files of a directory by name; of the manifest, all but what may differ between two runs."""
    files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    manifest = json.loads(files["manifest.json"])
    del manifest["created"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


def test_a_finished_directory_holds_nothing_else(artifact, kit):
    assert set(content(artifact.path)) == {*kit.LAYERS, "manifest.json", "metrics.jsonl"}


def test_same_inputs_same_bytes(artifact, create, kit, tmp_path):
    with create(tmp_path / "b", tool="test 2", teacher=kit.TEACHER | {"path": "/somewhere/teacher"}) as writer:
        again = kit.write_layers(writer)
    assert again.id == artifact.id
    assert content(again.path) == content(artifact.path)


def test_the_id_covers_settings_inputs_and_results_but_no_path(artifact, create, kit, tmp_path):
    ids = {artifact.id}
    changes = [
        {"config": kit.CONFIG | {"seed": 1}},
        {"teacher": kit.TEACHER | {"weights_sha256": "1" * 64}},
        {"data": {"tokens": 101}},
        {"parents": [artifact]},
        {"kind": "lora"},
    ]
    for i, change in enumerate(changes):
        with create(tmp_path / str(i), **change) as writer:
            ids.add(kit.write_layers(writer).id)
    assert len(ids) == 6
    with create(tmp_path / "moved", teacher=kit.TEACHER | {"path": "/elsewhere"}) as writer:
        assert kit.write_layers(writer).id == artifact.id


def test_an_exception_leaves_an_unfinished_directory_that_is_continued(artifact, create, kit, tmp_path):
    path = tmp_path / "b"
    for done in range(3):
        with pytest.raises(KeyboardInterrupt), create(path) as writer:
            assert [writer.has(name) for name in kit.LAYERS] == [i < done for i in range(3)]
            writer.log(layer=done, loss=1 / (done + 1))
            writer.save(kit.LAYERS[done], kit.layer_tensors(done))
            writer.log(layer=done + 1, loss="of the unit that is lost")
            raise KeyboardInterrupt
        with pytest.raises(Unfinished, match=r"not finished\. Run the same command \(`lolcats transfer`\) again"):
            Artifact.open(path)
    with create(path) as writer:
        kit.write_layers(writer)
    assert content(path) == content(artifact.path)


def test_completed_files_are_not_written_again(create, kit, tmp_path):
    with pytest.raises(ZeroDivisionError), create() as writer:
        writer.save(kit.LAYERS[0], kit.layer_tensors(0))
        1 / 0  # noqa: B018
    before = (tmp_path / "a" / kit.LAYERS[0]).stat().st_mtime_ns
    with create() as writer:
        result = kit.write_layers(writer)
    assert result.file(kit.LAYERS[0]).stat().st_mtime_ns == before


CHILD = """
import os, signal, sys, time
from lolcats_formats import ArtifactWriter, atomic
path, stop = sys.argv[1:3]
if stop == "rename":  # dies with the second file complete under its temporary name
    rename = atomic.rename
    def die(source, target):
        if target.name == "b.json":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
    atomic.rename = die
with ArtifactWriter.create(path, "capture", config={"n": 3}, teacher={"layers": []}, data={}, tool="t") as writer:
    for name in ("a.json", "b.json", "c.json"):
        if writer.has("text/" + name):
            continue
        writer.log(name=name)
        writer.write_text("text/" + name, name * 1000)
        if stop == "between" and name == "a.json":
            writer.log(name="of the unit that is lost")
            print("a.json is there", flush=True)
            time.sleep(60)
    writer.finish({"files": 3})
"""


def run_child(path: Path, stop: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, path, stop],
        env=os.environ | {"PYTHONPATH": FOLDER},
        stdout=subprocess.PIPE,
    )


@pytest.mark.parametrize("stop", ["between", "rename"])
def test_kill_9_then_the_same_command_again_gives_the_same_bytes(tmp_path, stop):
    with run_child(tmp_path / "a", stop) as child:
        if stop == "between":
            assert child.stdout and child.stdout.readline() == b"a.json is there\n"
            child.kill()
        assert child.wait() == -signal.SIGKILL
    with pytest.raises(Unfinished):
        Artifact.open(tmp_path / "a")
    for name in ("a", "uninterrupted"):
        with run_child(tmp_path / name, "never") as child:
            assert child.wait() == 0
    assert content(tmp_path / "a") == content(tmp_path / "uninterrupted")
    assert [event["name"] for event in Artifact.open(tmp_path / "a").metrics()] == ["a.json", "b.json", "c.json"]


def test_a_second_process_gets_an_error_at_once(create, tmp_path):
    with run_child(tmp_path / "a", "between") as child:
        assert child.stdout and child.stdout.readline()
        with pytest.raises(Locked, match=f"being written by process {child.pid} on "):
            create(kind="capture", config={"n": 3}, teacher={"layers": []}, data={})
        child.kill()
    with create(kind="capture", config={"n": 3}, teacher={"layers": []}, data={}) as writer:  # its owner is dead
        assert writer.has("text/a.json")


def test_a_lock_file_from_another_host_is_taken_over(create, kit, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".lock").write_text("1 another-host\n")
    with create() as writer:
        kit.write_layers(writer)
    assert not (tmp_path / "a" / ".lock").exists()


def test_a_finished_artifact_is_found_and_not_touched(artifact, create, kit):
    os.chmod(artifact.path, 0o555)
    before = content(artifact.path)
    with create() as writer:
        assert writer.finished and writer.finished.id == artifact.id
        assert writer.has(kit.LAYERS[0]) and not writer.has("maps/layer-009.safetensors")
        assert writer.finish({"other": 1}).id == artifact.id
        for use in (lambda: writer.write_text("x.json", "x"), lambda: writer.log(a=1), lambda: writer.scratch):
            with pytest.raises(FormatError, match="finished"):
                use()
    assert content(artifact.path) == before


def test_a_crash_between_the_manifest_and_the_clean_up_is_a_finished_artifact(create, kit, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), create() as writer:
        patch.setattr(atomic, "remove", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        kit.write_layers(writer)
    assert (tmp_path / "a" / "progress.json").exists()
    Artifact.open(tmp_path / "a").verify()
    assert create().finished


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_with_the_fields_that_differ(create, kit, finished):
    with create() as writer:
        if finished:
            kit.write_layers(writer)
    config = {"hybrid": {"window": 32, "feature_dim": 16}, "lr": 0.01, "seed": 0}
    with pytest.raises(ConfigMismatch, match=r"config\.hybrid\.window is 64 there and 32 here") as error:
        create(config=config, teacher=kit.TEACHER | {"model_type": "mistral", "path": "/moved"})
    assert error.value.fields == ["config.hybrid.window", "teacher.model_type"]
    assert ("a finished" if finished else "an unfinished") in str(error.value)
    with pytest.raises(ConfigMismatch) as error:
        create(kind="lora")
    assert error.value.fields == ["kind"]


def test_another_configuration_is_refused_before_the_rest_is_known(create, kit, tmp_path):
    place = tmp_path / "a"
    assert not check_config(place, "transfer", kit.CONFIG)
    with create():
        assert not check_config(place, "transfer", kit.CONFIG)
        with pytest.raises(ConfigMismatch, match=r"an unfinished .* config\.lr is 0\.01 there and 1"):
            check_config(place, "transfer", kit.CONFIG | {"lr": 1})
    with create() as writer:
        kit.write_layers(writer)
    assert check_config(place, "transfer", kit.CONFIG) and not check_config(place, "transfer", {}, force=True)
    assert check_config(place, "transfer", {**kit.CONFIG, "lr": 1, "new": 2}, unknown=("lr", "new"))
    other = {**kit.CONFIG, "hybrid": {"window": 8, "feature_dim": 16}}
    assert check_config(place, "transfer", other, unknown=("hybrid.window",))
    for config, field in (
        ({**kit.CONFIG, "new": 2}, "config.new"),
        ({"hybrid": kit.CONFIG["hybrid"]}, "config.lr"),
        (other, "config.hybrid.window"),
    ):
        with pytest.raises(ConfigMismatch, match="a finished") as error:
            check_config(place, "transfer", config, unknown=("seed", "hybrid.win"))
        assert error.value.fields == [field]
    with pytest.raises(ConfigMismatch, match="a lora would be written there"):
        check_config(place, "lora", kit.CONFIG)


def test_foreign_directories_are_left_alone(create, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(NotAnArtifact, match="holds other files"):
        create()
    assert os.listdir(tmp_path / "a") == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotAnArtifact, match="is a file"):
        create(tmp_path / "file")


def test_folders_are_made_and_hidden_files_do_not_make_a_folder_foreign(create, kit, tmp_path):
    (tmp_path / "a" / ".git").mkdir(parents=True)
    with create() as writer:
        kit.write_layers(writer).verify()
    with create(tmp_path / "x" / "y" / "z") as writer:
        kit.write_layers(writer).verify()


def test_settings_are_checked_before_anything_is_written(create, tmp_path):
    for change, place in [
        ({"config": {"hybrid": {}, "lr": float("nan")}}, "config.lr"),
        ({"config": {"hybrid": {}, "x": torch.zeros(1)}}, "config.x"),
        ({"config": {}}, "hybrid"),
        ({"kind": "soup"}, "soup"),
        ({"tool": "x" * 300}, "tool"),
    ]:
        with pytest.raises(FormatError, match=place):
            create(**change)
    assert not (tmp_path / "a").exists()


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "rename", "make_directory", "append"])
def test_a_full_disk_is_an_oserror_and_the_directory_is_continued(artifact, create, kit, tmp_path, monkeypatch, call):
    path = tmp_path / "b"
    with create(path) as writer:
        writer.log(layer=0, loss=1)
        if call != "make_directory":
            writer.save(kit.LAYERS[0], kit.layer_tensors(0))
        monkeypatch.setattr(atomic, call, full)
        with pytest.raises(OSError, match="No space left") as error:
            kit.write_layers(writer)
        assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert not [f for f in path.rglob("*") if f.name.endswith("lolcats-tmp")]
    with pytest.raises(Unfinished):
        Artifact.open(path)
    with create(path) as writer:
        kit.write_layers(writer)
    assert content(path) == content(artifact.path)


def test_a_full_disk_while_the_manifest_is_written(artifact, create, kit, tmp_path, monkeypatch):
    def rename(source: Path, target: Path) -> None:
        full() if target.name == "manifest.json" else os.replace(source, target)

    path = tmp_path / "b"
    with (
        create(path) as writer,
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="No space left"),
    ):
        patch.setattr(atomic, "rename", rename)
        kit.write_layers(writer)
    with pytest.raises(Unfinished):
        Artifact.open(path)
    with create(path) as writer:
        assert all(writer.has(name) for name in kit.LAYERS)
        kit.write_layers(writer)
    assert content(path) == content(artifact.path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, name: (path / name).unlink(),
        lambda path, name: os.truncate(path / name, 5),
        lambda path, name: os.truncate(path / "metrics.jsonl", 1),
        lambda path, name: (path / "progress.json").write_text("{"),
        lambda path, name: (path / "maps").rename(path / ".m") and (path / "maps").symlink_to(path / ".m"),
    ],
)
def test_damage_to_an_unfinished_directory_is_found(create, kit, tmp_path, damage):
    with create() as writer:
        writer.log(layer=0)
        writer.save(kit.LAYERS[0], kit.layer_tensors(0))
    damage(tmp_path / "a", kit.LAYERS[0])
    with pytest.raises(Damaged):
        create()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(create, kit, tmp_path, umask, mode):
    old = os.umask(umask)
    try:
        with create() as writer:
            safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "a" / "adopted.safetensors")
            writer.adopt("adopted.safetensors")
            writer.write_text("README.md", "x")
            kit.write_layers(writer)
    finally:
        os.umask(old)
    files = [f for f in (tmp_path / "a").rglob("*") if f.is_file()]
    assert len(files) == 7
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {mode}
    assert stat.S_IMODE((tmp_path / "a" / "maps").stat().st_mode) == mode | (mode & 0o444) >> 2


def test_adopt_copy_and_text(artifact, create, tmp_path):
    with create(tmp_path / "b", "student", parents=[artifact]) as writer:
        (tmp_path / "b" / "config.json").write_text('{"model_type": "x"}')
        writer.adopt("config.json")
        writer.copy("maps/x.safetensors", (artifact, "maps/layer-000.safetensors"))
        writer.copy("code.py", Path(__file__))
        writer.write_json("more/a.json", {"b": 1, "a": [True]})
        writer.write_bytes("empty", b"")
        (tmp_path / "b" / "README.md").write_text("a card")
        writer.adopt("README.md")
        with pytest.raises(FormatError, match="not a regular file"):
            writer.adopt("missing.json")
        student = writer.finish({})
    student.verify()
    assert set(student.files) == {"config.json", "maps/x.safetensors", "code.py", "more/a.json", "empty"}
    assert student.files["maps/x.safetensors"] == artifact.files["maps/layer-000.safetensors"]
    assert student.read("code.py") == Path(__file__).read_bytes()
    assert student.read_json("more/a.json") == {"a": [True], "b": 1}


def test_a_damaged_file_is_not_copied(artifact, create, tmp_path):
    file = artifact.file("maps/layer-000.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with create(tmp_path / "b", "lora", parents=[artifact]) as writer:
        with pytest.raises(Damaged, match="layer-000"):
            writer.copy("maps/x", (artifact, "maps/layer-000.safetensors"))
        assert not writer.has("maps/x") and not (tmp_path / "b" / "maps" / "x").exists()


def test_a_file_can_be_written_again(create, tmp_path):
    with create() as writer:
        writer.write_text("x.json", "old")
        writer.write_text("x.json", "new")
        artifact = writer.finish({})
    artifact.verify()
    assert artifact.read("x.json") == b"new"


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../x", ".x", "manifest.json", "progress.json", "metrics.jsonl", "scratch/x", "X.TXT"],
)
def test_names_that_cannot_be_written(create, name):
    with create() as writer:
        writer.write_text("x.txt", "x")
        for use in (lambda: writer.write_text(name, "x"), lambda: writer.adopt(name)):
            with pytest.raises(FormatError):
                use()


def test_stray_files_stop_the_end_and_not_more(create, kit, tmp_path):
    with create() as writer:
        (tmp_path / "a" / "notes.txt").write_text("x")
        with pytest.raises(FormatError, match=r"notes\.txt is not part of the artifact\. Move it away"):
            kit.write_layers(writer)
    (tmp_path / "a" / "notes.txt").unlink()
    with create() as writer:
        assert writer.has(kit.LAYERS[-1])
        writer.finish({}).verify()


def test_json_of_other_programs(create):
    with create() as writer:
        writer.write_json("tokenizer_config.json", {"model_max_length": 10**30})
        for value in ({"x": float("nan")}, {"x": {1, 2}}):
            with pytest.raises(FormatError, match=r"x\.json cannot be written as JSON"):
                writer.write_json("x.json", value)
        assert b'"model_max_length": 1000000000000000000000000000000\n' in writer.finish({}).read(
            "tokenizer_config.json"
        )


def test_events_without_a_file_after_them_belong_to_the_end(create):
    with create() as writer:
        writer.write_text("x.json", "x")
        writer.log(loss=float("inf"), tokens=3)
        with pytest.raises(FormatError, match="longer than"):
            writer.log(text="x" * 2**20)
        assert writer.finish({"loss": float("nan")}).metrics() == [{"loss": "Infinity", "tokens": 3}]
    assert create().finished.summary == {"loss": "NaN"}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: path.symlink_to("elsewhere"), lambda path: path.symlink_to(path), _socket],
    ids=["pipe", "folder", "link to nothing", "loop", "socket"],
)
def test_a_lock_that_is_no_file_is_named(create, tmp_path, make):
    (tmp_path / "a").mkdir()
    make(tmp_path / "a" / ".lock")
    with pytest.raises(FormatError, match=r"\.lock is not a regular file, so the directory cannot be locked"):
        create()


def test_a_link_in_an_unfinished_artifact_leads_nowhere(create, tmp_path):
    """Resuming must not tidy up in a folder that someone linked to."""
    with create() as writer:
        writer.write_text("x.json", "x")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "a" / "scratch").symlink_to(tmp_path / "home")
    with pytest.raises(Damaged, match="scratch is a link"):
        create()
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("name", ["adapter_model.bin", "state.pt", "model.pkl", "run.py", "maps", "x.json/y.bin"])
def test_nothing_but_tensors_and_json_is_published(create, name):
    with create() as writer:
        writer.write_text(name, "x")
        with pytest.raises(Damaged, match=f"files: '{name}' is neither safetensors nor JSON"):
            writer.finish({})
