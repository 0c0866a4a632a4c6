"""Several processes at one capture or transfer make what one process makes, also when they are stopped on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from lolcats_formats import Artifact
from lolcats_kernels import HybridConfig

from lolcats_cli.stages.capture import capture
from lolcats_cli.stages.transfer import transfer
from lolcats_cli.stages.transfer_options import TransferOptions
from lolcats_cli.teacher.records import DataOptions

ROOT = Path(__file__).parents[2]
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]),
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
LOLCATS = [sys.executable, "-m", "lolcats_cli"]
TWO = ["--devices", "0,1", "--device", "cpu"]
PATIENCE = 300  # seconds; a machine that is busy is slow, not wrong
MAPS = ["--window", "8", "--feature-dim", "16", "--eval-steps", "10"]
OPTIONS = TransferOptions(
    HybridConfig(window=8, feature_dim=16, linear_factor="exp"), steps=400, grad_accum=2, lr=2e-2, eval_steps=10
)


def run(*command: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*LOLCATS, *map(str, command)], env=ENV, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def same(one: Path, other: Path) -> bool:
    """Whether the artifacts hold the same, and nothing is left of parts."""
    artifacts = [Artifact.open(path) for path in (one, other)]
    for artifact in artifacts:
        artifact.verify()
        assert not list(artifact.path.glob(".*")), "a part or a lock was left behind"
    return artifacts[0].id == artifacts[1].id


def test_two_processes_make_what_one_makes(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    arguments, options = (str(pipeline.teacher), str(pipeline.text)), DataOptions(seq_len=32, samples=40)
    capture(*arguments, tmp_path / "one", options=options, store="block", block_size=1, batch_size=2)
    rows = ["--seq-len", 32, "--samples", 40, "--store", "block", "--block-size", 1, "--batch-size", 2]
    done = run("capture", *arguments, "-o", tmp_path / "two", *rows, *TWO)
    assert done.stdout == f"{tmp_path / 'two'}\n"
    assert same(tmp_path / "two", tmp_path / "one")
    transfer(tmp_path / "one", tmp_path / "maps-1", options=replace(OPTIONS, steps=6))
    run("transfer", tmp_path / "one", "-o", tmp_path / "maps-2", "--steps", 6, *MAPS, *TWO)
    assert same(tmp_path / "maps-2", tmp_path / "maps-1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_they_are_continued_by_one(pipeline: SimpleNamespace, tmp_path: Path, number: signal.Signals) -> None:
    """SIGTERM stops both; the death of one stops the other. What both did is kept."""
    command = ["transfer", pipeline.capture, *MAPS, "--steps", 400]
    process = subprocess.Popen(
        [*LOLCATS, *map(str, command), "-o", str(tmp_path / "maps"), *TWO], env=ENV, stderr=subprocess.PIPE, text=True
    )
    part, deadline = tmp_path / "maps" / ".part-1" / "progress.json", time.monotonic() + PATIENCE
    while not part.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    assert part.exists(), process.communicate()[1]
    if number is signal.SIGTERM:
        process.send_signal(number)
    else:
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[1]), number)
    error = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 75, error
    transfer(pipeline.capture, tmp_path / "maps", options=OPTIONS)
    transfer(pipeline.capture, tmp_path / "whole", options=OPTIONS)
    assert same(tmp_path / "maps", tmp_path / "whole")
