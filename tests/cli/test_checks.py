"""A wrong path or option is told before torch and transformers are imported, in every command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")])}
# {…} are the artifacts of the fixture `pipeline`. What is said ends with the sentence, or holds the words.
MISTAKES = [
    ("capture nowhere {text} -o new", 3, "nowhere is not a folder"),
    ("capture {text} {text} -o new", 3, "is not a folder"),
    ("capture . {text} -o new", 3, "is not a model folder: it has no config.json"),
    ("capture ~nobody-of-that-name/x {text} -o new", 3, "is not a folder"),
    ("capture {teacher} nowhere.jsonl -o new", 3, "The data nowhere.jsonl is not a file"),
    ("capture {teacher} *.jsonl -o new", 3, "No file matches the pattern"),
    ("capture {teacher} {text} -o {text}", 3, "is a file. Give a directory"),
    ("capture {teacher} {text} -o {teacher}", 3, "holds other files and no artifact"),
    ("capture {teacher} {text} -o {text}/below", 3, "Not a directory"),
    ("capture {teacher} {text} -o new --resume required", 3, "nothing to resume"),
    ("capture {teacher} {text} -o new --keep 3", 2, "--select and --keep need each other"),
    ("capture {teacher} {text} -o new --dtype int8", 2, "--dtype"),
    ("transfer nowhere -o new", 3, "nowhere does not exist"),
    ("transfer {teacher} -o new", 3, "is a model folder and not an artifact"),
    ("transfer {lora} -o new", 3, "a capture artifact is needed here"),
    ("transfer {capture} -o {teacher}", 3, "holds other files"),
    ("transfer {capture} -o new --layers 0-7", 2, "--layers 0-7 names layer 2, and the teacher has 2"),
    ("transfer {capture} -o new --keep-softmax 7", 2, "--keep-softmax 7 names layer 7, and the teacher has 2 layers"),
    ("transfer {capture} -o new --keep-softmax 9.0", 2, "--keep-softmax 9.0 names layer 9, and the teacher has 2"),
    ("transfer {capture} -o new --keep-softmax 1.9", 2, "names key head 9 of layer 1, which has 2 key heads"),
    ("transfer {capture} -o new --feature-dims 8,8,8", 2, "--feature-dims gives 3 numbers, and the teacher has 2"),
    ("transfer {capture} -o new --windows 8", 2, "--windows gives 1 number, and the teacher has 2 layers"),
    ("transfer {capture} -o new --steps 8,8,8", 2, "--steps gives 3 numbers, and the teacher has 2 layers"),
    ("transfer {capture} -o new --steps auto --layers 0", 2, "--steps auto looks at all layers"),
    ("transfer {capture} -o new --windows auto --window 0", 2, "shares out the memory of --window, which is 0"),
    ("transfer {capture} -o new --feature-dims auto --feature-map elu", 2, "are for Hedgehog's maps"),
    ("transfer {capture} -o new --feature-dim 8 --feature-map t2r", 2, "are for Hedgehog's maps. Those of t2r have"),
    ("transfer {capture} -o new --keep-softmax heads:1 --layers 0", 2, "With --layers, name the heads to keep"),
    ("transfer {capture} -o new --keep-softmax 0,1", 2, "leaves no layer to convert"),
    ("transfer {capture} -o new --keep-softmax 0 --layers 0", 2, "Layer 0 is in --layers and in --keep-softmax"),
    ("transfer {capture} -o new --block-size 1", 2, "--block-size is for captures made with --store tokens"),
    ("transfer {capture} -o new --window-dropout 0.5 --window 64", 2, "the 64 tokens that the window can see"),
    ("transfer {capture} -o new --window-dropout 0.5 --window 32 --layout terraced", 2, "the 64 tokens that"),
    ("transfer {capture} -o new --gamma 1", 2, "--gamma 1.0 must lie between"),
    ("transfer {capture} -o new --teacher nowhere", 3, "nowhere is not a folder"),
    ("lora {capture} -o new", 3, "a transfer artifact is needed here"),
    ("lora {transfer} -o new --data nowhere.txt", 3, "The data nowhere.txt is not a file"),
    ("lora {transfer} -o new --data {lora}", 3, "a capture artifact is needed here"),
    ("lora {transfer} -o new --teacher nowhere", 3, "nowhere is not a folder"),
    ("lora {transfer} -o {text}", 3, "is a file. Give a directory"),
    ("lora {transfer} -o new --full-attention --shard", 2, "--full-attention cannot be combined with --shard"),
    ("merge {capture} -o new", 3, "a lora or transfer artifact is needed here"),
    ("merge {lora} -o {text}", 3, "is a file. Give a directory"),
    ("merge {lora} -o new --teacher .", 3, "is not a model folder"),
    ("join {capture} {lora} -o new", 3, "a capture or transfer artifact is needed here"),
    ("join {capture} nowhere -o new", 3, "nowhere does not exist"),
    ("join {capture} {transfer} -o new", 2, "takes two or more parts of one kind"),
    ("join {capture} -o new", 2, "takes two or more parts of one kind"),
    ("join {capture} {capture} -o {text}", 3, "is a file. Give a directory"),
    ("eval nowhere --data {text}", 3, "nowhere is not a folder"),
    ("eval {capture} --data {text}", 3, "a transfer, lora or student artifact is needed here"),
    ("eval {student} --data nowhere.txt", 3, "The data nowhere.txt is not a file"),
    ("eval {student}", 2, "Give --data, or --tasks"),
    ("generate nowhere --prompt x", 3, "nowhere is not a folder"),
    ("generate {lora} --prompt x --teacher nowhere", 3, "nowhere is not a folder"),
    ("import nowhere.pt --teacher {teacher} -o new", 3, "nowhere.pt is not a file"),
    ("import {text} -o new", 2, "Give --teacher MODEL for feature maps, or --transfer MAPS"),
    ("import {text} --teacher nowhere -o new", 3, "nowhere is not a folder"),
    ("import {text} --transfer {lora} -o new", 3, "a transfer artifact is needed here"),
    ("verify nowhere", 3, "nowhere does not exist"),
    ("inspect nowhere", 3, "nowhere does not exist"),
    ("inspect {lora} --layer 7", 2, "has no layer 7"),
    ("capture {teacher} {text} -o {transfer}", 4, "holds a transfer artifact, and a capture would be written there"),
    ("merge {lora} -o {transfer}", 4, "holds a transfer artifact, and a student would be written there"),
    ("transfer {capture} -o new --layers 1-0", 2, "--layers 1-0 is not a list like 0-3,7"),
    ("transfer {capture} -o new --keep-softmax 2.", 2, "2. is not a list like 0-3,7,2.0,sliding,auto:2,heads:2"),
    ("--config nowhere.yaml transfer {capture} -o new", 2, "nowhere.yaml cannot be read: No such file or directory"),
]
CHILD = """
import contextlib, io, json, sys
from lolcats_cli.main import run
results = []
for args in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = run(args)
    heavy = sorted({"torch", "transformers", "peft", "datasets", "numpy"} & set(sys.modules))
    results.append([code, said.getvalue(), heavy])
print(json.dumps(results))
"""


def test_mistakes_are_told_before_anything_heavy_is_imported(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """All in one process: what the first ones imported would be seen in the last ones too."""
    commands = [[part.format(**vars(pipeline)) for part in text.split()] for text, _, _ in MISTAKES]
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(commands),
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for (text, code, message), (found, said, heavy) in zip(MISTAKES, json.loads(done.stdout), strict=True):
        assert (found, heavy) == (code, []), (text, said)
        assert message in said.splitlines()[-1], (text, said)
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_link_to_nothing(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    (tmp_path / "maps").symlink_to("nowhere")
    result = invoke("transfer", pipeline.capture, "-o", tmp_path / "maps")
    assert result.code == 3 and "maps is a link to a directory that does not exist" in result.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_cannot_be_written_to(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = invoke("transfer", pipeline.capture, "-o", tmp_path / "maps")
    tmp_path.chmod(0o700)
    assert (result.code, result.err) == (3, f"Error: {tmp_path}: Permission denied.\n")


def test_a_teacher_that_is_gone_is_told_at_once(pipeline: SimpleNamespace, invoke, tmp_path: Path) -> None:

    folder = shutil.copytree(pipeline.transfer, tmp_path / "maps")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["teacher"]["path"] = str(tmp_path / "gone")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for command in ("lora {} -o x", "merge {} -o x", "eval {} --data {text}", "generate {} --prompt x"):
        args = command.format(folder, text=pipeline.text).split()
        result = invoke(*args)
        assert (result.code, result.out) == (3, "")
        assert f"is no longer at {tmp_path / 'gone'}. Pass its folder with --teacher." in result.err
