"""A part of benchmarks/reliability/data.py: nothing odd is taken in wrongly, nothing bad ends as a bug."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability" / "data.py"


def test_no_case_ends_wrong(tmp_path: Path, monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("data_cases", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "data_cases", module)  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "stdin", sys.stdin)
    results, wrong = module.run(1, tmp_path, every=7)
    assert not wrong, "\n".join(wrong)
    assert sum(sum(counter.values()) for counter in results.values()) > 150
    assert all(counter["read"] + counter["refused"] for counter in results.values())
