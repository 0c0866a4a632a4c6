"""Every stage killed at write points and at random times ends with the same bytes; all points: see the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CRASH = Path(__file__).parents[2] / "benchmarks" / "reliability" / "crash.py"
STAGES = ["transfer"]  # which has files and checkpoints; all stages take minutes


@pytest.mark.slow
def test_killed_stages_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(CRASH),
        "--stages",
        *STAGES,
        "--every",
        "50",
        "--random",
        "1",
        "--json",
        str(tmp_path / "results.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == STAGES
    for result in results.values():
        assert result["write points"] > 40
        assert result["tried"]["killed at a write point"] > 1
        assert len(result["tried"]) >= 7  # and small disks, where the test may mount one


@pytest.mark.slow
def test_full_disks_below_the_libraries(tmp_path: Path) -> None:
    """safetensors, torch.save and PEFT write checkpoints and adapters of lora by themselves."""
    command = [sys.executable, str(CRASH), "--stages", "lora", "--kinds", "files may not grow", "small disk"]
    done = subprocess.run(
        [*command, "--random", "4", "--json", str(tmp_path / "results.json")],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "results.json").read_text())["lora"]["tried"]["files may not grow"] == 4
