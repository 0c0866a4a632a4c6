"""Signals: the first waits for what is cheap to finish, the second for nothing."""

from __future__ import annotations

import signal

import pytest

from lolcats_cli import stopping
from lolcats_cli.errors import Stopped


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
