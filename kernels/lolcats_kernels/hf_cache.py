"""The student's cache. Each converted layer has a recurrent state, whose size does not grow with the context. Layers
that keep softmax have keys and values, as in the teacher.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, LinearAttentionLayer

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
        self.keys = self.values = torch.empty(0)  # Mllama looks whether there are some

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
    def indexer_position_ids(self) -> None:
        """Where Qwen 4 keeps all positions for its indexer, which chooses nothing in a student."""

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: object) -> None:
        pass

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
                "roll back (assisted generation, prompt lookup) do not work with this model. Use plain generation."
            )

    def offload(self) -> None:
        raise NotImplementedError("This cache has a small constant size and is not offloaded. Leave offloading off.")

    prefetch = offload


class MixedCacheLayer(LinearAttentionLayer, LolcatsCacheLayer):  # type: ignore[override]
    """The state of an attention, and the states of a recurrence or convolution in the same layer."""

    is_compileable = False

    def __init__(self, number_of_states: int = 1) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        LolcatsCacheLayer.__init__(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        LolcatsCacheLayer.reset(self)

    def reorder_cache(self, beam_idx: Any) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        LolcatsCacheLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LolcatsCacheLayer.crop(self, tokens_to_remove)

    def offload(self) -> None:
        LolcatsCacheLayer.offload(self)

    prefetch = offload


class LolcatsCache(Cache):
    """The cache of a whole student. If all layers are converted, `nbytes` depends on the batch, not on the tokens seen.

    Layers that are not converted have what transformers gives them: keys and values, or the state of a recurrence.
    """

    def __init__(self, config: PreTrainedConfig, converted: Collection[int]) -> None:
        """converted: the layers that have maps."""
        config = config.get_text_config(decoder=True)
        count, kinds = config.num_hidden_layers, getattr(config, "layer_types", None) or ()
        if len(converted) == count and not any(str(kind).startswith("hybrid") for kind in kinds):
            super().__init__(layers=[LolcatsCacheLayer() for _ in range(count)])
        else:
            layers = DynamicCache(config=config).layers
            super().__init__(layers=[_layer(x) if i in converted else x for i, x in enumerate(layers)])

    @property
    def nbytes(self) -> int:
        tensors = [(x.keys, x.values) for x in self.layers if isinstance(x, DynamicLayer) and x.is_initialized]
        states = [x.nbytes for x in self.layers if isinstance(x, LolcatsCacheLayer)]
        for x in self.layers:
            if isinstance(x, LinearAttentionLayer):
                tensors += [(x.conv_states[i], x.recurrent_states[i]) for i in range(x.number_of_states)]
        return sum(states) + sum(x.nbytes for pair in tensors for x in pair if x is not None)


def _layer(before: object) -> LolcatsCacheLayer:
    """What takes the place of a layer of transformers' cache when its attention is converted."""
    return MixedCacheLayer(before.number_of_states) if isinstance(before, LinearAttentionLayer) else LolcatsCacheLayer()
