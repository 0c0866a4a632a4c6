"""The state of a hybrid attention layer between calls. Its size does not depend on the length of the context.

Letters: see ../README.md. After n tokens of a row the next query, at position n, sees by softmax the keys from
`window_start(n)` on. The state is what that query needs: sums S and z over the keys before that start, and the keys
and values from it on. Keys that have left the window may wait, so that S is written once for many of them: S and z
then end at a multiple of `HybridConfig.waiting`. All this follows from n alone, so that a state does not depend on how
the row was split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .equation import repeat_heads, summed_keys
from .maps import HybridMaps
from .spec import HybridConfig, compute_dtype


class KeySums(NamedTuple):
    """Over some keys, S = sum phi_k(k_i) v_i^T [B, H, F', Dv] and z = sum phi_k(k_i) [B, H, F']."""

    sums: Tensor
    norms: Tensor


class SlotStates(NamedTuple):
    """The states of one layer in N numbered slots. A slot may hold the state of any sequence.

    The tensors are those of `KVState`, with N in the place of B. They are contiguous except for their first dimension.
    Every call tells how many tokens the sequence of a slot has seen. If that is 0, its contents do not count.
    """

    sums: Tensor
    norms: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def within(cls, pages: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> SlotStates:
        """Views of the front of each slot's tensors, where these have room for larger states.

        pages: in the order of the fields, each with N slots. shapes: of the states' tensors in one slot.
        """
        return cls(
            *(x.flatten(1)[:, : prod(shape)].unflatten(1, shape) for x, shape in zip(pages, shapes, strict=True))
        )


class Slots(NamedTuple):
    """Of a ring's slots: the positions of the keys that they hold, and whether these are not in the sums; [B, C]."""

    position: Tensor
    live: Tensor


class BatchState:
    """A layer's state of several sequences. The first dimension of all its tensors is the batch."""

    def tensors(self) -> Sequence[Tensor]:
        """All tensors, in the order of the fields."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        return self.tensors()[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(x.nbytes for x in self.tensors())

    def select_batch(self, index: Tensor) -> Self:
        """The rows `index` [B'] (int64) in that order: beam reordering, repetition, selection."""
        return type(self)(*(x.index_select(0, index.to(x.device)) for x in self.tensors()))


@dataclass(frozen=True, eq=False)
class KVState(BatchState):
    """State of one layer for B rows, which may have seen different numbers of tokens.

    sums [B, H, F', Dv]: S, over the keys older than the next query's window, but for those that wait; fp32 (fp64 for
        fp64 inputs).
    norms [B, H, F']: z, over the same keys.
    keys [B, K, C, D], values [B, K, C, Dv]: a ring in the inputs' dtype: position p lies in slot p mod C.
        C is the window (sliding), twice the window (terraced), or 0 (pure linear), and more where keys wait.
    length [B]: valid tokens seen, int64.
    """

    sums: Tensor
    norms: Tensor
    keys: Tensor
    values: Tensor
    length: Tensor

    @classmethod
    def empty(
        cls,
        maps: HybridMaps,
        batch: int,
        num_key_value_heads: int,
        *,
        value_dim: int | None = None,
        waiting: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVState:
        """The state before the first token. dtype: of the keys and values to come. waiting: as for `shapes`."""
        held = compute_dtype(dtype)
        dtypes = {"sums": held, "norms": held, "keys": dtype, "values": dtype, "length": torch.int64}
        value_dim = maps.head_dim if value_dim is None else value_dim
        shapes = cls.shapes(maps, batch, num_key_value_heads, value_dim, waiting)
        return cls(**{name: torch.zeros(shapes[name], dtype=dtypes[name], device=device) for name in shapes})

    @staticmethod
    def shapes(
        maps: HybridMaps, batch: int, num_key_value_heads: int, value_dim: int, waiting: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor. waiting: the configuration's, or 0 if no key waits."""
        slots = maps.config.slots + waiting
        return {
            "sums": (batch, maps.num_heads, maps.num_features, value_dim),
            "norms": (batch, maps.num_heads, maps.num_features),
            "keys": (batch, num_key_value_heads, slots, maps.head_dim),
            "values": (batch, num_key_value_heads, slots, value_dim),
            "length": (batch,),
        }

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the fields."""
        return self.sums, self.norms, self.keys, self.values, self.length

    def decayed(self, exponent: Tensor) -> KVState:
        """With sums that are exp(-exponent) of these; exponent [B, H]."""
        kept = torch.exp(-exponent)[..., None]
        return replace(self, sums=self.sums * kept[..., None], norms=self.norms * kept)

    def waiting(self, config: HybridConfig) -> int:
        """How many keys may wait for the sums: the ring's slots beside those that a state needs."""
        return self.keys.shape[2] - config.slots

    def live_slots(self, config: HybridConfig) -> Slots:
        position = slot_positions(self.length, self.keys.shape[2])
        return Slots(position, position >= summed_keys(self.length, config, self.waiting(config))[:, None])


def slot_positions(length: Tensor, slots: int) -> Tensor:
    """[B, slots]: the position that each slot of a ring was last written with, after length [B] tokens; negative where
    none was."""
    slot = torch.arange(slots, device=length.device)
    last = length[:, None] - 1
    return last - torch.remainder(last - slot, slots) if slots else last[:, :0]


def records_gradients(maps: HybridMaps, state: KVState | None, *inputs: Tensor) -> bool:
    """Whether autograd follows what is computed from these."""
    held = () if state is None else (state.sums, state.norms, state.keys, state.values)
    involved = (*inputs, *maps.parameters(), *held)
    return torch.is_grad_enabled() and any(x.requires_grad for x in involved)


def may_overwrite(maps: HybridMaps, state: KVState, *inputs: Tensor) -> bool:
    """Whether the state's tensors may be changed in place: autograd does not follow them, and they were not made in
    inference mode, unless that mode is on."""
    if records_gradients(maps, state, *inputs):
        return False
    # A compiled step cannot ask; it then raises torch's error.
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not state.sums.is_inference()


def masked_sums(features: Tensor, values: Tensor, mask: Tensor, state: KVState | None) -> KeySums:
    """Over the keys where mask [B, T] is True, of features [B, H, T, F'] and values [B, K, T, Dv], after those of
    `state`."""
    features = features * mask[:, None, :, None]
    sums = features.transpose(-1, -2) @ repeat_heads(values, features.shape[1]).to(features.dtype)
    norms = features.sum(2)
    return KeySums(sums, norms) if state is None else KeySums(sums + state.sums, norms + state.norms)


def next_ring(
    config: HybridConfig, keys: Tensor, values: Tensor, position: Tensor, live: Tensor, length: Tensor, waiting: int
) -> tuple[Tensor, Tensor]:
    """The keys and values that the state keeps as they are, [B, K, C, D] and [B, K, C, Dv].

    keys [B, K, T, D], values [B, K, T, Dv]: all keys that are not in the sums, those of the earlier ring included, with
    position [B, T]; live [B, T] False: not a key, must be finite. length [B]: valid tokens seen at the end. waiting: as
    for `KVState.shapes`.
    """
    slots = config.slots + waiting
    stays = live & (position >= summed_keys(length, config, waiting)[:, None])
    # Keys that do not stay go to one slot more, which is cut off.
    slot = torch.where(stays, torch.remainder(position, max(slots, 1)), slots)[:, None, :, None]
    wide = [x.new_zeros(*x.shape[:2], slots + 1, x.shape[3]) for x in (keys, values)]
    ring = [w.scatter(2, slot.expand_as(x), x)[:, :, :slots] for w, x in zip(wide, (keys, values), strict=True)]
    return ring[0], ring[1]
