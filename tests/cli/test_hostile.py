"""What files and options must not do to a terminal, to an exit code, or to the time it takes."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lolcats_formats import artifact_id

from lolcats_cli.progress import printable

ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\x85\x7f\u202e"


def change(folder: Path, edit) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    manifest["id"] = artifact_id(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢 😀", "plain é 漢 😀"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b31m\x85", r"\x9b31m\x85"),
        ("\u202eabc\u2069", r"\u202eabc\u2069"),
        ("\udcff", r"\udcff"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_some_control_characters_may_be_kept() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_what_a_manifest_says_does_not_reach_the_terminal(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline.transfer, tmp_path / "t")
    change(folder, lambda m: m["config"].update({f"key{ESCAPES}": [ESCAPES], "rows": [{ESCAPES: ESCAPES}]}))
    change(folder, lambda m: m["teacher"].update(architecture=ESCAPES))
    for args in (("inspect", folder), ("inspect", folder, "--lineage")):
        result = invoke(*args)
        assert result.code == 0
        assert printable(result.out, keep="\n") == result.out
        assert r"\x1b]0;title" in result.out
    assert json.loads(invoke("inspect", folder, "--json").out)["config"][f"key{ESCAPES}"] == [ESCAPES]


def test_names_of_files_in_errors_are_escaped(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    folder = shutil.copytree(pipeline.transfer, tmp_path / "t")
    (folder / f"x{ESCAPES}").write_text("beside")
    result = invoke("verify", folder)
    assert result.code == 3
    assert printable(result.err, keep="\n") == result.err
    assert "is not part of the artifact" in result.err
    assert invoke("verify", tmp_path / ESCAPES).err.count("\n") == 1


def test_a_path_is_printed_as_its_bytes(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """For the next command of a pipeline, also where the bytes are no text."""
    folder = os.fsencode(tmp_path) + b"/maps-\xff"
    shutil.copytree(os.fsencode(pipeline.transfer), folder)
    for command in ([b"verify", folder], [b"verify", b"-"]):
        done = subprocess.run(
            [sys.executable, "-m", "lolcats_cli", *command], capture_output=True, input=folder + b"\n", timeout=100
        )
        assert (done.returncode, done.stdout) == (0, folder + b"\n"), done.stderr


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("transfer", "x", "-o", "y", "--seed", "-1"), "--seed"),
        (("lora", "x", "-o", "y", "--seed", "9" * 23), "--seed"),
        (("lora", "x", "-o", "y", "--seed", "9" * 5000), "--seed"),
        (("transfer", "x", "-o", "y", "--lr", "1e38"), "--lr"),
        (("transfer", "x", "-o", "y", "--lr", "nan"), "--lr"),
        (("lora", "x", "-o", "y", "--lr", "inf"), "--lr"),
        (("lora", "x", "-o", "y", "--alpha", "nan"), "--alpha"),
        (("lora", "x", "-o", "y", "--alpha", "1e300"), "--alpha"),
        (("import", "x", "-o", "y", "--alpha", "inf"), "--alpha"),
        (("transfer", "x", "-o", "y", "--mse-factor", "nan"), "--mse-factor"),
        (("transfer", "x", "-o", "y", "--window", "9" * 400), "--window"),
        (("transfer", "x", "-o", "y", "--layers", "0-99999999999"), "--layers"),
        (("capture", "x", "z", "-o", "y", "--val-fraction", "nan"), "--val-fraction"),
        (("merge", "x", "-o", "y", "--max-shard-size", "1e300"), "--max-shard-size"),
        (("generate", "x", "--prompt", "p", "--temperature", "nan"), "--temperature"),
        (("generate", "x", "--prompt", "p", "--temperature", "1e-300"), "--temperature"),
        (("eval", "x", "--data", "p", "--dtype", "int8"), "--dtype"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_numbers_that_no_run_could_use(
    invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    assert result.code == 2, result.err
    assert named in result.err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_numbers_of_a_configuration_file_count_too(invoke, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("transfer: {gamma: .nan}\n")
    result = invoke("--config", tmp_path / "run.yaml", "transfer", "x", "-o", tmp_path / "y")
    assert result.code == 2
    assert "gamma" in result.err


@pytest.mark.parametrize("stdin", [b"", b"\n", b"a\0b\n"])
def test_no_path_on_stdin(tmp_path: Path, stdin: bytes) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lolcats_cli", "verify", "-"], capture_output=True, input=stdin, timeout=100
    )
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"Error: An artifact's path was expected on stdin, and ")


def test_closed_stdin() -> None:
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m lolcats_cli verify - <&-"], capture_output=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("limit", ["-f 1", "-f 8", "-n 5"])
def test_limits_of_the_shell(pipeline: SimpleNamespace, tmp_path: Path, limit: str) -> None:
    """Files may not grow, or too few may be open: 5 with what to do, and without the limit the command goes on."""
    command = [sys.executable, "-m", "lolcats_cli", "transfer", str(pipeline.capture), "-o", str(tmp_path / "maps")]
    command += ["--steps", "1", "--window", "8"]
    done = subprocess.run(
        ["bash", "-c", f"ulimit {limit}; exec {shlex.join(command)}"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 5, done.stderr
    assert f"(ulimit {limit[:2]}), and run the same command again to resume." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "maps" / "manifest.json").exists()
    assert subprocess.run(command, capture_output=True, timeout=200).returncode == 0
