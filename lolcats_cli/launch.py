"""Starting one process per device, as the ranks of one run (`ranks.py`). torchrun does it for several machines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lolcats_cli.errors import Stopped

command_line: list[str] | None = None  # of this process, if it is the program and not a user's Python


def launch(devices: Sequence[int], command: Sequence[str]) -> int:
    """Run `lolcats COMMAND` once per device, side by side.

    Returns:
        The exit code: 0 if all ended with it; else that of a rank that failed by itself, before that of ranks which
        were stopped because another one was gone.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(len(devices)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)),
    }
    # In sessions of their own: a terminal's Ctrl-C would reach them twice, and the second one does not wait.
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "lolcats_cli", *command],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,
        )
        for rank in range(len(devices))
    ]
    with _forwarded(ranks):
        codes = [rank.wait() for rank in ranks]
    failed = [code for code in codes if code]
    if not failed:
        return 0
    return next((code for code in failed if code > 0 and code != Stopped.exit_code), Stopped.exit_code)


@contextmanager
def _forwarded(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """In this block SIGINT and SIGTERM go to the processes instead."""

    def forward(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
