"""Inputs for the tests of hybrid attention, from a seed.

Letters: see kernels/README.md.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from lolcats_kernels import (
    FEATURE_MAPS,
    LAYOUTS,
    LINEAR_FACTORS,
    TERMS,
    HybridConfig,
    HybridMaps,
    KVState,
    hybrid_attention,
)
from torch import Tensor

torch.set_num_threads(1)

SCALING = 0.4


@dataclass
class Case:
    """One call: inputs, maps with random parameters, and options."""

    q: Tensor
    k: Tensor
    v: Tensor
    maps: HybridMaps
    valid: Tensor | None = None
    terms: str = "both"
    cuts: Sequence[int] = field(default_factory=list)
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.maps.parameters(), *([] if self.sinks is None else [self.sinks])]

    def run(self, backend: str, **options: object) -> Tensor:
        return hybrid_attention(
            self.q,
            self.k,
            self.v,
            self.maps,
            scaling=SCALING,
            softcap=self.softcap,
            sinks=self.sinks,
            valid=self.valid,
            terms=self.terms,
            backend=backend,
            **options,
        )

    def to(self, dtype: torch.dtype) -> "Case":
        """Inputs in this dtype, parameters in its compute dtype (in their place)."""
        self.maps.to(torch.promote_types(dtype, torch.float32))
        sinks = None if self.sinks is None else self.sinks.to(torch.promote_types(dtype, torch.float32))
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype), sinks=sinks)

    def on(self, device: torch.device, dtype: torch.dtype) -> "Case":
        """The same values elsewhere and in another dtype, with maps of its own."""
        q, k, v = (x.detach().to(device, dtype) for x in (self.q, self.k, self.v))
        maps = deepcopy(self.maps).to(device, torch.promote_types(dtype, torch.float32))
        sinks = (
            None if self.sinks is None else self.sinks.detach().to(device, torch.promote_types(dtype, torch.float32))
        )
        valid = None if self.valid is None else self.valid.to(device)
        return replace(self, q=q, k=k, v=v, maps=maps, valid=valid, sinks=sinks)

    def part(self, begin: int, end: int) -> "Case":
        valid = None if self.valid is None else self.valid[:, begin:end]
        q, k, v = (x[:, :, begin:end] for x in (self.q, self.k, self.v))
        return Case(q, k, v, self.maps, valid, self.terms, softcap=self.softcap, sinks=self.sinks)

    def run_in_parts(
        self, backend: str, cuts: Sequence[int], waiting: int | None = None
    ) -> tuple[Tensor, KVState | None]:
        """The outputs of the parts between `cuts` put together, and the last state."""
        time, state, outs = self.q.shape[2], None, []
        bounds = sorted({0, time, *(cut % time for cut in cuts)})
        for begin, end in pairwise(bounds):
            part = self.part(begin, end)
            out, state = part.run(backend, initial_state=state, return_state=True, waiting=waiting)
            outs.append(out)
        return torch.cat(outs, 2), state

    def gradients(self, backend: str, autocast: bool = False) -> list[Tensor]:
        for leaf in self.leaves:
            leaf.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = self.run(backend)
        if not out.requires_grad:  # nothing was summed
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).cos().to(out)
        return list(torch.autograd.grad((out * weight).sum(), self.leaves, allow_unused=True, materialize_grads=True))


def build_case(
    *,
    seed: int = 0,
    batch: int = 2,
    key_heads: int = 2,
    group: int = 2,
    time: int = 23,
    head_dim: int = 6,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
    padding: str = "none",
    terms: str = "both",
    cuts: Sequence[int] = (),
    softcap: float | None = None,
    sinks: float | None = None,
    **config: object,
) -> Case:
    """sinks: about how large they are. padding: none, left, right, holes, or empty (a row without a token)."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)

    heads = key_heads * group
    config = {"feature_dim": 5, "window": 8} | config
    maps = HybridMaps(HybridConfig(**config), heads, head_dim)
    with torch.no_grad():
        for parameter in maps.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng))
    if dtype == torch.float64:
        maps.double()
    valid = None
    if padding != "none":
        lengths = torch.randint(1, time + 1, (batch, 1), generator=rng)
        steps = torch.arange(time)
        valid = {
            "left": steps >= time - lengths,
            "right": steps < lengths,
            "holes": torch.rand(batch, time, generator=rng) < 0.7,
            "empty": (steps < lengths) & (torch.arange(batch)[:, None] > 0),
        }[padding]
    return Case(
        q=normal(batch, heads, time, head_dim),
        k=normal(batch, key_heads, time, head_dim),
        v=normal(batch, key_heads, time, value_dim or head_dim),
        maps=maps,
        valid=valid,
        terms=terms,
        cuts=cuts,
        softcap=softcap,
        sinks=None if sinks is None else normal(heads) + sinks,
    )


_OPTIONS: dict[str, st.SearchStrategy] = dict(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    time=st.one_of(st.integers(1, 20), st.integers(60, 210)),
    head_dim=st.integers(1, 7),
    value_dim=st.integers(1, 7),
    padding=st.sampled_from(("none", "left", "right", "holes", "empty")),
    terms=st.sampled_from(TERMS),
    cuts=st.lists(st.integers(0, 210), max_size=4),
    softcap=st.sampled_from((None, None, 0.7, 5.0)),
    sinks=st.sampled_from((None, None, 0.0, 3.0, -40.0)),
    feature_map=st.sampled_from(FEATURE_MAPS),
    feature_dim=st.integers(1, 8),
    window=st.sampled_from((0, 1, 3, 8, 64, 70, 300)),
    layout=st.sampled_from(LAYOUTS),
    linear_factor=st.sampled_from(LINEAR_FACTORS),
    decay=st.booleans(),
)
# For Triton's interpreter, whose time goes by programs: more than one block of each kind all the same.
_SMALL = {
    "batch": st.sampled_from((1, 1, 2)),
    "group": st.sampled_from((1, 1, 3)),
    "time": st.integers(1, 44),
    "cuts": st.lists(st.integers(0, 44), max_size=2),
    "window": st.sampled_from((0, 1, 3, 8, 16, 20, 64)),
}


# For GPUs, where every other size compiles kernels of its own.
_GRID = {
    "batch": st.sampled_from((1, 2)),
    "group": st.sampled_from((1, 4)),
    "time": st.sampled_from((1, 64, 129, 256)),
    "head_dim": st.sampled_from((16, 64, 80, 128, 256)),
    "value_dim": st.sampled_from((16, 64, 80, 128, 256)),
    "feature_dim": st.sampled_from((1, 16, 64, 128, 256)),
    "cuts": st.sampled_from(((40,), (100, 101))),
    "window": st.sampled_from((0, 1, 16, 64, 70, 300)),
}


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return build_case


@pytest.fixture(scope="session")
def cases() -> st.SearchStrategy[Case]:
    """Calls of all shapes and options."""
    return st.builds(build_case, **_OPTIONS)


@pytest.fixture(scope="session")
def small_cases() -> st.SearchStrategy[Case]:
    """The same, shorter."""
    return st.builds(build_case, **(_OPTIONS | _SMALL))


@pytest.fixture(scope="session")
def grid_cases() -> st.SearchStrategy[Case]:
    """The same, with sizes up to 256 that repeat."""
    return st.builds(build_case, **(_OPTIONS | _GRID))


@pytest.fixture
def note_calls(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, tuple]]]:
    """note_calls((module, name), ...): the calls that these ops get from now on, as (op, arguments)."""

    def start(*places: tuple[Any, str]) -> list[tuple[Any, tuple]]:
        calls: list[tuple[Any, tuple]] = []

        def noting(op: Any) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                calls.append((op, arguments))
                return op(*arguments)

            return call

        for module, name in places:
            monkeypatch.setattr(module, name, noting(getattr(module, name)))
        return calls

    return start


@pytest.fixture
def numbers_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bf16 as integers, cuts fp32 to bf16, and takes TF32 for fp32. On GPUs
    products are exact and sums fp32, bf16 is rounded to the nearest, and of TF32 the lower 13 bits are not read."""

    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    def widen(bits):
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def operand(x, precision):
        if x.dtype.scalar == tl.bfloat16:
            return widen(x.data)
        data = np.ascontiguousarray(x.data)
        if x.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            return (data.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return data.astype(np.float32)

    def dot(self, a, b, d, precision, imprecise):
        product = np.matmul(operand(a, precision), operand(b, precision), dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    def cast(self, x, dtype):
        kinds = x.dtype.scalar, dtype.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(x.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return plain_cast(self, x, dtype)

    plain_cast = interpreter.InterpreterBuilder.cast_impl
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", cast)
