"""Students as models of vLLM's Transformers modelling backend.

The modules are the teacher's. A converted attention gets a `HybridAttentionLayer`, and an attention that stayed softmax
gets vLLM's own layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from lolcats_kernels.hf_student import fix_rotation
from lolcats_kernels.spec import layer_config, widest_config
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR, VLLM_ATTN_IMPL
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from lolcats_cli.serving.config import mapped_heads
from lolcats_cli.serving.layer import HybridAttentionLayer, LayerShape


def layer_shape(vllm_config: Any, layer: int | None = None) -> LayerShape:
    """The shape of a converted layer on one rank.

    Without `layer`, it is one with room for every layer's, because vLLM's pages have one size for all layers.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    student, key_heads = model.hf_config.lolcats, model.get_num_kv_heads(parallel)
    counts, configs = mapped_heads(student), {i: layer_config(student["hybrid"], i) for i in student["layers"]}
    if layer is None:
        config = widest_config(configs.values())
        count, kept = max(counts.values()), min(len(config.kept_heads) for config in configs.values())
    else:
        config = configs[layer]
        count, kept = counts[layer], len(config.kept_heads)
    heads = count // parallel.tensor_parallel_size, key_heads - kept
    return LayerShape(config, *heads, student["head_dim"], model.dtype)


class StudentMixin:
    """Makes a student of a model class of vLLM's Transformers backend, before which it stands in a list of bases."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> tuple[tuple[int, ...], ...]:
        return layer_shape(vllm_config).state_shapes()

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> tuple[torch.dtype, ...]:
        return layer_shape(vllm_config).state_dtypes()

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """How prefix caching copies a state to another page: each of its four tensors is copied whole."""
        return (get_temporal_copy_spec,) * 4

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        teacher = self.config.teacher_config()  # type: ignore[attr-defined]
        teacher._attn_implementation = VLLM_ATTN_IMPL
        return {"config": teacher, "dtype": self.model_config.dtype}  # type: ignore[attr-defined]

    def _create_attention_instances(self, prefix: str = "") -> None:
        super()._create_attention_instances(prefix)  # type: ignore[misc]
        this: Any = self
        fix_rotation(this.model)
        room, converted = layer_shape(this.vllm_config), set(this.config.lolcats["layers"])
        for number, (name, fuser) in this.attention_fusers.items():
            if number not in converted:
                continue
            module, shape = this.get_submodule(name), layer_shape(this.vllm_config, number)
            scaling, softcap = fuser.scale(module), getattr(this.config, "attn_logit_softcapping", None)
            scaling = shape.head_dim**-0.5 if scaling is None else scaling
            place, sinks = maybe_prefix(prefix, f"{name}.{VLLM_ATTN_ATTR}"), fuser.sinks(module)
            kept = None
            if shape.hybrid.kept_heads and sinks is not None:
                raise ValueError(
                    "vLLM does not serve students with attention sinks in which single heads keep softmax attention. "
                    "Use transformers."
                )
            if count := len(shape.hybrid.kept_heads):
                kept = Attention(
                    count * (shape.num_heads // shape.num_key_value_heads),
                    shape.head_dim,
                    scaling,
                    num_kv_heads=count,
                    cache_config=this.cache_config,
                    quant_config=this.quant_config,
                    logits_soft_cap=softcap,
                    per_layer_sliding_window=this.config.teacher_window(number),
                    prefix=f"{place}.kept",
                )
            layer = HybridAttentionLayer(
                shape, room, this.vllm_config, place, scaling=scaling, softcap=softcap, sinks=sinks, kept=kept
            )
            setattr(module, VLLM_ATTN_ATTR, layer)
        this.hf_to_vllm_mapper |= WeightsMapper(orig_to_new_substr={".hybrid.": f".{VLLM_ATTN_ATTR}.maps."})

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        # Older students have no index of tensors. vLLM then reads all files, and their golden logits are no weights.
        golden = ("input_ids", "logits")
        return super().load_weights((name, tensor) for name, tensor in weights if name not in golden)  # type: ignore[misc, no-any-return]


class LolcatsForCausalLM(StudentMixin, TransformersForCausalLM, HasInnerState, IsHybrid):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class LolcatsMoEForCausalLM(StudentMixin, TransformersMoEForCausalLM, HasInnerState, IsHybrid):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
