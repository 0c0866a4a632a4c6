"""The student's cache. Each converted layer has a recurrent state, whose size does not grow with the context. Layers
that keep softmax have keys and values, as in the teacher; so have heads that keep it, beside the state of the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
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
from transformers.generation import GenerationMixin

from .state import BatchState

# What transformers calls the cache that `generate` and models take: `cache` since 5.24.
_names = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in _names else "past_key_values"


def given_cache(values: Iterable[object]) -> Any:
    """The cache among the arguments of a call, by whatever name; None if there is none."""
    return next((value for value in values if isinstance(value, Cache)), None)


@dataclass(frozen=True, eq=False)
class SoftmaxState(BatchState):
    """Keys [B, K, C, D] and values [B, K, C, Dv] of heads that were kept softmax: position p lies in slot p mod C.
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
    kept: the keys and values of the layer's heads that keep softmax, if it has some.
    """

    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, fixed: bool = False, kept: SoftmaxCacheLayer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fixed = fixed
        self.kept = kept
        self._held: Any = None  # what has been allocated, if the layer is fixed
        self.tokens: Any = torch.zeros((), dtype=torch.int64) if fixed else 0
        self.reset()

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        return self.fixed

    def reset(self) -> None:
        self.state: Any = None
        self.tokens *= 0  # a tensor in place
        self.keys = self.values = torch.empty(0)  # Mllama looks whether there are some
        self.is_initialized = False
        if self.kept is not None:
            self.kept.reset()

    def advance(self, state: BatchState, tokens: int) -> None:
        """Replace the state by one that has seen `tokens` more tokens, padding included."""
        self.state = self._hold(state) if self.fixed else state
        self.tokens += tokens
        self.is_initialized = True

    def _hold(self, state: Any) -> Any:
        """The state, in the tensors of the one before if it has their shapes."""
        shapes = [x.shape for x in state.tensors()]
        if self._held is None or [x.shape for x in self._held.tensors()] != shapes:
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
        kept = 0 if self.kept is None else self.kept.nbytes
        return kept if self.state is None else kept + self.state.nbytes

    def _select(self, index: Tensor) -> None:
        if self.state is not None:
            state = self.state.select_batch(index)
            self.state = self._hold(state) if self.fixed else state
        if self.kept is not None:
            self.kept._select(index)

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
    """Keys and values of a layer that was kept softmax, at fixed addresses, or of some heads of a layer.

    slots: C of `SoftmaxState`: as many tokens as there will be, or the window of a layer whose attention slides. None:
        as many as there are tokens, and nothing has a fixed address.
    """

    def __init__(self, slots: int | None, *, slides: bool) -> None:
        self.slots, self.slides = slots, slides
        super().__init__(fixed=slots is not None)

    def extend(self, k: Tensor, v: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds new tokens, k [B, K, T, D], v [B, K, T, Dv], valid [B, T] bool, None if all are real. -> keys, values
        and valid of those that may be seen: by one token in all slots, by more in their order."""
        new = k, v, k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if valid is None else valid
        seen: tuple[Tensor, Tensor, Tensor | None] = (k, v, valid) if k.shape[2] > 1 else new
        if self.slots is None:
            if self.is_initialized:
                seen = new = self._behind(self.state.tensors(), new)
            self.advance(SoftmaxState(*new), k.shape[2])
            return seen
        if self.is_initialized and k.shape[2] > 1:
            end = int(self.tokens)
            place = torch.arange(max(end - self.slots, 0), end, device=k.device).remainder(self.slots)
            held = (x.index_select(axis, place) for axis, x in zip(_TIME, self.state.tensors(), strict=True))
            seen = self._behind(held, new)
        self._put(new, self.slots)
        return self.state.tensors() if k.shape[2] == 1 else seen

    def _put(self, new: tuple[Tensor, Tensor, Tensor], slots: int) -> None:
        """Writes new tokens to their slots."""
        k, v, valid = new
        count = k.shape[2]
        if not self.is_initialized:
            shape = *k.shape[:2], slots
            zeros = k.new_zeros(1).expand(*shape, k.shape[3]), v.new_zeros(1).expand(*shape, v.shape[3])
            self.state = self._hold(SoftmaxState(*zeros, valid.new_zeros(1).expand(k.shape[0], slots)))
            self.is_initialized = True
        begin = max(count - slots, 0)
        place = torch.arange(begin, count, device=k.device) + self.tokens
        place = place.remainder(slots) if self.slides else place  # so that too many tokens are an error
        for axis, held, x in zip(_TIME, self.state.tensors(), new, strict=True):
            held.index_copy_(axis, place, x.narrow(axis, begin, count - begin))
        self.tokens += count

    @staticmethod
    def _behind(held: Iterable[Tensor], new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and valid of the tokens that are held and of new ones."""
        keys, values, valid = (torch.cat(pair, axis) for axis, *pair in zip(_TIME, held, new, strict=True))
        return keys, values, valid


_TIME = 2, 2, 1  # the axes of keys, values and valid


class MixedCacheLayer(LinearAttentionLayer, LolcatsCacheLayer):
    """The state of an attention, and the states of a recurrence or convolution in the same layer."""

    is_compileable = LolcatsCacheLayer.is_compileable
    is_croppable = False

    def __init__(self, number_of_states: int = 1, fixed: bool = False, kept: SoftmaxCacheLayer | None = None) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        LolcatsCacheLayer.__init__(self, fixed, kept)

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
    """The cache of a whole student. If all heads are converted, `nbytes` depends on the batch, not on the tokens seen.

    Layers that are not converted have what transformers gives them: keys and values, or the state of a recurrence.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        converted: Collection[int],
        kept: Collection[int] = (),
        max_length: int | None = None,
        partly: Collection[int] = (),
    ) -> None:
        """converted: the layers that have maps; kept: those whose softmax attention stayed; partly: those of the
        converted where it stayed in some heads. max_length: with it, the cache is for so many tokens, and its tensors
        keep their addresses if all layers can; see `is_compileable`."""
        config = config.get_text_config(decoder=True)
        count, kinds = config.num_hidden_layers, getattr(config, "layer_types", None) or ()
        if len(converted) == count and not partly and not any(str(kind).startswith("hybrid") for kind in kinds):
            layers: list[Any] = [None] * count
        else:
            layers = DynamicCache(config=config).layers
        fixed = max_length is not None and all(
            i in converted or type(x) is LinearAttentionLayer or (i in kept and type(x) in _FIXABLE)
            for i, x in enumerate(layers)
        )
        fixed = fixed and "chunked_attention" not in kinds
        most = max_length if fixed else None

        def softmax(like: Any) -> SoftmaxCacheLayer:
            window = getattr(like, "sliding_window", None) if "chunked_attention" not in kinds else None
            slots = most if window is None else min(window, most or window)
            return SoftmaxCacheLayer(slots, slides=window is not None)

        for i, x in enumerate(layers):
            if i in converted:
                own = softmax(x) if i in partly else None
                mixed = isinstance(x, LinearAttentionLayer)
                layers[i] = MixedCacheLayer(x.number_of_states, fixed, own) if mixed else LolcatsCacheLayer(fixed, own)
            elif fixed and type(x) in _FIXABLE:
                layers[i] = softmax(x)
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
