"""Runs lolcats as two ranks, for test_ranks.py. They are forked from one process that has imported all that they need,
as an import takes seconds.

`python start_ranks.py` reads a list of runs as JSON from stdin, [{"args": the command line, "mishap": null or
[kind, rank, step]}], and prints what became of them, [[[exit code, stdout, stderr] of each rank] of each run]. In a run
with a mishap rank 1 is slow to end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from math import inf
from pathlib import Path
from typing import Any

import peft  # noqa: F401
import torch
from torch.distributed.tensor import DTensor

from lolcats_cli import ranks
from lolcats_cli.errors import BadInput
from lolcats_cli.main import run
from lolcats_cli.stages import checkpoints, lora, lora_training  # noqa: F401

SIZE = 2


def check_that_the_teacher_is_spread(model: torch.nn.Module) -> None:
    """Each rank has its part of the frozen projections, and all of what is trained."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not isinstance(parameter.data, DTensor), name
        elif "base_layer" in name:
            assert isinstance(parameter, DTensor), name
            assert parameter.to_local().numel() * SIZE == parameter.numel(), name


def mishap(kind: str, rank: int, step: int) -> None:
    """Let something happen to one rank in the forward pass after `step` steps."""
    whole = lora_training.StudentTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ranks.rank() == rank and self.state.global_step == step:
            if kind == "error":
                raise BadInput("The disk of this rank is made of cheese.")
            if kind == "check":
                check_that_the_teacher_is_spread(self.model)
            else:
                os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        return whole(self, *args, **kwargs)

    lora_training.StudentTrainer.training_step = training_step  # type: ignore[method-assign]


def end_late() -> None:
    """Let rank 1 end a second after rank 0, which has the store of all ranks."""
    first_failure = ranks.first_failure

    def late(code: int) -> int | None:
        time.sleep(ranks.rank())
        return first_failure(code)

    ranks.first_failure = late


def become_rank(rank: int, port: int, folder: str, wanted: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
    checkpoints.SECONDS, checkpoints.COST = 0, inf
    if wanted["mishap"]:
        mishap(*wanted["mishap"])
        end_late()
    code = run(wanted["args"])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(wanted: dict[str, Any]) -> list[tuple[int, str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(SIZE):
            child = os.fork()
            if child == 0:
                become_rank(rank, port, folder, wanted)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [
            (code, *(Path(folder, f"{rank}.{name}").read_text() for name in ("out", "err")))  # type: ignore[misc]
            for rank, code in enumerate(codes)
        ]


if __name__ == "__main__":
    print(json.dumps([start(wanted) for wanted in json.load(sys.stdin)]))
