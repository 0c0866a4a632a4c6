"""Reading: what is found wrong, where, and that nothing wrong is used."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lolcats_formats
import pytest
import torch
from lolcats_formats import (
    Artifact,
    ConfigMismatch,
    Damaged,
    FormatError,
    NotAnArtifact,
    Unfinished,
    UnsupportedVersion,
    WrongKind,
    artifact_id,
)

SHARD = "maps/layer-001.safetensors"


def edit_manifest(artifact: Artifact, change, *, new_id: bool = True) -> None:
    """Changes the manifest as somebody would who also computes the id again, unless told otherwise."""
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    change(manifest)
    if new_id:
        manifest["id"] = artifact_id(manifest)
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_round_trip(artifact, kit):
    again = Artifact.open(artifact.path, ("lora", "transfer"))
    assert (again.id, again.kind, again.config, again.teacher) == (
        artifact.id,
        "transfer",
        kit.CONFIG,
        kit.TEACHER,
    )
    assert again.data == {"tokens": 100} and again.parents == [] and again.summary == {"trained": 3}
    assert sorted(again.files) == [*kit.LAYERS, "metrics.jsonl"]
    assert again.metrics() == [
        {"layer": 0, "loss": 1},
        {"layer": 1, "loss": 0.5},
        {"layer": 2, "loss": 1 / 3},
    ]
    for i, name in enumerate(kit.LAYERS):
        expected, found = kit.layer_tensors(i), again.load(name)
        assert set(found) == set(expected)
        for key in expected:
            assert found[key].dtype == expected[key].dtype and torch.equal(found[key], expected[key])
        assert again.header(name)["k_weight"] == ("BF16", (2, 4, 3), 48)
    assert set(again.load(SHARD, ["q_weight"])) == {"q_weight"}
    read = []
    again.verify(read.append)
    assert sum(read) == sum(entry["size"] for entry in again.files.values())


def test_moved_and_copied_directories_stay_valid(artifact, tmp_path):
    shutil.copytree(artifact.path, tmp_path / "copy")
    artifact.path.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    for name in ("copy", "moved", "link"):
        again = Artifact.open(tmp_path / name)
        again.verify()
        assert again.id == artifact.id


def test_what_the_hub_and_people_add_is_tolerated(artifact):
    (artifact.path / ".cache/huggingface/download").mkdir(parents=True)
    (artifact.path / ".cache/huggingface/download/x.metadata").write_text("x")
    for name in (".gitattributes", "README.md", "maps/.DS_Store", "progress.json"):
        (artifact.path / name).write_text("x")
    Artifact.open(artifact.path).verify()


@pytest.mark.parametrize("name", ["notes.txt", "maps/layer-003.safetensors", "maps/README.md", "maps/progress.json"])
def test_verify_finds_extra_files(artifact, name):
    (artifact.path / name).write_text("x")
    with pytest.raises(Damaged, match=f"{name} is not part"):
        artifact.verify()


def test_verify_finds_extra_links(artifact):
    (artifact.path / "more").symlink_to(artifact.path / "maps")
    with pytest.raises(Damaged, match="more is not part"):
        artifact.verify()


@pytest.mark.parametrize("offset", [0, 20, -1])
def test_a_flipped_bit_is_found_and_not_used(artifact, offset):
    flip_bit(artifact.path / SHARD, offset)
    again = Artifact.open(artifact.path)
    with pytest.raises(Damaged, match=SHARD):
        again.verify()
    with pytest.raises(Damaged, match=SHARD):
        again.load(SHARD)
    again.load("maps/layer-000.safetensors")


def test_a_shard_damaged_after_its_first_read_is_not_used(artifact):
    artifact.load(SHARD)
    flip_bit(artifact.path / SHARD, -1)
    with pytest.raises(Damaged, match=SHARD):
        artifact.load(SHARD)


def test_swapped_shards_are_found(artifact):
    a, b, c = (artifact.path / "maps" / n for n in ("layer-000.safetensors", "layer-001.safetensors", "c"))
    a.rename(c), b.rename(a), c.rename(b)
    with pytest.raises(Damaged, match=r"layer-000.*layer-001"):
        artifact.verify()


def test_damaged_metrics_are_not_used(artifact):
    flip_bit(artifact.path / "metrics.jsonl", 3)
    with pytest.raises(Damaged, match=r"metrics\.jsonl"):
        artifact.metrics()


def test_truncated_and_missing_files_are_found_on_opening(artifact):
    content = (artifact.path / SHARD).read_bytes()
    (artifact.path / SHARD).write_bytes(content[:-1])
    with pytest.raises(Damaged, match=f"{SHARD} is damaged: it has {len(content) - 1} bytes"):
        Artifact.open(artifact.path)
    (artifact.path / SHARD).unlink()
    with pytest.raises(Damaged, match=f"{SHARD} is missing"):
        Artifact.open(artifact.path)
    with pytest.raises(Damaged, match=f"{SHARD} is missing"):
        artifact.load(SHARD)
    shutil.rmtree(artifact.path / "maps")
    with pytest.raises(Damaged, match="missing"):
        Artifact.open(artifact.path)


def test_verify_names_every_damaged_file(artifact, kit):
    for name in kit.LAYERS[:2]:
        flip_bit(artifact.path / name, -1)
    with pytest.raises(Damaged, match=r"layer-000.*layer-001"):
        artifact.verify()


def test_a_shard_whose_hash_is_right_but_whose_header_is_wrong(artifact):
    content = b"\xff" * 8 + (artifact.path / SHARD).read_bytes()[8:]
    (artifact.path / SHARD).write_bytes(content)
    sha256 = lolcats_formats.artifact.hash_file(artifact.path / SHARD)[1]
    edit_manifest(artifact, lambda m: m["files"][SHARD].update(sha256=sha256))
    again = Artifact.open(artifact.path)
    for use in (again.verify, lambda: again.load(SHARD), lambda: again.header(SHARD)):
        with pytest.raises(Damaged, match=f"{SHARD} is no safetensors file"):
            use()


def test_files_that_are_links_or_no_files_are_refused(artifact, tmp_path):
    file = artifact.path / SHARD
    file.rename(tmp_path / "real")
    file.symlink_to(tmp_path / "real")
    with pytest.raises(Damaged, match="symbolic link"):
        Artifact.open(artifact.path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(Damaged, match="not a regular file"):
        Artifact.open(artifact.path)
    file.unlink()
    (artifact.path / "maps").rename(tmp_path / "maps")
    (tmp_path / "real").rename(tmp_path / SHARD)
    (artifact.path / "maps").symlink_to(tmp_path / "maps")
    with pytest.raises(Damaged, match="maps is not a real folder"):
        Artifact.open(artifact.path)


def test_a_manifest_that_is_a_link_is_refused(artifact, tmp_path):
    (artifact.path / "manifest.json").rename(tmp_path / "m")
    (artifact.path / "manifest.json").symlink_to(tmp_path / "m")
    with pytest.raises(Damaged, match="not a regular file"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside", "maps/../../outside", "/etc/passwd", "maps//x", "maps/", "./x", ".hidden",
        "maps/.hidden", "", "a\\b", "a b", "a\n", "a\0b", "é", "x" * 241, "/".join("abcdefghi"),
        "manifest.json", "progress.json", "README.md", "scratch/x", "path",
    ],
)  # fmt: skip
def test_names_that_a_manifest_may_not_list(artifact, name, tmp_path):
    (tmp_path / "outside").write_bytes(b"")
    edit_manifest(artifact, lambda m: m["files"].update({name: m["files"][SHARD]}))
    with pytest.raises(Damaged, match=r"manifest\.json"):
        Artifact.open(artifact.path)


def test_names_that_differ_only_in_case_are_refused(artifact):
    edit_manifest(artifact, lambda m: m["files"].update({SHARD.replace("maps", "MAPS"): m["files"][SHARD]}))
    with pytest.raises(Damaged, match="only in upper and lower case"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.update(colour="red"), "colour"),
        (lambda m: m["files"][SHARD].update(colour="red"), "colour"),
        (lambda m: m["created"].update(colour="red"), "colour"),
        (lambda m: m.pop("teacher"), "teacher"),
        (lambda m: m["files"][SHARD].pop("sha256"), "sha256"),
        (lambda m: m["files"][SHARD].update(sha256="A" * 64), "sha256"),
        (lambda m: m["files"][SHARD].update(size=-1), "size"),
        (lambda m: m["files"][SHARD].update(size="1"), "size"),
        (lambda m: m.update(config=[]), "config"),
        (lambda m: m["config"].pop("hybrid"), "hybrid"),
        (lambda m: m["config"]["hybrid"].update(kept_heads=[1]), "kept_heads"),
        (lambda m: m["config"]["hybrid"].update(kept_heads={"first": [0]}), "kept_heads"),
        (lambda m: m["config"]["hybrid"].update(kept_heads={"0": []}), "kept_heads"),
        (lambda m: m.update(kind="soup"), "soup"),
        (lambda m: m.update(kind=["transfer"]), "kind"),
        (lambda m: m.update(parents=[{"id": "0" * 64}]), "parents"),
        (lambda m: m.update(version=1.0), "version"),
        (lambda m: m.update(version="1"), "version"),
        (lambda m: m.update(version="1.x"), "version"),
        (lambda m: m.update(summary=None), "summary"),
    ],
)
def test_manifests_that_break_the_rules(artifact, change, place):
    edit_manifest(artifact, change)
    with pytest.raises(Damaged, match=rf"manifest\.json.*{place}"):
        Artifact.open(artifact.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["config"].update(lr=0.5),
        lambda m: m["files"][SHARD].update(sha256="0" * 64),
        lambda m: m["summary"].update(trained=4),
        lambda m: m.update(id="0" * 64),
    ],
)
def test_an_edited_manifest_is_found_on_opening(artifact, change):
    edit_manifest(artifact, change, new_id=False)
    with pytest.raises(Damaged, match="edited or damaged"):
        Artifact.open(artifact.path)


def test_a_truncated_or_repeated_manifest_is_found(artifact):
    file = artifact.path / "manifest.json"
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    with pytest.raises(Damaged, match="not valid JSON"):
        Artifact.open(artifact.path)
    file.write_text(text.replace('"kind": "transfer"', '"kind": "lora", "kind": "transfer"'))
    with pytest.raises(Damaged, match="'kind' is given twice"):
        Artifact.open(artifact.path)


def test_paths_and_dates_may_change_and_ignorable_fields_are_ignored(artifact):
    def change(manifest):
        manifest["teacher"]["path"] = "/elsewhere"
        manifest["created"]["time"] = "2030-01-01T00:00:00Z"

    edit_manifest(artifact, change, new_id=False)
    assert Artifact.open(artifact.path).id == artifact.id

    def add(manifest):
        manifest["x-note"] = "hello"
        manifest["files"][SHARD]["x-note"] = 1

    edit_manifest(artifact, add)
    assert Artifact.open(artifact.path).id != artifact.id


@pytest.mark.parametrize("version", ["2.0", "0.9", "17.3"])
def test_other_major_versions_are_refused_with_those_supported(artifact, version):
    edit_manifest(artifact, lambda m: m.update(version=version, something={"new": 1}))
    with pytest.raises(UnsupportedVersion, match=rf"{version}.*reads 1\.x"):
        Artifact.open(artifact.path)


def test_newer_minor_versions_are_read(artifact):
    edit_manifest(artifact, lambda m: m.update({"version": "1.7", "x-later": [1]}))
    Artifact.open(artifact.path).verify()


def test_wrong_kind_says_which_command_makes_the_right_one(artifact):
    with pytest.raises(WrongKind, match=r"is a transfer artifact.*lora or student.*`lolcats merge`"):
        Artifact.open(artifact.path, ("lora", "student"))


def test_what_is_not_an_artifact(artifact, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "a web page"}')
    for path, reason in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "no manifest.json"),
        (tmp_path / "model", "model folder"),
        (tmp_path / "other", "does not belong to a lolcats artifact"),
        (artifact.path / "manifest.json", "is a file"),
    ]:
        with pytest.raises(NotAnArtifact, match=reason) as error:
            Artifact.open(path)
        assert not isinstance(error.value, Unfinished)


def test_unknown_files_and_tensors(artifact):
    for use in (artifact.file, artifact.load, artifact.header, artifact.read):
        with pytest.raises(FormatError, match="no file 'maps/layer-009"):
            use("maps/layer-009.safetensors")
    with pytest.raises(FormatError, match="no tensor 'v_weight'"):
        artifact.load(SHARD, ["q_weight", "v_weight"])


def test_lineage_is_complete_without_the_parents(artifact, create, tmp_path):
    with create(tmp_path / "l", "lora", parents=[artifact]) as writer:
        lora = writer.finish({})
    with create(tmp_path / "s", "student", parents=[lora]) as writer:
        student = writer.finish({})
    shutil.rmtree(lora.path)
    (parent,) = Artifact.open(student.path).parents
    assert (parent["id"], parent["kind"], parent["path"]) == (lora.id, "lora", str(lora.path))
    assert [p["id"] for p in parent["parents"]] == [artifact.id]
    assert student.ancestor("transfer").path == artifact.path
    with pytest.raises(NotAnArtifact, match=f"{lora.id[:12]}.*is not at"):
        student.ancestor("lora")
    with pytest.raises(FormatError, match="not made from a capture"):
        student.ancestor("capture")


def test_ancestors_are_found_beside_an_artifact_that_was_moved(artifact, create, tmp_path):
    with create(tmp_path / "l", "lora", parents=[artifact]) as writer:
        writer.finish({})
    (tmp_path / "elsewhere").mkdir()
    for name in ("a", "l"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    lora = Artifact.open(tmp_path / "elsewhere" / "l")
    assert lora.ancestor("transfer").path == tmp_path / "elsewhere" / "a"
    # Another artifact in the parent's place is not taken for it.
    shutil.rmtree(tmp_path / "elsewhere" / "a")
    with create(tmp_path / "elsewhere" / "a", data={"tokens": 99}) as writer:
        writer.finish({})
    with pytest.raises(NotAnArtifact, match="is not at"):
        lora.ancestor("transfer")


@pytest.mark.parametrize("path", ["nul\0", "x" * 4097])
def test_paths_that_no_system_has_are_refused(artifact, create, tmp_path, path):
    with create(tmp_path / "l", "lora", parents=[artifact]) as writer:
        lora = writer.finish({})
    for place in (lambda m: m["parents"][0], lambda m: m["teacher"], lambda m: m["data"]):
        edit_manifest(lora, lambda m, place=place: place(m).update(path=path))
        with pytest.raises(Damaged, match="path"):
            Artifact.open(lora.path)


@pytest.mark.parametrize("path", ["x" * 4000, "x" * 300 + "/y", "loop/a", ""])
def test_a_parent_whose_path_leads_nowhere_is_not_at_hand(artifact, create, tmp_path, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with create(tmp_path / "elsewhere" / "l", "lora", parents=[artifact]) as writer:
        lora = writer.finish({})
    edit_manifest(lora, lambda m: m["parents"][0].update(path=path))
    with pytest.raises(NotAnArtifact, match="is not at"):
        Artifact.open(lora.path).ancestor("transfer")


def test_config_mismatch_carries_the_fields():
    error = ConfigMismatch("text", ["teacher.weights_sha256"])
    assert isinstance(error, FormatError) and error.fields == ["teacher.weights_sha256"]


def test_reading_needs_no_torch(artifact):
    """Opening, verifying, headers and metrics: what `lolcats inspect` and `verify` do."""
    code = """
import sys
from lolcats_formats import Artifact, ArtifactWriter
a = Artifact.open(sys.argv[1])
a.verify(); a.metrics(); a.header("maps/layer-000.safetensors")
bad = {"torch", "transformers", "numpy"} & set(sys.modules)
assert not bad, bad
"""
    folder = Path(lolcats_formats.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", code, artifact.path], env=environment, check=True)
