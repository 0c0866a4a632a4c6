"""What the guides show, run as it stands, Slurm's commands played by the shell; docs/quality.md: its tables."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from lolcats_formats import Artifact
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from lolcats_cli.main import app

ROOT = Path(__file__).parents[2]


def script(heading: str, word: str = "") -> str:
    """The first shell script below a heading that has the word."""
    section = (ROOT / "docs" / "clusters.md").read_text().split(f"## {heading}\n")[1]
    return next(text for text in re.findall(r"```bash\n(.*?)```", section, re.DOTALL) if word in text)


def served_code() -> list[str]:
    """The Python of docs/serving.md: its example, and its server."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)


def guides() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_commands_of_the_guides_have_these_options() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    wrong, seen = [], 0
    for file in guides():
        for line in re.findall(r"(?:^|\$ |\| )lolcats (.*)", file.read_text("utf-8"), re.MULTILINE):
            name, *words = line.split("#")[0].split(" | ")[0].split()
            if name not in commands:  # prose, or an option in front of the command
                continue
            seen += 1
            known = {option for parameter in commands[name].params for option in parameter.opts}
            wrong += [f"{file.name}: {name} {word}" for word in words if word.startswith("--") and word not in known]
    assert seen > 30
    assert wrong == []


def test_the_links_of_the_guides_lead_somewhere() -> None:
    for file in guides():
        for target in re.findall(r"\]\(([^)#:\s]+)[)#]", file.read_text("utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """The environment: lolcats, srun and scontrol on the PATH."""
    commands = {
        "lolcats": f'exec {sys.executable} -m lolcats_cli "$@"',
        "srun": 'exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/requeued',
    }
    (tmp_path / "bin").mkdir()
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")])
    return os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def test_a_slurm_array_trains_the_layers_and_join_makes_one_artifact(
    pipeline: SimpleNamespace, shell: dict[str, str], tmp_path: Path
) -> None:
    text = script("Slurm").replace("0-7 8-15", "0 1")
    text = text.replace("cap -o", f"{pipeline.capture} --window 8 --steps 2 -o")
    for task in ("0", "1"):
        shell |= {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": "7"}
        done = subprocess.run(
            ["bash", "-c", text], cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=300
        )
        assert (done.returncode, done.stdout) == (0, f"maps-{task}\n"), done.stderr
    done = subprocess.run(
        ["bash", "-c", "lolcats join maps-? -o maps"],
        cwd=tmp_path,
        env=shell,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout) == (0, "maps\n"), done.stderr
    assert Artifact.open(tmp_path / "maps", "transfer").config["layers"] == [0, 1]
    assert not (tmp_path / "requeued").exists()


def test_a_task_that_was_stopped_is_requeued(shell: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "lolcats").write_text("#!/bin/bash\nexit 75\n")
    shell |= {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "7"}
    done = subprocess.run(["bash", "-c", script("Slurm")], cwd=tmp_path, env=shell, timeout=60)
    assert done.returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7_1\n"


def srun_of(tasks: int) -> str:
    """The body of an srun that starts so many tasks, and ends with the largest of their codes, as Slurm's does."""
    return f"""
    for task in $(seq 0 {tasks - 1}); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
    worst=0
    for task in "${{tasks[@]}}"; do wait $task; code=$?; [ $code -gt $worst ] && worst=$code; done
    exit $worst"""


def test_a_slurm_job_trains_an_adapter_on_all_gpus_of_a_node(
    pipeline: SimpleNamespace, shell: dict[str, str], tmp_path: Path
) -> None:
    """With processes for GPUs: two, which train on the CPU."""
    text = script("LoRA on several GPUs", "#SBATCH")
    assert "--ntasks-per-node=8 --gpus-per-node=8" in text
    text = text.replace("lora maps", f"lora {pipeline.transfer} --steps 2 --device cpu")
    (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash{srun_of(2)}\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    text = text.replace("$((20000 + SLURM_JOB_ID % 10000))", str(port))
    shell |= {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "lora\n"), done.stderr
    assert Artifact.open(tmp_path / "lora", "lora").config["grad_accum"] == 8
    assert not (tmp_path / "requeued").exists()
    (tmp_path / "bin" / "lolcats").write_text("#!/bin/bash\nexit $((75 * RANK))\n")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=shell, timeout=60)
    assert done.returncode == 75
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_torchrun_starts_the_ranks(pipeline: SimpleNamespace, shell: dict[str, str], tmp_path: Path) -> None:
    text = script("LoRA on several GPUs").splitlines()[1]
    text = text.replace("torchrun --nproc-per-node 8", f"{sys.executable} -m torch.distributed.run --nproc-per-node 2")
    text = text.replace("torch.distributed.run", "torch.distributed.run --standalone")
    text = text.replace("lora maps", f"lora {pipeline.transfer} --steps 2 --device cpu")
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=shell, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "lora\n"), done.stderr
    Artifact.open(tmp_path / "lora", "lora").verify()


def test_the_python_of_serving_runs_on_a_merged_folder(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """In a process that has no lolcats on its path."""
    # From the state or from nothing: the same tokens.
    code = served_code()[0] + "\nprint(torch.equal(again, model.generate(both, max_new_tokens=8, do_sample=False)))\n"
    code = "import sys\nfor name in ('lolcats_cli', 'lolcats_kernels'): sys.modules[name] = None\n" + code
    (tmp_path / "student").symlink_to(pipeline.student)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("the ship")
    assert float(lines[-2].split()[2]) < 1e-5  # off by … of the logits' spread
    assert lines[-1] == "True"


def test_the_tables_of_quality_md_are_what_the_csv_files_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "quality"))
    report = importlib.import_module("report")
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    assert len(report.MARKED.findall(text)) >= 2
    assert report.filled(text) == text
    assert report.filled(text.replace("| best |", "| worse |")) == text


@pytest.mark.slow
def test_the_server_of_serving_answers(pipeline: SimpleNamespace, tmp_path: Path) -> None:
    """Greedily, what generate() gives."""
    for module in ("fastapi", "uvicorn"):
        pytest.importorskip(module)
    (tmp_path / "serve.py").write_text(served_code()[1])
    (tmp_path / "student").symlink_to(pipeline.student)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "serve.py", "student", "--device", "cpu", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    body = {"model": "student", "prompt": "the ship", "max_tokens": 8, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        for _ in range(240):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = json.loads(answer.read())["choices"][0]["text"]
                break
            except urllib.error.URLError:
                time.sleep(0.5)
    finally:
        server.kill()
        server.wait()
    student = AutoModelForCausalLM.from_pretrained(pipeline.student, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(pipeline.student, trust_remote_code=True)
    ids = student.generate(**tokenizer("the ship", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert text == tokenizer.decode(ids[0, 8:], skip_special_tokens=True)
