"""Checkpoints, --resume and --force: what is continued, what is begun anew, what is replaced and when."""

import errno
import itertools
import json
import os
from pathlib import Path

import pytest
from lolcats_formats import Artifact, ConfigMismatch, Damaged, FormatError, Locked, NotAnArtifact, atomic
from lolcats_formats.lock import DirectoryLock

OTHER = {"hybrid": {"window": 8}}


def content(path: Path) -> dict[str, bytes]:
    """All files of a directory by name; of the manifest, all but what may differ between two runs."""
    files = {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}
    manifest = json.loads(files["manifest.json"])
    del manifest["created"]
    return files | {"manifest.json": json.dumps(manifest).encode()}


def save_state(writer, step: int) -> Path:
    folder = writer.scratch / f"step-{step}"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"step": step}))
    writer.checkpoint(folder)
    return folder


class Died(BaseException):
    pass


# Checkpoints


def test_the_last_checkpoint_is_kept_and_no_other_state(create, tmp_path):
    with create() as writer:
        assert writer.checkpointed is None
        save_state(writer, 1)
        save_state(writer, 2)
        (writer.scratch / "step-3").mkdir()
        (writer.scratch / "step-3" / "half").write_text("written")
        (writer.scratch / "loose").write_text("file")
    with create() as writer:
        assert [entry.name for entry in writer.scratch.iterdir()] == ["step-2"]
        assert json.loads((writer.checkpointed / "state.json").read_text()) == {"step": 2}


def test_scratch_is_gone_at_the_end(create, kit, tmp_path):
    with create() as writer:
        save_state(writer, 1)
        kit.write_layers(writer).verify()
    assert not (tmp_path / "a" / "scratch").exists()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_crash_around_the_manifest_leaves_the_checkpoint_and_the_same_command_removes_it(
    create, kit, tmp_path, monkeypatch, moment
):
    """A stage that goes back to its checkpoint needs it until all is published."""
    write = atomic.write

    def die(path, chunks):
        if path.name == "manifest.json":
            if moment == "after":
                write(path, chunks)
            raise Died
        return write(path, chunks)

    monkeypatch.setattr(atomic, "write", die)
    with pytest.raises(Died), create() as writer:
        save_state(writer, 1)
        kit.write_layers(writer)
    monkeypatch.undo()
    if moment == "before":
        with create() as writer:
            assert writer.restart() is not None
            kit.write_layers(writer)
    else:
        assert (tmp_path / "a" / "scratch").is_dir()
        Artifact.open(tmp_path / "a").verify()
        assert create().finished
    assert not (tmp_path / "a" / "scratch").exists()
    assert not (tmp_path / "a" / "progress.json").exists()
    Artifact.open(tmp_path / "a").verify()


def test_events_before_a_checkpoint_are_kept_and_those_after_it_are_not(create):
    with create() as writer:
        writer.log(step=1)
        save_state(writer, 1)
        writer.log(step="lost")
    with create() as writer:
        writer.log(step=2)
        assert [event["step"] for event in writer.finish({}).metrics()] == [1, 2]


@pytest.mark.parametrize("damage", ["flip", "missing", "extra", "gone"])
def test_a_damaged_checkpoint_is_not_used(create, damage):
    with create() as writer:
        folder = save_state(writer, 1)
    file = folder / "state.json"
    if damage == "flip":
        file.write_text(file.read_text().replace("1", "2"))
    elif damage == "extra":
        (folder / "optimizer.pt").write_bytes(b"pickle")
    else:
        file.unlink()
    if damage == "gone":
        folder.rmdir()
    with create() as writer, pytest.raises(Damaged, match="--force"):
        writer.checkpointed  # noqa: B018


def test_a_crash_while_a_checkpoint_is_saved_leaves_the_one_before(create, monkeypatch):
    calls = ["fsync", "fsync_directory", "write"]
    for call in calls:
        with create() as writer:
            if writer.checkpointed is None:
                save_state(writer, 1)

            def die(*args: object) -> None:
                raise Died

            with monkeypatch.context() as patch, pytest.raises(Died):
                patch.setattr(atomic, call, die)
                save_state(writer, 2)
        with create() as writer:
            assert writer.checkpointed.name == "step-1", call


def test_restart_goes_back_to_nothing(create, kit, artifact, tmp_path):
    path = tmp_path / "b"
    with create(path) as writer:
        writer.log(step="lost")
        writer.save(kit.LAYERS[0], kit.layer_tensors(2))
    for _ in range(2):  # also when it is itself interrupted
        with create(path) as writer:
            assert writer.restart() is None
            assert not writer.has(kit.LAYERS[0])
            writer.log(step="lost as well")
    with create(path) as writer:
        writer.log(step="lost, too")
        writer.restart()
        kit.write_layers(writer)
    assert content(path) == content(artifact.path)


def test_restart_goes_back_to_the_checkpoint(create, kit, tmp_path):
    for again in (False, True, True):
        with create() as writer:
            folder = writer.restart()
            if again:
                assert folder is not None
            else:
                writer.log(step=1)
                save_state(writer, 1)
            writer.log(step=2)  # of the work after the checkpoint, done in every run
            writer.save(kit.LAYERS[0], kit.layer_tensors(0))
    with create() as writer:
        writer.restart()
        writer.log(step=2)
        assert not writer.has(kit.LAYERS[0])
        writer.save(kit.LAYERS[0], kit.layer_tensors(0))
        assert [event["step"] for event in writer.finish({}).metrics()] == [1, 2]


# --resume


def test_resume_required_wants_something_to_resume(create, kit, tmp_path):
    for name in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(NotAnArtifact, match="nothing to resume"):
            create(tmp_path / name, resume="required")
    assert not (tmp_path / "new").exists()
    with create() as writer:
        writer.write_text("x.json", "x")
    with create(resume="required") as writer:
        assert writer.has("x.json")
        writer.finish({})
    assert create(resume="required").finished


def test_resume_never_refuses_what_is_unfinished_and_leaves_it(create, tmp_path):
    with create(resume="never") as writer:
        writer.write_text("x.json", "x")
    with pytest.raises(FormatError, match=r"is unfinished\. .*--force"):
        create(resume="never")
    with create() as writer:
        assert writer.has("x.json")
        writer.finish({})
    assert create(resume="never").finished


# --force


def test_force_replaces_a_finished_artifact_at_the_end(artifact, create, kit, tmp_path):
    before = artifact.id
    with create(config=OTHER, force=True) as writer:
        writer.write_text("x.json", "new")
        assert Artifact.open(artifact.path).id == before
    with create(config=OTHER, force=True) as writer:
        assert writer.has("x.json")  # a run that was stopped goes on
        result = writer.finish({})
    assert result.path == artifact.path
    assert result.id != before
    result.verify()
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert sorted(os.listdir(tmp_path / "a")) == ["manifest.json", "x.json"]


def test_force_makes_a_finished_artifact_again(artifact, create, kit):
    inode = artifact.file(kit.LAYERS[0]).stat().st_ino
    with create(force=True) as writer:
        assert not writer.finished
        again = kit.write_layers(writer)
    assert again.id == artifact.id
    assert again.file(kit.LAYERS[0]).stat().st_ino != inode


def test_force_through_a_link_replaces_what_it_points_to(artifact, create, kit, tmp_path):
    (tmp_path / "link").symlink_to(artifact.path)
    with create(tmp_path / "link", config=OTHER, force=True) as writer:
        kit.write_layers(writer)
    assert (tmp_path / "link").is_symlink()
    assert Artifact.open(tmp_path / "link").config == OTHER


def test_force_continues_unfinished_work_of_the_same_settings(create, kit, tmp_path):
    with create() as writer:
        writer.write_text("x.json", "x")
    with create(force=True) as writer:
        assert writer.has("x.json")
    with create(force=True, resume="never") as writer:
        assert not writer.has("x.json")
    with pytest.raises(ConfigMismatch, match="--force"):
        create(config=OTHER)
    with create(config=OTHER, force=True) as writer:
        assert not writer.has("x.json")
        kit.write_layers(writer).verify()
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_force_replaces_what_cannot_be_read(artifact, create, kit):
    artifact.file(kit.LAYERS[0]).write_bytes(b"damaged")
    with create(force=True) as writer:
        kit.write_layers(writer).verify()


def test_force_takes_no_other_files(create, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years")
    with pytest.raises(NotAnArtifact, match="other files"):
        create(force=True)
    (tmp_path / "a" / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(NotAnArtifact, match="does not belong to a lolcats artifact"):
        create(force=True)
    assert (tmp_path / "a" / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("at_once", [True, False])
def test_a_crash_at_any_moment_of_the_exchange_leaves_one_artifact_and_the_same_command_ends_it(
    artifact, create, kit, tmp_path, monkeypatch, at_once
):
    if not at_once:  # a system that cannot exchange two names
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *args, **options: object())
    original = {name: getattr(atomic, name) for name in ("write", "exchange", "rename", "remove", "fsync_directory")}
    seeds = iter(range(2, 100))
    deaths = 0
    while True:
        settings = {"config": OTHER | {"seed": next(seeds)}, "force": True}
        left = itertools.count(deaths, -1)  # calls until the death

        def step(function, left=left):
            def call(*args: object):
                if next(left) == 0:
                    raise Died
                return function(*args)

            return call

        with monkeypatch.context() as patch, create(**settings) as writer:
            kit.write_layers_but_the_end(writer)
            for name, function in original.items():
                patch.setattr(atomic, name, step(function))
            try:
                writer.finish({})
                break
            except Died:
                deaths += 1
        if at_once:
            Artifact.open(tmp_path / "a").verify()  # the old or the new
        with create(**settings) as writer:
            result = writer.finished or kit.write_layers(writer)
        assert result.config == settings["config"]
        result.verify()
        assert sorted(os.listdir(tmp_path)) == ["a"], deaths
        assert {*os.listdir(tmp_path / "a")} - {".lock"} == {"manifest.json", "maps", "metrics.jsonl"}
    assert deaths > 6
    assert Artifact.open(tmp_path / "a").config == settings["config"]


def test_an_exchange_that_fails_is_said(artifact, create, kit, monkeypatch):
    with create(config=OTHER, force=True) as writer:
        kit.write_layers_but_the_end(writer)

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(atomic, "exchange", full)
            writer.finish({})
    assert Artifact.open(artifact.path).id == artifact.id
    with create(config=OTHER, force=True) as writer:
        assert writer.finished.config == OTHER


def test_force_leaves_unfinished_work_alone_where_an_empty_folder_lies_beside(create, tmp_path):
    """The folder is not a run's that died tidying up: nothing there has been replaced."""
    with create() as writer:
        writer.write_text("x.json", "x")
    (tmp_path / ".a.lolcats-new").mkdir()
    with create(force=True) as writer:
        assert writer.has("x.json")
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_force_never_takes_the_progress_of_a_writer_that_is_alive(artifact, create, tmp_path):
    """Neither of one that writes into the directory, nor of one that has just finished it and tidies up."""
    (tmp_path / ".a.lolcats-new").mkdir()
    with create(tmp_path / "b") as alive:
        (tmp_path / ".b.lolcats-new").mkdir()
        alive.write_text("x.json", "x")
        with pytest.raises(Locked):
            create(tmp_path / "b", config=OTHER, force=True)
        assert alive.has("x.json")
        assert (tmp_path / "b" / "progress.json").exists()
    (artifact.path / "progress.json").write_text("{}")
    with DirectoryLock(artifact.path), pytest.raises(Locked):
        create(config=OTHER, force=True)
    assert (artifact.path / "progress.json").exists()


def test_force_takes_no_folder_beside_in_which_another_writer_begins(artifact, create, tmp_path):
    beside = tmp_path / ".a.lolcats-new"
    beside.mkdir()
    with DirectoryLock(beside):
        with pytest.raises(Locked):
            create(config=OTHER, force=True)
        assert beside.is_dir()


def test_nothing_is_exchanged_with_a_directory_where_another_writer_has_begun(artifact, create, kit, tmp_path):
    with create(config=OTHER, force=True) as writer:
        kit.write_layers_but_the_end(writer)
        artifact.path.rename(tmp_path / "away")
        with create() as other:
            with pytest.raises(Locked):
                writer.finish({})
            other.write_text("x.json", "x")
    with create() as other:
        assert other.has("x.json")
