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
from lolcats_kernels.spec import layer_config
from torch import Tensor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR, VLLM_ATTN_IMPL
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from lolcats_cli.serving.layer import HybridAttentionLayer, LayerShape


def layer_shape(vllm_config: Any, layer: int | None = None) -> LayerShape:
    """The shape of a converted layer on one rank.

    Without `layer`, it is the shape with the longest window, because vLLM's pages have one size for all layers.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    student = model.hf_config.lolcats
    windows = student["hybrid"].get("windows")
    widest = student["layers"][0] if windows is None else max(student["layers"], key=lambda i: windows[i])
    return LayerShape(
        layer_config(student["hybrid"], widest if layer is None else layer),
        student["num_heads"] // parallel.tensor_parallel_size,
        model.get_num_kv_heads(parallel),
        student["head_dim"],
        model.dtype,
    )


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
            scaling = fuser.scale(module)
            layer = HybridAttentionLayer(
                shape,
                room,
                this.vllm_config,
                maybe_prefix(prefix, f"{name}.{VLLM_ATTN_ATTR}"),
                scaling=shape.head_dim**-0.5 if scaling is None else scaling,
                softcap=getattr(this.config, "attn_logit_softcapping", None),
                sinks=fuser.sinks(module),
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
