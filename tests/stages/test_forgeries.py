"""Forged students, adapters, teachers and checkpoints end in a documented exit code; many: see the benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FORGERIES = Path(__file__).parents[2] / "benchmarks" / "reliability" / "forgeries.py"


@pytest.mark.slow
def test_no_forgery_ends_wrong() -> None:
    done = subprocess.run(
        [sys.executable, str(FORGERIES), "--count", "2", "--seed", "5"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    assert len(rows) == 11
    assert rows[-1] == ["all", "20", "0"]
