"""The Slurm scripts of docs/slurm, run on a tiny model; srun and scontrol are played by the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lolcats_formats import Artifact

from lolcats_cli.stages.capture import capture
from lolcats_cli.teacher.records import DataOptions

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "docs" / "slurm"
# `srun` starts SLURM_NTASKS tasks, or as many as --ntasks says, and ends with the largest of their exit codes.
SRUN = """
tasks=${SLURM_NTASKS:-1}
while [[ $1 == --* ]]; do case $1 in --ntasks=*) tasks=${1#*=};; esac; shift; done
for task in $(seq 0 $((tasks - 1))); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids[task]=$!; done
code=0
for pid in "${pids[@]}"; do wait "$pid"; ended=$?; ((ended > code)) && code=$ended; done
exit $code
"""
SMALL = {
    "CAPTURE": "--seq-len 32 --samples 16",
    "TRANSFER": "--window 8 --feature-dim 8 --steps 2 --grad-accum 2",
    "LORA": "--steps 2",
    "SLURM_JOB_ID": "9",
}


@pytest.fixture
def slurm(pipeline: SimpleNamespace, tmp_path: Path) -> dict[str, str]:
    """The environment of a job on the tiny teacher."""
    commands = {
        "lolcats": f'exec {sys.executable} -m lolcats_cli "$@"',
        "srun": SRUN,
        "scontrol": f'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> {tmp_path}/requeued; fi',
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")])
    return (
        os.environ
        | SMALL
        | {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "PYTHONPATH": paths,
            "OMP_NUM_THREADS": "1",
            "TEACHER": str(pipeline.teacher),
            "DATA": str(pipeline.text),
        }
    )


def submit(name: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / name)], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )


def test_8b_on_one_gpu(slurm: dict[str, str], tmp_path: Path) -> None:
    done = submit("8b.sbatch", tmp_path, slurm)
    assert (done.returncode, done.stdout) == (0, "cap\nmaps\nlora\nstudent\n"), done.stderr
    Artifact.open(tmp_path / "student", "student").verify()


@pytest.mark.slow
def test_70b_on_eight_gpus(slurm: dict[str, str], tmp_path: Path) -> None:
    small = {"DEVICES": "0,1", "CAPTURE": f"{SMALL['CAPTURE']} --device cpu --block-size 1"}
    small |= {name: f"{SMALL[name]} --device cpu" for name in ("TRANSFER", "LORA")}
    done = submit("70b.sbatch", tmp_path, slurm | small)
    assert (done.returncode, done.stdout) == (0, "cap\nmaps\nlora\nstudent\n"), done.stderr
    assert Artifact.open(tmp_path / "cap").config["store"] == "block"
    Artifact.open(tmp_path / "student", "student").verify()


@pytest.mark.slow
def test_405b_on_many_nodes(pipeline: SimpleNamespace, slurm: dict[str, str], tmp_path: Path) -> None:
    rows = DataOptions(seq_len=32, samples=16)
    capture(
        str(pipeline.teacher), str(pipeline.text), tmp_path / "cap", options=rows, store="tokens", statistics="none"
    )
    for task in ("0", "1"):
        array = {"SIZE": "1", "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": "7"}
        done = submit("405b-transfer.sbatch", tmp_path, slurm | array)
        assert (done.returncode, done.stdout) == (0, f"maps-{task}\n"), done.stderr
    subprocess.run("lolcats join maps-* -o maps", shell=True, cwd=tmp_path, env=slurm, check=True, timeout=300)
    done = submit("405b-lora.sbatch", tmp_path, slurm | {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "n[1-3]"})
    assert (done.returncode, done.stdout) == (0, "lora\nstudent\n"), done.stderr
    Artifact.open(tmp_path / "student", "student").verify()


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS.iterdir()))
def test_a_job_that_was_stopped_is_requeued(name: str, slurm: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "lolcats").write_text("#!/bin/bash\nexit 75\n")
    job = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "9", "SLURM_JOB_NODELIST": "n1"}
    assert submit(name, tmp_path, slurm | job).returncode == 75
    assert (tmp_path / "requeued").read_text() == ("requeue 9_1\n" if "transfer" in name else "requeue 9\n")
