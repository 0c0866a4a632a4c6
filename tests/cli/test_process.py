"""What only whole processes show: pipes, signals from outside, what is imported. Few, as each start takes seconds."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lolcats_formats import Artifact

ROOT = Path(__file__).parents[2]
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}
LOLCATS = [sys.executable, "-m", "lolcats_cli"]
PATIENCE = 300  # seconds; a machine that is busy is slow, not wrong


def test_four_stages_in_one_line(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    lolcats = shlex.join(LOLCATS)
    line = (
        f"{lolcats} capture {pipeline.teacher} {pipeline.text} -o cap --seq-len 64 --samples 8"
        f" | {lolcats} transfer - -o maps --window 8 --steps 2"
        f" | {lolcats} lora - -o lora --steps 1"
        f" | {lolcats} merge - -o student"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (0, "student\n"), done.stderr
    assert "Traceback" not in done.stderr
    Artifact.open(tmp_path / "student", "student").verify()


def test_a_stage_that_fails_stops_the_line(tmp_path: Path) -> None:
    lolcats = shlex.join(LOLCATS)
    line = f"{lolcats} capture missing/folder/ text.txt -o cap | {lolcats} transfer - -o maps"
    done = subprocess.run(
        ["bash", "-c", f"{line}; echo ${{PIPESTATUS[@]}}"],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "3 2\n"
    assert [text.split(" ")[0] for text in done.stderr.splitlines()] == ["Error:", "Error:"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_from_outside(pipeline: SimpleNamespace, invoke, tmp_path: Path, number: signal.Signals) -> None:
    output = tmp_path / "maps"
    command = [*LOLCATS, "transfer", str(pipeline.capture), "-o", str(output), "--steps", "30"]
    process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + PATIENCE
    while not (output / "progress.json").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (75, ""), err
    said = err.splitlines()[-1]
    assert said.startswith(f"Stopped by {number.name}. The same command resumes: lolcats transfer ")
    assert not (output / "manifest.json").exists()
    assert invoke(*shlex.split(said.split(": ", 1)[1])[1:])[:2] == (
        0,
        f"{output}\n",
    )  # in this process: a start takes seconds
    Artifact.open(output, "transfer").verify()


def test_light_commands_import_no_torch(pipeline: SimpleNamespace) -> None:
    code = (
        "import sys\n"
        "from lolcats_cli.main import run\n"
        f"for args in (['--help'], ['transfer', '--help'], ['inspect', {str(pipeline.lora)!r}], "
        f"['inspect', {str(pipeline.capture)!r}, '--layer', '1'], ['verify', {str(pipeline.lora)!r}]):\n"
        "    assert run(args) == 0, args\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'peft', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, (args, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("args", [["--help"], ["inspect"]])
def test_a_reader_that_has_seen_enough(pipeline: SimpleNamespace, args: list[str]) -> None:
    command = [*LOLCATS, *args, *([str(pipeline.lora)] if args == ["inspect"] else [])]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, env=ENV, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
