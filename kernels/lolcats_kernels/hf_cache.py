"""The student's cache. Each converted layer has a recurrent state, whose size does not grow with the context. Layers
that keep softmax have keys and values, as in the teacher.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from .state import BatchState


@dataclass(frozen=True, eq=False)
class SoftmaxState(BatchState):
    """Keys [B, K, C, D] and values [B, K, C, Dv] of a layer that was kept softmax: position p lies in slot p mod C.
    valid [B, C] bool: slots that hold a real token."""

    keys: Tensor
    values: Tensor
    valid: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.valid


class LolcatsCacheLayer(CacheLayerMixin):
    """One layer's state. `update` passes new keys and values through; the attention function advances the state.

    transformers' LinearAttentionCacheLayerMixin would not do. It has no `update` for keys and values and does not
    count tokens, so a cache of such layers alone has no length.

    fixed: the state's tensors, and the number of tokens seen, keep their addresses, so that a compiled decoding step
        can be one CUDA graph.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_compileable = self.fixed = fixed
        self._held: Any = None  # what has been allocated, if the layer is fixed
        self.tokens: Any = torch.zeros((), dtype=torch.int64) if fixed else 0
        self.reset()

    def reset(self) -> None:
        self.state: Any = None
        self.tokens *= 0  # a tensor in place
        self.keys = self.values = torch.empty(0)  # Mllama looks whether there are some
        self.is_initialized = False

    def advance(self, state: BatchState, tokens: int) -> None:
        """Replace the state by one that has seen `tokens` more tokens, padding included."""
        self.state = self._hold(state) if self.fixed else state
        self.tokens += tokens
        self.is_initialized = True

    def _hold(self, state: Any) -> Any:
        """The state, in the tensors of the one before if it has as many rows."""
        if self._held is None or self._held.batch_size != state.batch_size:
            with torch.inference_mode(False):  # so that it can be updated in any mode
                self._held = type(state)(*(x.new_empty(x.shape) for x in state.tensors()))
            self.tokens = self.tokens.to(self._held.tensors()[0].device)
            if not torch.compiler.is_compiling():
                for x in (*self._held.tensors(), self.tokens):
                    torch._dynamo.mark_static_address(x)
        for held, new in zip(self._held.tensors(), state.tensors(), strict=True):
            if held is not new:
                held.copy_(new)
        return self._held

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """A mask function gives the last tokens of a mask: those alone have a fixed number."""
        return (query_length if self.fixed else self.tokens + query_length), 0

    def get_seq_length(self) -> int:
        return self.tokens if self.is_initialized else 0

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
            state = self.state.select_batch(index)
            self.state = self._hold(state) if self.fixed else state

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None and indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch_size, device=self.state.tensors()[0].device)
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


class SoftmaxCacheLayer(LolcatsCacheLayer):
    """Keys and values of a layer that was kept softmax, at fixed addresses.

    slots: C of `SoftmaxState`: as many tokens as there will be, or the window of a layer whose attention slides.
    """

    def __init__(self, slots: int, *, slides: bool) -> None:
        self.slots, self.slides = slots, slides
        super().__init__(fixed=True)

    def extend(self, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds new tokens, k [B, K, T, D], v [B, K, T, Dv], valid [B, T] bool, None if all are real. -> keys, values
        and valid of those that may be seen: by one token in all slots, by more in their order."""
        count = k.shape[2]
        seen: tuple[Tensor, Tensor, Tensor | None] = k, v, valid
        new = k, v, k.new_ones(k.shape[0], count, dtype=torch.bool) if valid is None else valid
        if self.is_initialized and count > 1:
            end = int(self.tokens)
            place = torch.arange(max(end - self.slots, 0), end, device=k.device).remainder(self.slots)
            held = (x.index_select(axis, place) for axis, x in zip(_TIME, self.state.tensors(), strict=True))
            keys, values, real = (torch.cat(pair, axis) for axis, *pair in zip(_TIME, held, new, strict=True))
            seen = keys, values, real
        if not self.is_initialized:
            shape = k.shape[0], k.shape[1], self.slots
            zeros = k.new_zeros(1).expand(*shape, k.shape[3]), v.new_zeros(1).expand(*shape, v.shape[3])
            self.state = self._hold(SoftmaxState(*zeros, new[2].new_zeros(1).expand(k.shape[0], self.slots)))
            self.is_initialized = True
        begin = max(count - self.slots, 0)
        place = torch.arange(begin, count, device=k.device) + self.tokens
        place = place.remainder(self.slots) if self.slides else place  # so that too many tokens are an error
        for axis, slots, x in zip(_TIME, self.state.tensors(), new, strict=True):
            slots.index_copy_(axis, place, x.narrow(axis, begin, count - begin))
        self.tokens += count
        return self.state.tensors() if count == 1 else seen


_TIME = 2, 2, 1  # the axes of keys, values and valid


class MixedCacheLayer(LinearAttentionLayer, LolcatsCacheLayer):  # type: ignore[override]
    """The state of an attention, and the states of a recurrence or convolution in the same layer."""

    def __init__(self, number_of_states: int = 1, fixed: bool = False) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        LolcatsCacheLayer.__init__(self, fixed)

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

    def __init__(
        self,
        config: PreTrainedConfig,
        converted: Collection[int],
        kept: Collection[int] = (),
        max_length: int | None = None,
    ) -> None:
        """converted: the layers that have maps; kept: those whose softmax attention stayed. max_length: with it, the
        cache is for so many tokens, and its tensors keep their addresses if all layers can; see `is_compileable`."""
        config = config.get_text_config(decoder=True)
        count, kinds = config.num_hidden_layers, getattr(config, "layer_types", None) or ()
        if len(converted) == count and not any(str(kind).startswith("hybrid") for kind in kinds):
            layers: list[Any] = [None] * count
        else:
            layers = DynamicCache(config=config).layers
        fixed = max_length is not None and all(
            i in converted or type(x) is LinearAttentionLayer or (i in kept and type(x) in _FIXABLE)
            for i, x in enumerate(layers)
        )
        fixed = fixed and "chunked_attention" not in kinds
        for i, x in enumerate(layers):
            if i in converted:
                mixed = isinstance(x, LinearAttentionLayer)
                layers[i] = MixedCacheLayer(x.number_of_states, fixed) if mixed else LolcatsCacheLayer(fixed)
            elif fixed and max_length is not None and type(x) in _FIXABLE:
                window = getattr(x, "sliding_window", None)
                slots = max_length if window is None else min(window, max_length)
                layers[i] = SoftmaxCacheLayer(slots, slides=window is not None)
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        tensors = [(x.keys, x.values) for x in self.layers if isinstance(x, DynamicLayer) and x.is_initialized]
        states = [x.nbytes for x in self.layers if isinstance(x, LolcatsCacheLayer)]
        for x in self.layers:
            if isinstance(x, LinearAttentionLayer):
                tensors += [(x.conv_states[i], x.recurrent_states[i]) for i in range(x.number_of_states)]
        return sum(states) + sum(x.nbytes for pair in tensors for x in pair if x is not None)


_FIXABLE = DynamicLayer, DynamicSlidingWindowLayer
