"""Data on disk and on stdin, and the tiny teacher's tokenizer."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def tokenizer(tiny_teacher: Path) -> PreTrainedTokenizerBase:
    """A token per byte; without a chat template."""
    return AutoTokenizer.from_pretrained(tiny_teacher)


@pytest.fixture(scope="session")
def ids(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """A document's tokens, its end included."""
    return lambda text: [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """`write(name, content)`: a file; lists of records in the format of its name, text and bytes as they are."""

    def make(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet" and isinstance(content, list):
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
        elif path.suffix == ".json" and isinstance(content, list):
            path.write_text(json.dumps(content))
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content)
        return str(path)

    return make


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
