"""Signals: the first waits for what is cheap to finish, the second for nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lolcats_cli import stopping
from lolcats_cli.errors import Stopped

ROOT = Path(__file__).parents[2]
ENV = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "formats")]),
    "OMP_NUM_THREADS": "1",
}


def test_outside_of_a_unit_the_first_signal_stops() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), stopping.handled():
        signal.raise_signal(signal.SIGTERM)


def test_inside_a_unit_the_first_signal_waits_and_the_second_stops_at_once() -> None:
    seen = []
    with pytest.raises(Stopped, match="SIGINT"), stopping.handled(), stopping.deferred():
        signal.raise_signal(signal.SIGTERM)
        seen.append(stopping.requested())
        signal.raise_signal(signal.SIGINT)
        seen.append("not reached")
    assert seen == [True]


def test_a_unit_that_ends_hands_the_signal_over() -> None:
    with stopping.handled(), stopping.deferred():
        stopping.check()
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped, match="SIGINT"):
            stopping.check()


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping.handled():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    assert not stopping.requested()


def test_an_error_that_a_library_makes_of_a_stop_is_a_stop() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), stopping.handled():
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as stop:
            raise RuntimeError("could not be loaded") from stop
    with pytest.raises(RuntimeError, match="of its own"), stopping.handled(), stopping.deferred():
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("of its own")  # while the signal still waited


def test_a_stop_that_somebody_keeps_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "REMINDER", 0.01)
    with pytest.raises(Stopped, match="SIGTERM"), stopping.handled():
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def start(*args: str) -> subprocess.Popen:
    """A process of lolcats that names on stderr each module when it has been imported."""
    command = [sys.executable, "-u", "-X", "importtime", "-m", "lolcats_cli", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)


def wait_for(process: subprocess.Popen, module: str) -> None:
    assert process.stderr
    for line in process.stderr:
        if line.split("|")[-1].strip() == module:
            return
    pytest.fail(f"{module} was not imported")


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("typer", signal.SIGTERM),
        ("lolcats_cli.main", signal.SIGTERM),
        ("torch.nn", signal.SIGTERM),
        ("torch.nn", signal.SIGINT),
        ("transformers.models.auto.configuration_auto", signal.SIGTERM),
    ],
)
def test_a_signal_while_libraries_are_imported(
    pipeline: SimpleNamespace, tmp_path: Path, module: str, number: signal.Signals
) -> None:
    """From the first import on: 75 at once, whatever a library would make of an exception there."""
    arguments = ("capture", str(pipeline.teacher), str(pipeline.text), "-o", str(tmp_path / "cap"), "--seq-len", "32")
    with start(*arguments) as process:
        wait_for(process, module)
        process.send_signal(number)
        sent = time.monotonic()
        out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (75, ""), err
    assert f"Stopped by {number.name}. The same command resumes: lolcats capture " in err
    assert time.monotonic() - sent < 20  # a machine that is busy is slow; the imports that are left take longer there
    assert not (tmp_path / "cap" / "manifest.json").exists()


def test_a_signal_after_the_end(pipeline: SimpleNamespace) -> None:
    """Between the result and the end of the process, which libraries may draw out."""
    code = (
        "import os, signal\n"
        "from lolcats_cli import stopping\n"
        "stopping.install()\n"
        "from lolcats_cli.main import run\n"
        f"assert run(['verify', {str(pipeline.transfer)!r}]) == 0\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (75, f"{pipeline.transfer}\n"), done.stderr


def test_a_signal_after_a_request_is_a_first_one() -> None:
    with pytest.raises(Stopped, match="SIGTERM"), stopping.handled(), stopping.deferred():
        stopping.request("a signal to another rank")
        signal.raise_signal(signal.SIGTERM)
        stopping.request("a signal to another rank")
        stopping.check()
