"""Attentions that were tried and are not in the product: each holds for the transfers that are made while it is open.

Shapes: B batch, H query heads, T time, J keys, D head, F' features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

from lolcats_kernels import HybridConfig, HybridMaps, hybrid, reference
from lolcats_kernels.equation import KeyMasks
from torch import Tensor

from lolcats_cli.stages import layer_start

FIRST = 4  # tokens that `first_tokens_exact` keeps


@contextmanager
def norms_kept() -> Iterator[None]:
    """Features have the length of their query or key: the map gives the direction alone (STILL, arXiv 2602.02180)."""
    features = HybridMaps._features

    def kept(maps: HybridMaps, x: Tensor, side: str) -> Tensor:
        """x [B, H, T, D] -> [B, H, T, F']."""
        phi = features(maps, x, side)
        return phi * (x.norm(dim=-1, keepdim=True) / phi.norm(dim=-1, keepdim=True))

    with patch.object(HybridMaps, "_features", kept), _by_the_definition():
        yield


@contextmanager
def first_tokens_exact() -> Iterator[None]:
    """The first tokens of a row stay in the softmax for every query."""
    masks = reference.key_masks

    def with_first(query: Tensor, key: Tensor, config: HybridConfig) -> KeyMasks:
        """query [..., T], key [..., J] -> bool [..., T, J] twice."""
        win, old = masks(query, key, config)
        first = old & (key < FIRST)[..., None, :]
        return KeyMasks(win | first, old & ~first)

    with (
        patch.object(reference, "key_masks", with_first),
        patch.object(layer_start, "key_masks", with_first),
        _by_the_definition(),
    ):
        yield


def _by_the_definition() -> AbstractContextManager[object]:
    """Quadratic, but it has no masks and features of its own, as the chunked attention has."""
    return patch.dict(hybrid._BACKENDS, chunked=reference.reference_attention)
