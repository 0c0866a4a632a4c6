"""Several processes at one stage, as torchrun, accelerate or Slurm start them: rank 0 writes, all compute.

They find each other by the environment that those launchers set: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. In a process that was started alone every function here does nothing, or answers for that one process.
A process has one set of peers, so this is a module's state and not an object.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lolcats_cli.errors import Stopped, UsageError

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # for the slowest rank, which may be hashing or loading a large teacher
LAST_WORDS = timedelta(seconds=5)  # for the other ranks to end too, after one of them failed
FAILED, ENDED, LEFT = "lolcats/failed", "lolcats/ended", "lolcats/left"
_store: Store | None = None  # what the ranks share beside their messages, while they are joined


def size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """Which one this is, from 0."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def local_rank() -> int:
    """Which one this is on its machine, from 0: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if size() > 1 else 0


def check_alone(command: str) -> None:
    """Raises UsageError if there are several processes, for a command that runs in one."""
    if size() > 1:
        raise UsageError(f"{command} is done by one process: run it without torchrun, accelerate or srun.")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """In this block the ranks are connected; they leave it together. `device` is "cpu" or "cuda".

    Raises Stopped when another rank is gone, which the messages between them show. They stay connected afterwards, for
    the next block, for `first_failure`, and until `leave`.
    """
    global _store
    if size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(local_rank())
    if not dist.is_initialized():
        _store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
        backend = "cuda:nccl,cpu:gloo" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        yield
        barrier()
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo has no error of its own
            raise Stopped("the loss of another rank") from error
        raise


def leave() -> None:
    """Take the connection down, after success: while another rank is in trouble it could wait for ever."""
    global _store
    if _store is not None:
        import torch.distributed as dist

        dist.destroy_process_group()
        _store = None


def first_failure(code: int) -> int | None:
    """Tells the other ranks that this one ends with `code`. Returns the code of the rank that failed before it, if any.

    One failure ends all ranks, each with an error of its own, and the first one is the cause. So all stay until each
    has asked, as messages between them may still be under way, and rank 0 leaves last, as it keeps the store. A rank
    that was killed does not ask, and is waited for in vain, for `LAST_WORDS`.
    """
    if _store is None:
        return None
    mine = first = f"{rank()} {code}"
    try:
        first = _store.compare_set(FAILED, "", mine).decode()
        _store.set(f"{ENDED}/{rank()}", "")
        if rank() > 0:
            _store.wait([f"{ENDED}/{number}" for number in range(size())], LAST_WORDS)
            _store.set(f"{LEFT}/{rank()}", "")
        else:
            _store.wait([f"{LEFT}/{number}" for number in range(1, size())], LAST_WORDS)
    except RuntimeError:  # a rank is gone
        pass
    return None if first == mine else int(first.split()[1])


def share(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0. It is called there alone, and every rank waits for its result. An error of it ends
    all."""
    if size() == 1:
        return make()
    import torch.distributed as dist

    answer: list[Any] = [None, True]  # what was made, and whether that failed
    try:
        if rank() == 0:
            answer = [make(), False]
    finally:
        dist.broadcast_object_list(answer, src=0)
    value, failed = answer
    _check_first(failed)
    return cast(T, value)


def _check_first(failed: bool) -> None:
    """Raises Stopped if rank 0 failed, when that has told so (`first_failure`): it is the one that speaks."""
    if failed:
        assert _store is not None, "ranks that share something are joined"
        with suppress(RuntimeError):  # rank 0 is gone
            _store.wait([FAILED], LAST_WORDS)
        raise Stopped("an error of rank 0")


def barrier() -> None:
    """Waits until every rank is here."""
    most(0)


def most(value: int) -> int:
    """The largest `value` of all ranks."""
    if size() == 1:
        return value
    import torch
    import torch.distributed as dist

    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


@contextmanager
def one_first() -> Iterator[None]:
    """Rank 0 goes through this block before the other ranks, which then find what it has cached. Its error ends all."""
    if rank() > 0:
        _check_first(most(0) > 0)
    failed = 1
    try:
        yield
        failed = 0
    finally:
        if rank() == 0:
            most(failed)
