"""docs/tutorial.ipynb, run cell by cell with smaller sizes, as a notebook runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"
SMALLER = {
    "SEQ_LEN": 96,
    "CAPTURED_ROWS": 8,
    "TRANSFER_STEPS": 4,
    "LORA_STEPS": 2,
    "HELD_OUT_ROWS": 2,
    "NEW_TOKENS": 4,
}


def code_cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs() -> None:
    for cell in code_cells():
        assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    sizes, *others = ["".join(cell["source"]) for cell in code_cells()]
    namespace: dict[str, Any] = {}
    exec(compile(sizes, "sizes", "exec"), namespace)
    assert set(SMALLER) == {name for name in namespace if name.isupper()}
    namespace |= SMALLER
    for number, source in enumerate(others, start=1):
        exec(compile(source, f"{NOTEBOOK.name}, code cell {number}", "exec"), namespace)
    found = namespace["found"]
    assert set(found["student"]) == {"both", "window", "linear"}
    assert 1 < found["teacher"]["both"]["perplexity"] < found["student"]["both"]["perplexity"]
    assert namespace["generated"].shape[1] == namespace["prompt"].input_ids.shape[1] + SMALLER["NEW_TOKENS"]
    assert namespace["report"].read_text().startswith("<!doctype html>")
    assert "student, both: perplexity" in capsys.readouterr().out
