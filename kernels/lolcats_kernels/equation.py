"""Pieces of the equation that more than one implementation uses. Letters: see ../README.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .spec import QUERY_BOUND, HybridConfig


class KeyMasks(NamedTuple):
    """Which keys a query weighs by softmax, and which enter its linear term; bool [..., queries, keys]."""

    window: Tensor
    older: Tensor


def window_start(position: Tensor, config: HybridConfig) -> Tensor:
    """The first key position that a query at `position` sees by softmax; `position + 1` for window 0."""
    if config.layout == "terraced" and config.window:
        start = (position // config.window - 1) * config.window
    else:
        start = position + 1 - config.window
    return start.clamp(min=0)


def summed_keys(length: Tensor, config: HybridConfig, waiting: int) -> Tensor:
    """How many first keys of a row are in the sums of its state, after `length` tokens: those that the next query does
    not see by softmax, in whole groups of `waiting` keys where keys wait."""
    left = torch.minimum(window_start(length, config), length)
    return left // waiting * waiting if waiting else left


def key_masks(query: Tensor, key: Tensor, config: HybridConfig) -> KeyMasks:
    """For query positions [..., queries] and key positions [..., keys]."""
    query, key = query[..., :, None], key[..., None, :]
    start = window_start(query, config)
    return KeyMasks((key >= start) & (key <= query), (key < start) & (key <= query))


class Forgetting(NamedTuple):
    """How much a decay has forgotten, as exponents: the linear term of a key is multiplied by exp(-exponent)."""

    of_keys: Tensor  # [B, H, queries, J]: inf for keys that are not older than the query's window
    before: Tensor  # [B, H, queries]: of what was in the sums before the first key


def forgetting(g: Tensor, start: Tensor, older: Tensor) -> Forgetting:
    """For J keys without gaps, of which each shrinks the sums by exp(-g) when it enters them.

    g [B, H, J]; start [queries]: how many of the keys are older than each query's window; older [queries, J] bool.
    """
    entered = pad(g.cumsum(-1), (1, 0))
    before = entered[..., start]
    return Forgetting((before[..., None] - entered[..., None, 1:]).masked_fill(~older, torch.inf), before)


def cap_scores(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap tanh(scores / softcap), as in Gemma 2; the scores themselves without a cap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp(exponent), for weights beside the window's largest, which is 1."""
    return exponent.clamp(max=QUERY_BOUND).exp()


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; 0, with zero gradients, where nothing was summed."""
    return numerator / torch.where(denominator > 0, denominator, 1) * (denominator > 0)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, K, T, D] -> [B, H, T, D]: each key head serves H / K query heads that lie together."""
    batch, key_heads, time, size = x.shape
    if key_heads == num_heads:
        return x
    expanded = x[:, :, None].expand(batch, key_heads, num_heads // key_heads, time, size)
    return expanded.reshape(batch, num_heads, time, size)


def take_heads(x: Tensor, chosen: Sequence[int], key_heads: int) -> Tensor:
    """[B, H, ...] -> those of the heads that belong to the chosen ones of `key_heads`, in that order; H may be K."""
    by_key_head = x.unflatten(1, (key_heads, -1))
    return torch.cat([by_key_head[:, head] for head in chosen], 1)


def other_heads(kept: Sequence[int], key_heads: int) -> list[int]:
    """The key heads that are not kept, in order."""
    return [head for head in range(key_heads) if head not in kept]


def join_heads(others: Tensor, kept: Tensor, chosen: Sequence[int], key_heads: int) -> Tensor:
    """What `take_heads` took apart, in order again: of the other heads, and of the kept ones, which are the chosen."""
    order = [*other_heads(chosen, key_heads), *chosen]
    return take_heads(torch.cat([others, kept], 1), [order.index(head) for head in range(key_heads)], key_heads)
