"""Progress: bars on a terminal, plain lines otherwise, nothing on stdout."""

from __future__ import annotations

import sys

import pytest

from lolcats_cli.progress import Progress, StderrProgress


def test_plain_lines_when_the_interval_has_passed(capsys: pytest.CaptureFixture[str]) -> None:
    with StderrProgress(interval=0).task("capture", 5, "rows") as advance:
        advance(2)
        advance(3, loss=1 / 3)
    with StderrProgress(interval=1000).task("capture", 5, "rows") as advance:
        advance(5)
    assert capsys.readouterr() == ("", "capture: 2/5 rows\ncapture: 5/5 rows loss=0.3333\n")


def test_bars_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with StderrProgress().task("capture", 2, "rows") as advance:
        advance(1)
        advance(1, loss=0.5)
    out, err = capsys.readouterr()
    assert out == ""
    assert "capture" in err
    assert "0/2" in err
    assert "\r" in err


def test_silent_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress.note("unheard")
    with progress.task("x", 1) as advance:
        advance(1, loss=1.0)
        advance()
    assert capsys.readouterr() == ("", "")
