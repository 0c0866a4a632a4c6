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
    """`invoke("verify", path, stdin="")`; what `run` sets for its process is put back afterwards."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")

    def call(*args: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capfd.readouterr()
        code = run([str(arg) for arg in args])
        return Result(code, *capfd.readouterr())

    with warnings.catch_warnings():
        yield call
