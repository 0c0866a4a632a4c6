"""The command line, in this process: exit code, stdout and stderr."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from lolcats_cli.main import run


class Result(NamedTuple):
    code: int
    out: str
    err: str


Invoke = Callable[..., Result]


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Invoke]:
    """`invoke("verify", path, stdin="")`, where None is a closed one; what `run` sets for its process is put back."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def call(*args: object, stdin: str | bytes | None = "") -> Result:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", None if given is None else io.TextIOWrapper(io.BytesIO(given)))
        capfd.readouterr()
        code = run([str(arg) for arg in args])
        return Result(code, *capfd.readouterr())

    with warnings.catch_warnings():
        yield call
