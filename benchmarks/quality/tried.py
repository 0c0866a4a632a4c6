"""Attentions that were tried and are not in the product: each holds for the transfers that are made while it is open.

Shapes: B batch, H query heads, T time, J keys, D head, F' features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from lolcats_kernels import HybridConfig, HybridMaps, chunked, hybrid, reference
from torch import Tensor

from lolcats_cli.stages import layer_training

FIRST = 4  # tokens that `first_tokens_exact` keeps


@contextmanager
def norms_kept() -> Iterator[None]:
    """Features have the length of their query or key: the map gives the direction alone (STILL, arXiv 2602.02180)."""
    features = HybridMaps._features

    def kept(maps: HybridMaps, x: Tensor, side: str) -> Tensor:
        """x [B, H, T, D] -> [B, H, T, F']."""
        phi = features(maps, x, side)
        return phi * (x.norm(dim=-1, keepdim=True) / phi.norm(dim=-1, keepdim=True))

    with (
        patch.object(HybridMaps, "_features", kept),
        # The chunked attention has features of its own.
        patch.object(chunked, "q_features", HybridMaps.q_features),
        patch.object(chunked, "k_features", HybridMaps.k_features),
    ):
        yield


@contextmanager
def first_tokens_exact() -> Iterator[None]:
    """The first tokens of a row stay in the softmax for every query. Quadratic: chunked attention has no such masks."""
    masks = reference.key_masks

    def with_first(query: Tensor, key: Tensor, config: HybridConfig) -> tuple[Tensor, Tensor]:
        """query [..., T], key [..., J] -> bool [..., T, J] twice."""
        win, old = masks(query, key, config)
        first = old & (key < FIRST)[..., None, :]
        return win | first, old & ~first

    with (
        patch.object(reference, "key_masks", with_first),
        patch.object(layer_training, "key_masks", with_first),
        patch.dict(hybrid._BACKENDS, chunked=reference.reference_attention),
    ):
        yield
