"""A converted attention layer in vLLM. Its states lie in the pages of memory that vLLM gives each sequence.

Letters: kernels/README.md has them. Besides, a step of vLLM has A tokens, and R of its sequences decode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lolcats_kernels import HybridConfig, HybridMaps, hybrid_attention
from lolcats_kernels.equation import join_heads, other_heads, take_heads
from lolcats_kernels.slots import PaddedRows, attend_in_slots, decode_in_slots, pad_rows
from lolcats_kernels.state import KVState, SlotStates
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.linear import minimax_linear_attn  # noqa: F401
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor, split_decodes_and_prefills


@dataclass(frozen=True)
class StepMetadata:
    """Which tokens of a step belong to which sequence. Sequences that decode come first and have one token each.

    Attributes:
        slots: [R] the slot of each decoding sequence's state, as for `decode_in_slots`.
        length: [R] the tokens that each decoding sequence has had before this step.
        prompts: the other sequences, in groups.
        num_tokens: the number of tokens in the step. Padding follows them.
    """

    slots: Tensor
    length: Tensor
    prompts: list[PaddedRows]
    num_tokens: int


class StepMetadataBuilder(AttentionMetadataBuilder):
    """Makes the `StepMetadata` of a step. All layers share it."""

    reorder_batch_threshold = 1
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # A CUDA graph of the decoding step reads these tensors at fixed addresses, so they are made once.
        most = vllm_config.scheduler_config.max_num_seqs
        self._slots = torch.full((most,), -1, dtype=torch.int32, device=device)
        self._length = torch.zeros(most, dtype=torch.int32, device=device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        step = common_attn_metadata
        mode = self.vllm_config.cache_config.mamba_cache_mode
        blocks = mamba_get_block_table_tensor(step.block_table_tensor, step.seq_lens, self.kv_cache_spec, mode)[:, 0]
        decoding, others, *_ = split_decodes_and_prefills(step, decode_threshold=self.reorder_batch_threshold)
        slots, length = self._slots[:decoding], self._length[:decoding]
        # A CUDA graph has a fixed number of rows. Those without a sequence get the slot -1.
        slots.copy_(torch.where(step.seq_lens[:decoding] > 0, blocks[:decoding], -1))
        length.copy_(step.compute_num_computed_tokens()[:decoding])
        prompts = []
        if others:
            starts = step.query_start_loc_cpu[decoding : decoding + others + 1]
            seen = step.seq_lens_cpu_upper_bound  # exact for prompts
            seen = step.seq_lens.cpu() if seen is None else seen
            prompts = pad_rows(starts, seen[decoding : decoding + others] - starts.diff(), blocks[decoding:])
        return StepMetadata(slots, length, prompts, step.num_actual_tokens)


class StudentBackend(LinearAttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "LOLCATS"

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder


def keys_wait() -> bool:
    """Whether keys wait in the states: on GPUs, where Triton decodes."""
    on_gpu: bool = current_platform.is_cuda_alike()
    return on_gpu


@dataclass(frozen=True)
class LayerShape:
    """The heads of a layer on one rank that have maps, and the model's dtype. The state's sums are fp32 for every
    dtype."""

    hybrid: HybridConfig
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    dtype: torch.dtype

    def state_shapes(self, least: int = 1) -> tuple[tuple[int, ...], ...]:
        """The shapes of a slot's tensors, in the order of `SlotStates`; `least` is the smallest size.

        vLLM cannot have empty tensors. So a layer without a window, in whose state no key waits, has room for one key
        and one value, which it never uses.
        """
        with torch.device("meta"):
            maps = HybridMaps(self.hybrid, self.num_heads, self.head_dim)
        waiting = self.hybrid.waiting if keys_wait() else 0
        shapes = KVState.shapes(maps, 1, self.num_key_value_heads, self.head_dim, waiting)
        return tuple(tuple(max(size, least) for size in shapes[name][1:]) for name in SlotStates._fields)

    def state_dtypes(self) -> tuple[torch.dtype, ...]:
        return torch.float32, torch.float32, self.dtype, self.dtype


class HybridAttentionLayer(nn.Module, MambaBase):
    """Serves one converted attention. vLLM gives each sequence one or more pages of memory for its state.

    `forward` is compiled by vLLM. It ends in a custom op that calls `_forward`, which is not compiled.

    Args:
        shape: the shape of this layer.
        room: the shape that the pages have room for. It is the same in all layers.
        kept: vLLM's own attention, for the layer's heads that keep softmax attention, if there are some. It has pages
            of its own.
    """

    kv_cache: tuple[Tensor, ...]

    def __init__(
        self,
        shape: LayerShape,
        room: LayerShape,
        vllm_config: Any,
        prefix: str,
        *,
        scaling: float,
        softcap: float | None,
        sinks: nn.Parameter | None,
        kept: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.maps = HybridMaps(shape.hybrid, shape.num_heads, shape.head_dim).float().requires_grad_(False)
        for parameter in self.maps.parameters():
            set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})  # all begin with the heads
        self.shape, self.room, self.prefix = shape, room, prefix
        # In a dictionary, the sinks are not registered a second time: they are a parameter of the attention module.
        self.options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        self.has_sink = sinks is not None
        self.kept = kept
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return self.room.state_shapes()

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return self.room.state_dtypes()

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[StudentBackend]:
        return StudentBackend

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.states = SlotStates.within(self.kv_cache, self.shape.state_shapes(least=0))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [A, H D], key and value [A, K D], after RoPE -> [A, H D]."""
        if self.kept is None:
            return self._hybrid(query, key, value)
        kept = self.shape.hybrid.kept_heads
        count = self.shape.num_key_value_heads + len(kept)
        others, softmax = (
            attend(*(take_heads(x, heads, count) for x in (query, key, value)))
            for attend, heads in ((self._hybrid, other_heads(kept, count)), (self.kept, kept))
        )
        return join_heads(others, softmax, kept, count)

    def _hybrid(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same for the heads that have maps."""
        packed = torch.cat((query, key, value), -1).to(self.shape.dtype)
        output = torch.empty_like(query)
        # The import of minimax_linear_attn registers this op. vLLM does not compile across it.
        torch.ops.vllm.linear_attention(packed, output, packed, self.prefix)
        return output

    def _forward(self, hidden_states: Tensor, output: Tensor, positions: Tensor) -> None:
        """Fills output [A, H D]. hidden_states holds q, k and v side by side."""
        shape = self.shape
        heads = [shape.num_heads, shape.num_key_value_heads, shape.num_key_value_heads]
        q, k, v = hidden_states.unflatten(-1, (-1, shape.head_dim)).split(heads, 1)
        out = output.view(len(output), shape.num_heads, shape.head_dim)
        found = get_forward_context().attn_metadata
        if found is None:  # vLLM measures the memory that a step takes, before there are pages
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            out.copy_(hybrid_attention(q, k, v, self.maps, **self.options)[0].transpose(0, 1))
            return
        step: StepMetadata = found[self.prefix]
        first = slice(0, len(step.slots))
        out[first] = decode_in_slots(
            q[first], k[first], v[first], self.maps, self.states, step.slots, step.length, **self.options
        )
        for rows in step.prompts:
            attend_in_slots(q, k, v, self.maps, self.states, rows, out, **self.options)
        out[step.num_tokens :] = 0
