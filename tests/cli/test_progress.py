"""Progress: bars on a terminal, plain lines otherwise, nothing on stdout."""

from __future__ import annotations

import sys
import time

import pytest

from lolcats_cli.progress import Progress, StderrProgress


def test_plain_lines_when_the_interval_has_passed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StderrProgress(interval=10).task("capture", 5000, "rows") as advance:
        for at, done in ((10, 20), (11, 5), (20, 25), (30, 4000), (40, 949)):
            now[0] = at
            advance(done)
        advance(1, loss=1 / 3)
        now[0] = 50
        advance(0, loss=1 / 3)
    assert capsys.readouterr() == (
        "",
        "capture: 20/5000 rows, 2 rows/s, 41:30 min left\n"
        "capture: 50/5000 rows, 3 rows/s, 27:30 min left\n"
        "capture: 4050/5000 rows, 400 rows/s, 2 s left\n"
        "capture: 4999/5000 rows, 94.9 rows/s, 0 s left\n"
        "capture: 5000/5000 rows, 0.1 rows/s loss=0.3333\n",
    )
    with StderrProgress(interval=10).task("lora", 5000, "steps") as advance:
        now[0] += 10
        advance(1)
    assert capsys.readouterr().err == "lora: 1/5000 steps, 0.1 steps/s, 13:53 h left\n"


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
