"""Recording what a model's attentions see, through transformers' attention interface.

Shapes: B batch, H query heads, K key heads, T time, D head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lolcats_cli.errors import BadInput
from lolcats_cli.teacher.attention import AttentionSpec, softmax_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "lolcats_record"
PROBE_LENGTH = 48

Sink = Callable[[int, Tensor, Tensor, Tensor, AttentionSpec], None]


@dataclass(frozen=True)
class LayerInfo:
    """One attention layer as the probe saw it."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    spec: AttentionSpec

    def to_dict(self) -> dict:
        return {
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            **self.spec.to_dict(),
        }

    @classmethod
    def from_dict(cls, layer: dict) -> LayerInfo:
        heads = {key: layer[key] for key in ("num_heads", "num_key_value_heads", "head_dim")}
        return cls(**heads, spec=AttentionSpec(**{k: v for k, v in layer.items() if k not in heads}))

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that q, k and v of one token take in this layer."""
        return (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim * dtype.itemsize


@contextmanager
def recording(model: PreTrainedModel, sink: Sink) -> Iterator[None]:
    """While open, every attention of `model` hands `sink` its layer index, q, k, v and specification.

    q is [B, H, T, D]; k and v are [B, K, T, D], as the attention function receives them.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    def attention(
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        spec = AttentionSpec(q.shape[-1] ** -0.5 if scaling is None else float(scaling), sliding_window, softcap)
        sink(int(module.layer_idx), q, k, v, spec)  # type: ignore[arg-type]
        valid = None if attention_mask is None else attention_mask.bool()
        return softmax_attention(q, k, v, spec, valid).transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, flash_attention_mask)  # without it padding would be ignored
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def probe(model: PreTrainedModel, *, seed: int = 0) -> list[LayerInfo]:
    """Check that every attention of `model` can be recorded and reproduced; what it found, per layer.

    Runs random tokens, one row left-padded, through the model's own eager attention and through ours, and compares
    every layer's attention output.

    Raises:
        BadInput: naming the model and the layer that the interface does not reach or that differs.
    """
    name, count = type(model).__name__, model.config.get_text_config().num_hidden_layers
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (2, PROBE_LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : PROBE_LENGTH // 3] = 0
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}

    layers: dict[int, LayerInfo] = {}

    def note(layer: int, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> None:
        if not q.shape[-1] == k.shape[-1] == v.shape[-1]:
            raise BadInput(
                f"{name} cannot be linearized: in layer {layer} queries, keys and values differ in head size "
                f"({q.shape[-1]}, {k.shape[-1]}, {v.shape[-1]})."
            )
        layers[layer] = LayerInfo(q.shape[1], k.shape[1], q.shape[-1], spec)

    with recording(model, note):
        ours = _attention_outputs(model, inputs)
    missed = sorted(set(range(count)) - set(layers))
    if missed:
        raise BadInput(
            f"{name} cannot be linearized: layer {missed[0]} ({len(missed)} of {count} layers) does not use "
            "transformers' attention interface, so its queries, keys and values cannot be recorded."
        )
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        theirs = _attention_outputs(model, inputs)
    finally:
        model.set_attn_implementation(before)
    real = mask.bool()
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    for layer in sorted(ours):
        mine, own = ours[layer].cpu()[real].float(), theirs[layer].cpu()[real].float()
        if not torch.allclose(mine, own, rtol=tolerance, atol=tolerance * own.abs().max().item()):
            raise BadInput(
                f"{name} cannot be linearized: the attention of layer {layer} is not reproduced by softmax attention "
                f"over its queries, keys and values (largest difference {(mine - own).abs().max():.2g} where outputs "
                f"reach {own.abs().max():.2g}). It may use sinks, a bias or another mask that lolcats does not know."
            )
    return [layers[layer] for layer in range(count)]


def _attention_outputs(model: PreTrainedModel, inputs: dict) -> dict[int, Tensor]:
    """The output of every attention module in one forward pass, by layer index."""
    outputs: dict[int, Tensor] = {}
    handles = []
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        # Decoder blocks of some models carry a layer_idx too: the innermost one is the attention.
        if layer is None or any(getattr(child, "layer_idx", None) is not None for child in list(module.modules())[1:]):
            continue

        def keep(_: nn.Module, __: object, out: object, layer: int = layer) -> None:
            outputs[layer] = out[0] if isinstance(out, tuple) else out  # type: ignore[assignment]

        handles.append(module.register_forward_hook(keep))
    try:
        model.base_model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs
