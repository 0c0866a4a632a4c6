"""The student's cache: one recurrent state per layer, of a size that does not grow with the context; and keys and
values, as in the teacher, of layers that were kept softmax.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .sparse import SparseState
from .state import KVState


class LolcatsCacheLayer(CacheLayerMixin):
    """One layer's state. `update` passes new keys and values through; the attention function advances the state."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        self.state: KVState | SparseState | None = None
        self.tokens = 0

    def advance(self, state: KVState | SparseState, tokens: int) -> None:
        """Replace the state by one that has seen `tokens` more tokens, padding included."""
        self.state = state
        self.tokens += tokens
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes

    def _select(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select_batch(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None and indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.length.device)
            self._select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise NotImplementedError(
                "A linear-attention state cannot forget its last tokens, so this cache cannot be cropped. Methods that "
                "roll back (assisted generation, prompt lookup) do not work with this model; use plain generation."
            )

    def offload(self) -> None:
        raise NotImplementedError("This cache has a small constant size and is not offloaded; leave offloading off.")

    prefetch = offload


class LolcatsCache(Cache):
    """The cache of a whole student. If no layer is kept, `nbytes` depends on the batch, never on the tokens seen."""

    def __init__(self, attentions: Iterable[nn.Module]) -> None:
        """attentions: the attention modules, in layer order."""
        super().__init__(layers=[_layer(module) for module in attentions])

    @property
    def nbytes(self) -> int:
        tensors = [(x.keys, x.values) for x in self.layers if isinstance(x, DynamicLayer) and x.is_initialized]
        states = [x.nbytes for x in self.layers if isinstance(x, LolcatsCacheLayer)]
        return sum(states) + sum(x.nbytes for pair in tensors for x in pair if x is not None)


def _layer(attention: nn.Module) -> CacheLayerMixin:
    if not getattr(attention, "keeps_softmax", False):
        return LolcatsCacheLayer()
    # Most attentions know their window; Mistral's looks into the configuration, where it is of all layers.
    window = getattr(attention, "sliding_window", getattr(getattr(attention, "config", None), "sliding_window", None))
    return DynamicSlidingWindowLayer(sliding_window=window) if isinstance(window, int) else DynamicLayer()
