"""What the Triton kernels do to memory. The interpreter runs in order what a GPU runs at the same time, so it would not
show that a program needs what another one writes, and it reads what lies beyond a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from lolcats_kernels import LAYOUTS, sparse
from torch import Tensor

pytest.importorskip("triton")

import triton
from lolcats_kernels import triton_launches, triton_sparse
from triton import language as tl
from triton.runtime import interpreter

NONE, MANY = -1, -2


@dataclass
class Range:
    """The bytes of one tensor, and who uses them in a launch: numbers of programs, or of barriers passed, by byte."""

    name: str
    first: int
    size: int
    writer: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    written: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.writer, self.reader, self.written = (np.full(self.size, NONE) for _ in range(3))


class Watch:
    """Collects `faults`: (kernel, argument, what) for each kind of

    outside: a byte that is read or written belongs to no argument;
    race: one program writes a byte that another one reads or writes in the same launch;
    no barrier: a program reads a byte that it wrote, and its threads did not meet in between.
    """

    def __init__(self) -> None:
        self.faults: set[tuple[str, str, str]] = set()
        self.launches = 0
        self.ranges: list[Range] = []

    def launched(self, kernel: Any, arguments: dict[str, Any]) -> None:
        self.kernel, self.ranges, self.program, self.barriers = kernel.__name__, [], NONE, 0
        self.launches += 1
        seen: dict[tuple[int, int], Range] = {}
        for name, x in arguments.items():
            if isinstance(x, Tensor) and x.numel():
                last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
                place = x.data_ptr(), (last + 1) * x.element_size()
                seen.setdefault(place, Range(name, *place))
        self.ranges = list(seen.values())

    def note(self, what: str, name: str) -> None:
        self.faults.add((self.kernel, name, what))

    def used(self, pointers: Any, mask: Any) -> Iterator[tuple[Range, np.ndarray]]:
        """The bytes of each tensor that lie there."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        address = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)].astype(np.int64)
        for one in self.ranges:
            inside = (address >= one.first) & (address < one.first + one.size)
            if inside.any():
                starts = address[inside] - one.first
                yield one, (starts[:, None] + np.arange(size)).ravel()
                address = address[~inside]
        if address.size:
            self.note("outside", "?")

    def load(self, pointers: Any, mask: Any) -> None:
        for one, at in self.used(pointers, mask):
            writer, reader = one.writer[at], one.reader[at]
            if ((writer != NONE) & (writer != self.program)).any():
                self.note("race", one.name)
            if ((writer == self.program) & (one.written[at] == self.barriers)).any():
                self.note("no barrier", one.name)
            one.reader[at] = np.where((reader == NONE) | (reader == self.program), self.program, MANY)

    def store(self, pointers: Any, mask: Any) -> None:
        for one, at in self.used(pointers, mask):
            for other in (one.writer[at], one.reader[at]):
                if ((other != NONE) & (other != self.program)).any():
                    self.note("race", one.name)
            one.writer[at], one.written[at] = self.program, self.barriers


@contextmanager
def watched() -> Iterator[Watch]:
    """In this block the interpreter's loads and stores are watched."""
    watch, builder, executor = Watch(), interpreter.InterpreterBuilder, interpreter.GridExecutor

    def before(cls: type, name: str, see: Any) -> Any:
        whole = getattr(cls, name)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            see(self, *arguments, **options)
            return whole(self, *arguments, **options)

        return patch.object(cls, name, call)

    def begin(self: Any, *arguments: Any, **options: Any) -> None:
        watch.launched(self.fn, dict(zip(self.arg_names, arguments, strict=False)) | options)

    def go_on(self: Any, x: int, y: int, z: int) -> None:
        watch.program, watch.barriers = x + 10_000 * (y + 10_000 * z), 0

    def barrier(self: Any) -> None:
        watch.barriers += 1

    with ExitStack() as stack:
        for cls, name, see in (
            (executor, "__call__", begin),
            (builder, "set_grid_idx", go_on),
            (builder, "create_barrier", barrier),
            (builder, "create_masked_load", lambda self, pointers, mask, *rest: watch.load(pointers, mask)),
            (builder, "create_masked_store", lambda self, pointers, value, mask, *rest: watch.store(pointers, mask)),
        ):
            stack.enter_context(before(cls, name, see))
        yield watch


@triton.jit
def faulty(x, y, z, BARRIER: tl.constexpr):
    p, i = tl.program_id(0), tl.arange(0, 4)
    tl.store(x + p * 4 + i, i)
    if BARRIER:
        tl.debug_barrier()
    tl.load(x + p * 4 + 3 - i)
    tl.store(y + i, tl.load(y + i) + 1)  # all programs count in one place
    tl.load(z + p * 4 + i, mask=i < 2)
    tl.load(z + 8 + i, mask=i < p)


@pytest.mark.parametrize("barrier", [False, True])
def test_faults_are_seen(barrier):
    with watched() as watch:
        faulty[(2,)](*(torch.zeros(8, dtype=torch.int32) for _ in range(3)), barrier)
    expected = {("faulty", "y", "race"), ("faulty", "?", "outside")}
    assert watch.faults == expected | ({("faulty", "x", "no barrier")} if not barrier else set())


@pytest.fixture
def memory(monkeypatch):
    """What is not written yet is NaN, short rows are several chunks in several segments, and launches are watched."""
    for name in ("BF16_TILES", "FP32_TILES"):
        monkeypatch.setattr(triton_launches, name, {90: {256: ((32, 4), (16, 4))}})
    monkeypatch.setattr(triton_launches, "SUMS_BYTES", 1024)
    monkeypatch.setattr(triton_launches, "PROGRAMS", 8)
    torch.use_deterministic_algorithms(True)
    with watched() as watch:
        yield watch
    torch.use_deterministic_algorithms(False)
    assert watch.launches
    assert watch.faults == set()


CONFIGS = [
    {},
    {"linear_factor": "exp", "layout": "terraced", "window": 20, "softcap": 2.0},
    {"linear_factor": "affine", "window": 0},
    {"decay": True, "linear_factor": "exp", "sinks": 1.0, "window": 20},
    {"feature_map": "elu", "padding": "holes", "window": 3},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_whole_rows(memory, make_case, config):
    case = make_case(time=70, batch=2, key_heads=1, **config)
    expected = case.gradients("reference")
    for found, exact in zip(case.to(torch.float32).gradients("triton"), expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4 * (1 + exact.abs().max().item()))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_steps(memory, make_case, config):
    case = make_case(time=45, batch=2, key_heads=1, **config)
    with torch.no_grad():
        exact = case.run("reference")
        found, _ = case.to(torch.float32).run_in_parts("triton", [*range(9, 12), *range(27, 45)])
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_choices(memory, make_case, layout, monkeypatch):
    case = make_case(time=50, batch=1, window=3, layout=layout, dtype=torch.float32)
    monkeypatch.setattr(triton_sparse, "TILE", 16)
    monkeypatch.setattr(sparse, "BLOCK", 5)
    run = partial(sparse.sparse_attention, case.q, case.k, case.v, case.maps, size=20, scaling=1.0)
    with torch.no_grad():
        expected, _ = run()
        monkeypatch.setattr(sparse, "backend_for", lambda *_: "triton")
        torch.testing.assert_close(run()[0], expected, rtol=1e-3, atol=1e-4)
