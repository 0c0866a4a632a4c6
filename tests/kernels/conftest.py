"""Inputs for the tests of hybrid attention, from a seed.

Shapes: B batch, H query heads, K key heads, T time, D head, Dv value head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

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

    @property
    def leaves(self) -> list[Tensor]:
        return [self.q, self.k, self.v, *self.maps.parameters()]

    def run(self, backend: str, **options: object) -> Tensor:
        return hybrid_attention(
            self.q,
            self.k,
            self.v,
            self.maps,
            scaling=SCALING,
            softcap=self.softcap,
            valid=self.valid,
            terms=self.terms,
            backend=backend,
            **options,
        )

    def part(self, begin: int, end: int) -> "Case":
        valid = None if self.valid is None else self.valid[:, begin:end]
        q, k, v = (x[:, :, begin:end] for x in (self.q, self.k, self.v))
        return Case(q, k, v, self.maps, valid, self.terms, softcap=self.softcap)

    def run_in_parts(self, backend: str, cuts: Sequence[int]) -> tuple[Tensor, KVState | None]:
        """The outputs of the parts between `cuts` put together, and the last state."""
        time, state, outs = self.q.shape[2], None, []
        bounds = sorted({0, time, *(cut % time for cut in cuts)})
        for begin, end in pairwise(bounds):
            out, state = self.part(begin, end).run(backend, state=state, return_state=True)
            outs.append(out)
        return torch.cat(outs, 2), state

    def gradients(self, backend: str, autocast: bool = False) -> list[Tensor]:
        for leaf in self.leaves:
            leaf.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = self.run(backend)
        if not out.requires_grad:  # nothing was summed
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape).cos()
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
    **config: object,
) -> Case:
    """padding: none, left, right, holes, or empty (a row without a token)."""
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
    )


_CASES = st.builds(
    build_case,
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
    feature_map=st.sampled_from(FEATURE_MAPS),
    feature_dim=st.integers(1, 8),
    window=st.sampled_from((0, 1, 3, 8, 64, 70, 300)),
    layout=st.sampled_from(LAYOUTS),
    linear_factor=st.sampled_from(LINEAR_FACTORS),
)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return build_case


@pytest.fixture(scope="session")
def cases() -> st.SearchStrategy[Case]:
    """Calls of all shapes and options."""
    return _CASES
